"""What every stage that trains shares: where runs lie, and how one ends that is interrupted."""

import pathlib
from collections.abc import Callable

from onerec_jax.run import Run
from onerec_jax.training.loop import Interrupted, Progress

RUNS = pathlib.Path("runs")


def seconds_of_training(run: Run, train: Callable[[], tuple[object, Progress]]) -> float:
    """Trains to the end, and says how long that took.

    Args:
      train: as `training.loop.fit` returns.

    Raises:
      SystemExit: 130 after Ctrl-C or SIGTERM, everything saved.
    """
    try:
        _, progress = train()
    except Interrupted as interrupted:
        print(f"{interrupted}; the same command goes on from there: {run.config['command']}")
        raise SystemExit(130) from None
    return progress.seconds
