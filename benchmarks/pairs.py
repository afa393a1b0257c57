"""Time and memory of mining item pairs: `taskset -c 0,1 python -m benchmarks.pairs`.

Without --data on a made log: items are drawn one by one from a Zipf law (the n-th most popular
with probability proportional to n ** -zipf), users act as often as a log-normal law says. Each kind
of pairs runs in a process of its own, so that its peak memory is its own.
"""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import shlex
import sys
import time

import numpy as np
import rich.console
import rich.table

from onerec_jax import cli
from onerec_jax.data.features import positive_actions
from onerec_jax.data.schema import load_dataset
from onerec_jax.data.splits import make_split, train_mask
from onerec_jax.errors import require_at_least
from onerec_jax.files import write_text
from onerec_jax.inputs import PositiveRule
from onerec_jax.tokenizer.pairs import PairConfig, swing, user_to_item


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Time Swing and user-to-item pairs, and their peak memory."""

    data: pathlib.Path | None = None
    """Data set folder from experiments.prepare, instead of a made log; its positive training
    actions are mined."""
    interactions: int = 1_000_000
    """Actions of the made log, repetitions included, up to rounding."""
    users: int = 50_000
    items: int = 30_000
    zipf: float = 1.0
    """Exponent of the popularity of items; 0 makes all equal."""
    sigma: float = 1.0
    """Standard deviation of the logarithm of a user's number of actions."""
    seed: int = 0
    pairs: PairConfig = PairConfig()
    out: pathlib.Path | None = None
    """JSON to write; default: runs/benchmarks/pairs-NAME.json."""

    def __post_init__(self):
        require_at_least(self, "", interactions=1, users=1, items=1, zipf=0, sigma=0, seed=0)


def power_law_log(config: BenchmarkConfig) -> tuple[np.ndarray, np.ndarray]:
    """User rows and item rows of a made log, int32 [about N]; every user acts at least once."""
    rng = np.random.default_rng(config.seed)
    lengths = rng.lognormal(0, config.sigma, config.users)
    lengths = np.maximum(1, np.rint(lengths * config.interactions / lengths.sum())).astype(np.int64)
    share = np.cumsum(np.arange(1, config.items + 1) ** -config.zipf)
    place = np.searchsorted(share / share[-1], rng.random(lengths.sum()), "right")
    item = rng.permutation(config.items)[np.minimum(place, config.items - 1)]
    user = np.repeat(np.arange(config.users), lengths)
    return user.astype(np.int32), item.astype(np.int32)


def measure(kind: str, user, item, num_items: int, pairs: PairConfig, queue) -> None:
    """Mine one kind and put its row of the table in `queue`; runs in a process of its own."""
    before = _peak_mib()
    start = time.perf_counter()
    mine = swing if kind == "swing" else user_to_item
    found = mine(user, item, num_items, pairs, say=lambda line: print(f"  {line}", flush=True))
    seconds = time.perf_counter() - start
    queue.put(
        {
            "kind": kind,
            "seconds": round(seconds, 2),
            "peak_mib": round(_peak_mib()),
            "peak_mib_before": round(before),
            "pairs": len(found),
            "items_with_a_pair": len(np.unique(found.first)),
        }
    )


def _peak_mib() -> float:
    """Largest resident memory of this process so far."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 1024 if sys.platform != "darwin" else kib / 1024**2


def main(config: BenchmarkConfig) -> None:
    """Measure, print and write."""
    if config.data is None:
        name, (user, item), num_items = "made", power_law_log(config), config.items
    else:
        dataset = load_dataset(config.data)
        split = make_split(dataset)
        keep = train_mask(dataset, split) & positive_actions(dataset, PositiveRule())
        name, num_items = dataset.name, dataset.num_items
        user, item = dataset.interactions["user_row"].to_numpy()[keep], dataset.item_rows[keep]
    popularity = np.sort(np.bincount(item, minlength=num_items))[::-1]
    lengths = np.bincount(user)
    log = {
        "name": name,
        "actions": len(item),
        "users": int((lengths > 0).sum()),
        "items": int((popularity > 0).sum()),
        "most_actions_of_a_user": int(lengths.max()),
        "most_actions_on_an_item": int(popularity[0]),
    }
    rows, context = [], multiprocessing.get_context("spawn")
    kinds = {"swing": config.pairs.swing, "user-to-item": config.pairs.user_to_item}
    for kind in (kind for kind, wanted in kinds.items() if wanted):
        queue = context.SimpleQueue()
        worker = context.Process(
            target=measure, args=(kind, user, item, num_items, config.pairs, queue)
        )
        worker.start()
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"{kind} ended with exit code {worker.exitcode}")
        rows.append(queue.get())

    title = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in log.items())
    table = rich.table.Table(title=title)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column == "kind" else "right")
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
    rich.console.Console(highlight=False).print(table)
    out = config.out or pathlib.Path("runs/benchmarks", f"pairs-{name.lower()}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.pairs", *sys.argv[1:]]),
        "machine": f"{platform.processor() or platform.machine()}, {_cores()} cores",
        "settings": dataclasses.asdict(config),
        "log": log,
        "results": rows,
    }
    write_text(out, json.dumps(report, indent=1, default=str) + "\n")
    print(f"written to {out}")


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, prog="python -m benchmarks.pairs")
