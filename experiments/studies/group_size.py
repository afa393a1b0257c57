"""How many items a group should have: OneRec Technical Report (arXiv 2506.13695), Table 7.

The sizes of --small are a quarter of the report's. A step has the same number of users in every
arm, so that larger groups cost more.

    python -m experiments.studies.group_size --small
"""

from experiments.studies.posttraining import NO_RL, Study, command


def arms(config, starts):
    """No group, and three sizes that are four times the last."""
    sizes = (32, 128, 512) if config.small else (128, 512, 2048)
    return {"0": NO_RL} | {str(size): {"rollout.group": size} for size in sizes}


STUDY = Study(
    name="group_size",
    question="Size of a group",
    paper=(
        "vtr is 0.2198 without a group, 0.2303 with 128, 0.2350 with 512 and 0.2352 with 2048: four"
        " times what is generated in serving is enough (Table 7)."
    ),
    arms=arms,
)

if __name__ == "__main__":
    command(STUDY)
