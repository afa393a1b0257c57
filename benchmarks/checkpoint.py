"""What a checkpoint costs training: `python -m benchmarks.checkpoint`.

Steps without saves, then saves with steps after each while the copy is written. The stall of a
save is what these steps take longer, `Checkpoints.save` itself included.

    python -m benchmarks.checkpoint --preset v1-0.935b --users 256
"""

import dataclasses
import json
import pathlib
import shlex
import sys
import tempfile
import time

import jax

from benchmarks.random_data import large_spec, random_users
from onerec_jax import cli
from onerec_jax.config import PRESETS
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.files import write_text
from onerec_jax.models.onerec import OneRec
from onerec_jax.sharding import check_mesh, make_mesh, put_batch
from onerec_jax.training.checkpoint import Checkpoints
from onerec_jax.training.optimizer import OptimizerConfig, make_optimizer
from onerec_jax.training.step import Trainer


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Time saves beside training steps."""

    preset: str = "v1-0.935b"
    users: int = 256
    """A step, over all devices."""
    steps: int = 50
    """Timed without a save, and after each save."""
    saves: int = 2
    every: int = 500
    """Steps between saves that the stall is compared with."""
    items: int = 200_000
    authors: int = 50_000
    codebook_size: int = 8192
    folder: pathlib.Path | None = None
    """Where to write, a new folder of the system's temporary one if none is named."""
    out: pathlib.Path = pathlib.Path("runs/benchmarks/checkpoint.json")
    """JSON to write."""

    def __post_init__(self):
        require_at_least(
            self, "", users=1, steps=1, saves=1, every=1, items=1, authors=1, codebook_size=1
        )
        if self.preset not in PRESETS:
            raise InputError(f"--preset {self.preset}: choose one of {', '.join(PRESETS)}")


def main(config: BenchmarkConfig) -> None:
    """Measure, print, write."""
    cfg, mesh = PRESETS[config.preset], make_mesh()
    check_mesh(mesh, cfg, batch_size=config.users)
    spec = large_spec(
        items=config.items, authors=config.authors, tags=500, codebook_size=config.codebook_size
    )
    batch = random_users(cfg, spec, config.users)
    optimizer = make_optimizer(OptimizerConfig(), 10_000)
    trainer = Trainer(
        OneRec(cfg, spec, train=True), optimizer, mesh, jax.tree.map(lambda x: x[:1], batch), seed=0
    )
    batch, state = put_batch(batch, mesh), trainer.init(0)

    def run(steps):
        nonlocal state
        for _ in range(steps):
            state, metrics = trainer.step(state, batch)
        jax.block_until_ready(metrics)

    def timed(function):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    folder = tempfile.TemporaryDirectory(dir=config.folder)
    checkpoints = Checkpoints(pathlib.Path(folder.name) / "checkpoints")
    checkpoints.reserve(state)  # as the training loop does
    run(3)
    step_s = timed(lambda: run(config.steps)) / config.steps
    size = sum(x.nbytes for x in jax.tree.leaves((state.variables, state.opt_state)))
    stalls, calls, whole = [], [], []
    with folder:
        for number in range(config.saves):
            start = time.perf_counter()
            calls.append(timed(lambda n=number: checkpoints.save(state, note={}, score=float(n))))
            run(config.steps)
            stalls.append(time.perf_counter() - start - config.steps * step_s)
            checkpoints.wait()
            whole.append(time.perf_counter() - start)
        checkpoints.close()
    share = max(stalls) / (config.every * step_s)
    print(
        f"{config.preset} on {mesh.devices.size} x {jax.devices()[0].device_kind}: "
        f"{1e3 * step_s:.1f} ms a step, {size / 2**30:.1f} GiB a checkpoint; "
        f"a save returns after {max(calls):.2f} s, is whole after {max(whole):.1f} s and costs "
        f"{max(stalls):.2f} s of training: {share:.1%} of {config.every} steps"
    )
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.checkpoint", *sys.argv[1:]]),
        "device": f"{mesh.devices.size} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "settings": dataclasses.asdict(config),
        "step_s": step_s,
        "bytes": size,
        "save_returns_s": calls,
        "save_whole_s": whole,
        "stall_s": stalls,
        "share_of_time_between_saves": share,
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.out, json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, prog="python -m benchmarks.checkpoint")
