"""Can the input pipeline feed the model? `python -m benchmarks.pipeline --preset v1-0.935b`.

Random lives of the preset's lengths, with all seven features and clusters, written to disk once.
Then users a second: of one core that assembles batches from memory and from memory maps, and of
worker processes as a training run has them. With `--train` the model trains on what the workers
deliver, and the share of the time is shown that it waits for a batch.

    taskset -c 0,1 python -m benchmarks.pipeline --preset tiny --workers 2 --train 200
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import shlex
import sys
import tempfile
import time

import jax
import numpy as np
import rich.console
import rich.table

from onerec_jax import cli
from onerec_jax.config import PRESETS, ModelConfig
from onerec_jax.data.batches import BatchBuilder
from onerec_jax.data.examples import Examples
from onerec_jax.data.features import ActionLog, ItemFeatures, LifelongLog
from onerec_jax.data.mapped import MappedBatches, write_mapped
from onerec_jax.data.pipeline import PipelineConfig, TrainStream
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.files import write_text
from onerec_jax.inputs import FeatureSpec, StaticFeature
from onerec_jax.models.onerec import OneRec
from onerec_jax.sharding import make_mesh, put_batch
from onerec_jax.training.optimizer import OptimizerConfig, make_optimizer
from onerec_jax.training.step import Trainer

LABELS = ("click", "like", "follow", "comment", "forward", "hate", "long_view", "profile_enter")


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Time the assembly of training batches."""

    preset: str = "tiny"
    users: int = 2000
    actions: int = 10_000
    """Of every life; the lifelong pathway holds as many clusters as it has slots."""
    items: int = 100_000
    batch_size: int = 64
    targets_per_user: int = 4
    workers: int = 2
    seconds: float = 10.0
    """Of each measurement."""
    train: int = 0
    """Steps to train on the workers' batches; 0: do not."""
    out: pathlib.Path = pathlib.Path("runs/benchmarks/pipeline.json")
    """JSON to write."""

    def __post_init__(self):
        require_at_least(
            self, "", users=1, actions=100, items=1, batch_size=1, targets_per_user=1, workers=1,
            train=0,
        )  # fmt: skip
        if self.preset not in PRESETS:
            raise InputError(f"--preset {self.preset}: choose one of {', '.join(PRESETS)}")


def random_lives(config: BenchmarkConfig, cfg: ModelConfig):
    """Specification, log, items and clusters as a large data set would have them."""
    rng = np.random.default_rng(0)
    users, actions, items = config.users, config.actions, config.items
    n, clusters, tags = users * actions, cfg.slots("lifelong"), 4
    spec = FeatureSpec(
        num_items=items, levels=3, codebook_size=256 if config.preset == "tiny" else 8192,
        tags=tuple(map(str, range(500))), tags_per_item=tags, num_authors=items // 20,
        has_time=True, has_playtime=True, has_duration=True, labels=LABELS, clustered=True,
        static=(StaticFeature("user_id", "hash", 65_536),),
    )  # fmt: skip
    log = ActionLog(
        offsets=np.arange(users + 1, dtype=np.int64) * actions,
        item=rng.integers(items, size=n, dtype=np.int32),
        positive_rows=np.flatnonzero(rng.random(n, np.float32) < 0.3),
        time_s=np.tile(np.arange(actions, dtype=np.int64) * 60, users),
        playtime=rng.integers(1, 30, n, dtype=np.uint8),
        label=rng.integers(2, size=(n, len(LABELS)), dtype=np.uint8),
        static=rng.integers(1, 65_537, (users, 1), dtype=np.int32),
    )
    catalogue = ItemFeatures(
        sid=rng.integers(spec.codebook_size, size=(items, 3), dtype=np.int32),
        tags=rng.integers(1, 501, (items, tags), dtype=np.int32),
        author=rng.integers(1, spec.num_authors + 1, items, dtype=np.int32),
        duration=rng.integers(1, 40, items, dtype=np.int32),
    )
    # One snapshot a user, before the last tenth of its life: targets come from that tenth.
    covered = actions * 9 // 10
    lives = LifelongLog(
        keys=np.arange(users) << 32 | covered,
        offsets=np.arange(users + 1, dtype=np.int64) * clusters,
        representative=np.sort(rng.integers(covered, size=(users, clusters)))[:, ::-1]
        .reshape(-1).astype(np.int32),
        time_s=rng.integers(covered * 60, size=users * clusters),
        playtime=rng.integers(1, 30, users * clusters, dtype=np.uint8),
        duration=rng.integers(1, 40, users * clusters, dtype=np.uint8),
        count=rng.integers(1, 12, users * clusters, dtype=np.uint8),
    )  # fmt: skip
    return spec, log, catalogue, lives


def users_a_second(batches, batch_size: int, seconds: float) -> float:
    """Rate of an iterator after its first batch."""
    next(batches)
    begin, made = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        next(batches)
        made += batch_size
    return made / (time.perf_counter() - begin)


def assembled(stream: TrainStream, source):
    """Batches of a stream, made here and now."""
    assemble = dataclasses.replace(stream.assembler(), source=source)
    yield from map(assemble, itertools.count())


def waiting(stream: TrainStream, spec: FeatureSpec, steps: int) -> dict:
    """Seconds a step, and the share of them that a training loop waits for its batch."""
    with contextlib.closing(stream()) as batches:
        first = next(batches)
    mesh = make_mesh(data=1)
    trainer = Trainer(
        OneRec(stream.builder.cfg, spec, train=True),
        make_optimizer(OptimizerConfig(), steps),
        mesh,
        jax.tree.map(lambda x: x[:1], first),
        seed=0,
    )
    state = trainer.init(0)
    shapes, begin, waited, timed = set(), 0.0, 0.0, 0
    batches = stream()
    for step in range(steps):
        start = time.perf_counter()
        batch = next(batches)
        wait = time.perf_counter() - start
        shape = jax.tree.map(np.shape, batch)
        state, metrics = trainer.step(state, put_batch(batch, mesh))
        jax.block_until_ready(metrics)
        if str(shape) not in shapes or step < 5:  # a compilation fills the queue
            shapes.add(str(shape))
            continue
        begin += time.perf_counter() - start
        waited += wait
        timed += 1
    batches.close()
    return {"step_s": begin / timed, "waiting": waited / begin, "steps": timed}


def main(config: BenchmarkConfig) -> None:
    """Measure, print and write."""
    cfg = PRESETS[config.preset]
    spec, log, items, lives = random_lives(config, cfg)
    builder = BatchBuilder(log, items, cfg, lives)
    rng = np.random.default_rng(1)
    count = 50 * config.users
    examples = Examples(
        rng.integers(config.users, size=count, dtype=np.int32),
        rng.integers(config.actions * 9 // 10, config.actions, count, dtype=np.int32),
    )
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.pipeline", *sys.argv[1:]]),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "settings": dataclasses.asdict(config),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch, "mapped")
        write_mapped(folder, builder)
        result["bytes_on_disk"] = sum(path.stat().st_size for path in folder.iterdir())
        mapped = MappedBatches(folder, cfg)
        stream = TrainStream(
            builder,
            examples,
            PipelineConfig(targets_per_user=config.targets_per_user, workers=config.workers),
            config.batch_size,
            0,
            np.full(config.users, config.actions),
            mapped=mapped,
        )
        one = next(assembled(stream, builder))
        result["bytes_a_user"] = sum(x.nbytes for x in jax.tree.leaves(one)) / config.batch_size
        result["users_s"] = rates = {}
        for name, source in (("memory", builder), ("memory maps", mapped)):
            rates[f"one core, from {name}"] = users_a_second(
                assembled(stream, source), config.batch_size, config.seconds
            )
        with contextlib.closing(stream()) as batches:
            rates[f"{config.workers} workers"] = users_a_second(
                batches, config.batch_size, config.seconds
            )
        if config.train:
            result["train"] = waiting(stream, spec, config.train)
    table = rich.table.Table(
        "", "users/s", title=f"{config.preset}, batches of {config.batch_size}"
    )
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}")
    rich.console.Console().print(table)
    print(f"{result['bytes_a_user'] / 1e3:,.1f} kB a user")
    if config.train:
        print(
            f"training: {1e3 * result['train']['step_s']:.1f} ms a step, "
            f"{result['train']['waiting']:.2%} of it waiting for batches"
        )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.out, json.dumps(result, indent=1, default=str) + "\n")
    print(f"written to {config.out}")


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, prog="python -m benchmarks.pipeline")
