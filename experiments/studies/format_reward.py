"""What keeps a policy legal: OneRec Technical Report (arXiv 2506.13695), section 2.4.2.

python -m experiments.studies.format_reward --small
"""

from experiments.studies.posttraining import START, Study, command

STUDY = Study(
    name="format_reward",
    question="Format reward: none, on the K most probable, on K at random",
    paper=(
        "legality over all that is generated falls below 50% without a format reward, rises and "
        "falls again with the 5 most probable of 128, and climbs steadily to 95% with 5 at random; "
        "online, App Stay Time +0.13% and Watch Time +0.30%."
    ),
    arms=lambda config, starts: {
        "none": {"format.k": 0},
        "top 5": {"format.choose": "top"},
        "random 5": {},
        START: None,
    },
    headline=("legality, sample", "legality, beam", "watch_s"),
    metrics=tuple(
        f"legality, {method}, level {level}" for method in ("beam", "sample") for level in (1, 2)
    ),
    curves=("legality", "reward", "entropy", "loss"),
)

if __name__ == "__main__":
    command(STUDY)
