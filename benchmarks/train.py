"""Training speed of a preset on the devices at hand: `python -m benchmarks.train`.

Compiled steps on random users that lie on the device already, so that it is the step that is
timed and not the input pipeline (`benchmarks/pipeline.py`). MFU is the FLOPs of valid tokens,
without padding, recomputation or rows that experts drop, over the bf16 peak of the chip.

    python -m benchmarks.train --preset v1-0.935b --users 256
    python -m benchmarks.train --preset v1-0.935b --users 256 --lengths realistic --profile trace
"""

import dataclasses
import json
import os
import pathlib
import shlex
import sys
import time
from typing import Literal

import jax
import numpy as np

from benchmarks import results
from benchmarks.random_data import large_spec, lengths_of, random_users
from onerec_jax.config import PRESETS, ModelConfig
from onerec_jax.errors import require_at_least
from onerec_jax.models.onerec import OneRec
from onerec_jax.sharding import MeshConfig, check_mesh, make_mesh, put_batch
from onerec_jax.training.flops import train_flops
from onerec_jax.training.optimizer import OptimizerConfig, make_optimizer
from onerec_jax.training.profile import ONE_BY_ONE, by_part, kernels, peak_flops
from onerec_jax.training.step import Trainer


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Time training steps."""

    preset: str = "v1-0.935b"
    model: ModelConfig = PRESETS["v1-0.935b"]
    users: int = 256
    """A step, over all devices."""
    accumulate: int = 1
    """Parts that a step's users are cut into, one after the other."""
    targets_per_user: int = 1
    lengths: Literal["full", "realistic"] = "full"
    """Of the histories; see benchmarks/random_data.py."""
    items: int = 200_000
    authors: int = 50_000
    codebook_size: int = 8192
    warmup: int = 3
    """Steps before the timed ones. Experts need some 60 at --model.router-bias-rate 0.02 until
    their load is even; what they drop before is not counted as useful."""
    steps: int = 10
    """Timed."""
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    """A small learning rate keeps routers where their bias has balanced them, as in a long run;
    with the default they drift while the model learns two batches by heart."""
    profile: pathlib.Path | None = None
    """Folder for a trace of three further steps; its longest kernels are printed."""
    out: pathlib.Path = pathlib.Path("runs/benchmarks/train.json")
    """JSON to write; further results are appended to its list."""

    def __post_init__(self):
        require_at_least(
            self, "", users=1, accumulate=1, targets_per_user=1, items=1, authors=1,
            codebook_size=1, steps=1, 
        )  # fmt: skip


def main(config: BenchmarkConfig) -> None:
    """Compile, measure, print, write."""
    if config.profile is not None:  # before JAX starts its backend
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_BY_ONE}"
    cfg = config.model
    spec = large_spec(
        items=config.items, authors=config.authors, tags=500, codebook_size=config.codebook_size
    )
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    check_mesh(mesh, cfg, batch_size=config.users, accumulate=config.accumulate)
    devices = mesh.devices.size
    batches = [
        random_users(
            cfg, spec, config.users, targets=config.targets_per_user, lengths=config.lengths, seed=s
        )
        for s in range(2)
    ]
    trainer = Trainer(
        OneRec(cfg, spec, train=True),
        make_optimizer(config.optimizer, 10_000),
        mesh,
        jax.tree.map(lambda x: x[:1], batches[0]),
        seed=0,
        accumulate=config.accumulate,
    )
    placed = [put_batch(batch, mesh) for batch in batches]
    start = time.perf_counter()
    state = trainer.init(0)
    step = trainer.step.lower(state, placed[0]).compile()
    compile_s = time.perf_counter() - start
    memory = step.memory_analysis()

    def run(count):
        nonlocal state
        for i in range(count):
            state, metrics = step(state, placed[i % len(placed)])
        return jax.device_get(metrics)

    run(config.warmup)
    start = time.perf_counter()
    metrics = run(config.steps)
    seconds = (time.perf_counter() - start) / config.steps
    lengths = [
        lengths_of(config.lengths, cfg, config.users, np.random.default_rng(s)) for s in range(2)
    ]
    dropped = float(metrics.get("dropped", 0))
    useful = [train_flops(cfg, spec, config.targets_per_user, k, dropped).sum() for k in lengths]
    tflops = float(np.mean(useful)) / seconds / devices / 1e12
    device = jax.devices()[0]
    peak = peak_flops(device)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    allocated = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.train", *sys.argv[1:]]),
        "device": f"{devices} x {device.device_kind}",
        "jax": jax.__version__,
        "settings": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "parameters": parameters,
        "compile_s": compile_s,
        "step_s": seconds,
        "users_s": config.users / seconds,
        "targets_s": config.users * config.targets_per_user / seconds,
        "useful_tflops": tflops,
        "mfu": 1e12 * tflops / peak if peak else None,
        "peak_gib": allocated / 2**30,
        "temporary_gib": memory.temp_size_in_bytes / 2**30 if memory else None,
        "loss": float(metrics["loss"]),
        "dropped": dropped,
        "max_violation": float(metrics.get("max_violation", 0)),
    }
    if config.profile is not None:
        with jax.profiler.trace(str(config.profile)):
            run(3)
        found = kernels(config.profile, step.as_text(), steps=3)
        result["parts_ms"] = by_part(found)
        result["kernels"] = [kernel._asdict() for kernel in found[:150]]
        for part, milliseconds in result["parts_ms"].items():
            print(f"{milliseconds:9.3f} ms  {part}")
    print(
        f"{config.preset} on {result['device']}, {parameters / 1e9:.3f} B parameters, "
        f"{config.users} users a step: {1e3 * seconds:.1f} ms, {result['users_s']:,.0f} users/s, "
        f"{result['useful_tflops']:.1f} TFLOP/s a device"
        + (f", MFU {result['mfu']:.1%}" if peak else "")
        + f", peak {result['peak_gib']:.1f} GiB, dropped {result['dropped']:.1%}, "
        f"compiled in {compile_s:.0f} s",
        flush=True,
    )
    results.append(config.out, result)


if __name__ == "__main__":
    results.run_with_preset(main, BenchmarkConfig, prog="python -m benchmarks.train")
