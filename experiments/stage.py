"""What stages that train share: where runs lie, their mesh, and how an interrupted one ends."""

import dataclasses
import pathlib
from collections.abc import Callable

from onerec_jax.config import ModelConfig
from onerec_jax.run import Run
from onerec_jax.sharding import check_mesh, make_mesh
from onerec_jax.training.loop import Interrupted, Progress

RUNS = pathlib.Path("runs")


def checked_mesh(config, model: ModelConfig):
    """The mesh that a command asks for, checked against the model and the batch."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    train = config.train
    check_mesh(mesh, model, batch_size=train.batch_size, accumulate=train.accumulate)
    return mesh


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
