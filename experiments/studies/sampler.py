"""Which policy draws: OneRec Technical Report (arXiv 2506.13695), Table 9.

python -m experiments.studies.sampler --small
"""

from experiments.studies.posttraining import Study, command

STUDY = Study(
    name="sampler",
    question="Items drawn by the pretrained model or by the present policy",
    paper=(
        "vtr is 0.2262 with items of the pretrained model and 0.2389 with those of the current "
        "policy, up to 1000 steps old (Table 9)."
    ),
    arms=lambda config, starts: {
        "pretrained model": {"rollout.refresh_every": 0},
        "current policy": {},
        "current policy, anew each step": {"rollout.refresh_every": 1},
    },
    curves=("reward", "legality", "ratio_quantiles", "early_clipped"),
)

if __name__ == "__main__":
    command(STUDY)
