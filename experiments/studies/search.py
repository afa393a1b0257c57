"""How the items of a group are found: OneRec Technical Report (arXiv 2506.13695), Table 8.

python -m experiments.studies.search --small
"""

from experiments.studies.posttraining import Study, command

STUDY = Study(
    name="search",
    question="Beams against draws",
    paper=(
        "Beam search has a vtr of 0.2162 and top-k + top-p 0.2131, with 0.90 points more Watch Time"
        " and 0.60 more App Stay Time (Table 8; k and p are not given)."
    ),
    arms=lambda config, starts: {
        "top-k + top-p": {"rollout.method": "sample", "rollout.top_k": 50, "rollout.top_p": 0.95},
        "beams": {},
        "draws": {"rollout.method": "sample"},
        "different draws (Gumbel)": {"rollout.method": "gumbel"},
    },
)

if __name__ == "__main__":
    command(STUDY)
