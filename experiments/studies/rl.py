"""What reinforcement learning buys, at 32, 128 and 512 generated items: OneRec Technical Report
(arXiv 2506.13695), Table 6.

    python -m experiments.studies.rl --small
"""

from experiments.studies.posttraining import NO_RL, START, Study, command

NUMBERS = (32, 128, 512)

STUDY = Study(
    name="rl",
    question="RL on and off, at Pass@32, 128 and 512",
    paper=(
        "RL raises vtr from 0.1978 to 0.2138 at Pass@32, 0.2239 to 0.2387 at 128 and 0.2444 to "
        "0.2494 at 512, and App Stay Time by 0.49, 0.38 and 0.09 points: the fewer items are "
        "generated, the more (Table 6; vtr is the reward)."
    ),
    arms=lambda config, starts: {
        START: None,
        "supervised fine-tuning alone": NO_RL,
        "with RL (ECPO)": {},
    },
    headline=("loop stay_s", "loop watch_s", "watch_s", *(f"watch_s chosen@{n}" for n in NUMBERS)),
    metrics=(
        *("loop stay_s", "loop watch_s", "loop views", "loop return", "loop flagged"),
        *(f"watch_s {how}@{n}" for how in ("mean", "chosen", "best") for n in NUMBERS),
        *(f"satisfaction {how}@{n}" for how in ("mean", "chosen", "best") for n in NUMBERS),
    ),
    # Of what is drawn: the arm without RL draws two items a user, so that rewards say nothing.
    curves=("loss",),
    judge={"pass_at": NUMBERS, "days": 2.0},
)

if __name__ == "__main__":
    command(STUDY)
