"""What stages that train share: where runs lie, their mesh, and how an interrupted one ends."""

import contextlib
import dataclasses
import pathlib
import shlex
from collections.abc import Callable

import jax

from onerec_jax.config import ModelConfig
from onerec_jax.errors import InputError
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


def follow_up(experiment: str, folder: pathlib.Path) -> str:
    """A command to go on with, for the shell."""
    return f"python -m experiments.{experiment} {shlex.quote(str(folder))}"


def seconds_of_training(run: Run, train: Callable[[], tuple[object, Progress]]) -> float:
    """Trains to the end, and says how long that took.

    Args:
      train: as `training.loop.fit` returns.

    Raises:
      InputError: another process trains in the folder.
      SystemExit: 130 after Ctrl-C or SIGTERM, everything saved.
    """
    try:
        with held(run.folder):
            _, progress = train()
    except Interrupted as interrupted:
        print(f"{interrupted}; the same command goes on from there: {run.config['command']}")
        raise SystemExit(130) from None
    return progress.seconds


@contextlib.contextmanager
def held(folder: pathlib.Path):
    """Keeps other commands from training in a run folder meanwhile, as far as the system can.

    Raises:
      InputError: one does.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        yield
        return
    with open(folder / "config.json") as file:
        try:
            # Of the processes of one run the first writes.
            if jax.process_index() == 0:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process trains in {folder}: wait for it, or give another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield  # closing the file, or the end of the process, lets go
