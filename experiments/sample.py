"""Draw the rollouts of a post-training run: `python -m experiments.sample RUN --queue FOLDER`.

RUN is the run folder that `experiments.posttrain … --out RUN --queue.folder FOLDER` writes. Start
as many as there are devices to draw on, on any host that sees both folders, before the trainer or
after it; each ends with the training. One that dies is replaced by those that are left.

    python -m experiments.sample runs/post --queue runs/post-queue
"""

import contextlib
import dataclasses
import pathlib
import shlex
import signal
import time
from typing import Annotated

import tyro

from experiments.stage import follow_up
from onerec_jax import cli
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.posttraining.queue import Queue
from onerec_jax.posttraining.queued import QueuedDraws
from onerec_jax.posttraining.sampler import RolloutSampler, answer_requests, check_owner
from onerec_jax.posttraining.trainer import PolicyStream
from onerec_jax.run import Run
from onerec_jax.sharding import MeshConfig, check_mesh, make_mesh
from onerec_jax.training.checkpoint import digest, save_model
from onerec_jax.training.loop import StopSignal


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Draw what a post-training run asks for, with the policies that it publishes."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """Run folder of the post-training, its --out; it may be about to be made."""
    queue: pathlib.Path
    """Folder of the queue, the trainer's --queue.folder."""
    lease_s: float = 30
    """Seconds after which the request of a sampler that gives no sign of life is taken over."""
    idle_s: float = 1800
    """Seconds without a trainer, or without a request, after which this ends; 0: never."""
    mesh: MeshConfig = MeshConfig(data=1)
    """One device by default; several share the users of a request."""

    def __post_init__(self):
        require_at_least(self, "", idle_s=0, lease_s=1)


def wait_for_trainer(queue: Queue, idle_s: float) -> None:
    """Until a trainer has taken up the queue.

    Raises:
      InputError: none has.
    """
    start = time.monotonic()
    if queue.belongs_to is None:
        print(f"waiting for a trainer with --queue.folder {queue.folder}")
    while queue.belongs_to is None:
        if idle_s and time.monotonic() - start >= idle_s:
            raise InputError(
                f"no trainer has come to {queue.folder} in {idle_s:g} s (--idle-s): start "
                "experiments.posttrain with --queue.folder"
            )
        time.sleep(0.2)


def open_run(folder: pathlib.Path, queue: Queue) -> Run:
    """The run, if the queue is its own."""
    run = Run.open(folder)
    check_stage(run)
    check_owner(queue, run)
    return run


def check_stage(run: Run) -> None:
    """Raises InputError if it is no run of post-training."""
    if run.config["settings"].get("stage") != "posttrain":
        raise InputError(f"{run.folder} is no run of experiments.posttrain: give its --out")


def queued_draws(config, run: Run, stream: PolicyStream, stop: StopSignal) -> QueuedDraws:
    """The other end, for the trainer.

    Args:
      config: `PosttrainConfig`.

    Raises:
      InputError: the folder is no queue, or that of another run.
    """
    queue = Queue(config.queue.folder)
    check_owner(queue, run)
    return QueuedDraws(
        queue,
        config.queue,
        every=config.rollout.refresh_every,
        group=config.rollout.group,
        steps=config.train.steps,
        config=run.config,
        asked=stream.asked,
        publish=save_model,
        digest=digest,
        saved=lambda: run.checkpoints.latest or 0,
        stopped=lambda: stop.received is not None,
        hint=f"{follow_up('sample', run.folder)} --queue {shlex.quote(str(config.queue.folder))}",
    )


def main(config: SampleConfig) -> None:
    """Waits for the trainer, then draws to its end."""
    with contextlib.suppress(ValueError):  # not the main thread: no signals here
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # gives its request back
    queue = Queue(config.queue, lease_s=config.lease_s)
    if (config.run / "config.json").exists():
        check_stage(Run.open(config.run))  # at once, and not only when a trainer has come
    wait_for_trainer(queue, config.idle_s)
    run = open_run(config.run, queue)
    if run.config["settings"]["deterministic"]:
        cli.use_deterministic_kernels()
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    check_mesh(mesh, run.model_config, batch_size=mesh.size)
    sampler = RolloutSampler(run, queue, mesh)
    print(f"drawing for {config.run} from {config.queue}")
    answered = answer_requests(queue, sampler, idle_s=config.idle_s)
    print(f"the training has come to its end: {answered} requests answered")


def run_command(argv: list[str] | None = None) -> None:
    """The command line; `argv` replaces the process's own flags."""
    cli.run(main, SampleConfig, prog="python -m experiments.sample", argv=argv)


if __name__ == "__main__":
    run_command()
