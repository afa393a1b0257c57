"""Time and quality of lifelong compression: `taskset -c 0 python -m benchmarks.lifelong`.

One life to 2000 clusters; lives that come day by day, with a snapshot at every growth of 10%; and
how far actions lie from the representatives of their clusters, relative to one clustering of the
whole life. What snapshots do is compared under other seeds, for under the same they are the same.
Beside it the way not taken: the actions of each day to fewer micro-clusters first, and clusters of
those (micro 4: a fourth as many).
"""

import dataclasses
import json
import os
import pathlib
import platform
import shlex
import sys
import time

import numpy as np
import rich.console
import rich.table
import threadpoolctl

from onerec_jax import cli
from onerec_jax.data.hierarchy import hierarchical_clusters
from onerec_jax.data.lifelong import (
    DAY_S,
    Actions,
    Life,
    LifelongConfig,
    chunk_ends,
    clusters_of,
    stored_ends,
)
from onerec_jax.errors import require_at_least
from onerec_jax.files import write_text


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Time hierarchical clustering and snapshots, on one core, and compare their quality."""

    actions: int = 100_000
    """Of the single life."""
    dim: int = 64
    users: int = 3
    """Lives of the many-users case."""
    user_actions: int = 10_000
    day_actions: int = 100
    quality_actions: int = 20_000
    """Of the lives whose quality is compared, in a fiftieth as many clusters."""
    repeats: int = 3
    seed: int = 0
    lifelong: LifelongConfig = LifelongConfig()
    out: pathlib.Path = pathlib.Path("runs/benchmarks/lifelong.json")
    """JSON to write."""

    def __post_init__(self):
        require_at_least(
            self, "", actions=1, dim=1, users=1, user_actions=1, day_actions=1, quality_actions=100,
            repeats=1, seed=0,
        )  # fmt: skip


def content(kind: str, n: int, dim: int, seed: int) -> np.ndarray:
    """Float32 `[n, dim]`: "isotropic", or "mixture-K" of K equally frequent topics."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim))
    if kind != "isotropic":
        topics = int(kind.removeprefix("mixture-"))
        x = rng.normal(size=(topics, dim))[rng.integers(topics, size=n)] + 0.3 * x
    return x.astype(np.float32)


def single_life(config: BenchmarkConfig, kind: str) -> dict:
    """Seconds of one clustering."""
    x, seconds = content(kind, config.actions, config.dim, config.seed), []
    for _ in range(config.repeats):
        begin = time.perf_counter()
        label = hierarchical_clusters(x, config.lifelong.max_clusters, seed=config.lifelong.seed)
        seconds.append(time.perf_counter() - begin)
    return {
        "case": f"one life, {kind}",
        "actions": config.actions,
        "clusterings": 1,
        "clusters": int(label.max()) + 1,
        "seconds": round(float(np.median(seconds)), 3),
        "actions_per_s": round(config.actions / float(np.median(seconds))),
    }


def lives_by_days(config: BenchmarkConfig, kind: str, actions: int, users: int) -> dict:
    """Seconds of all snapshots of lives of so many actions, no item twice."""
    x = content(kind, actions, config.dim, config.seed)
    time_s = np.arange(actions) // config.day_actions * DAY_S
    rng, clusters, made = np.random.default_rng(config.seed), 0, 0
    begin = time.perf_counter()
    for _ in range(users):
        life = Life(x, config.lifelong)
        shots = life.append(Actions(rng.permutation(actions).astype(np.int32), time_s))
        made += sum(len(shot.count) > 0 for shot in shots)
        clusters += sum(len(shot.count) for shot in shots)
    seconds = time.perf_counter() - begin
    return {
        "case": f"{users} lives by days of {config.day_actions}, {kind}",
        "actions": users * actions,
        "clusterings": made,
        "clusters": clusters,
        "seconds": round(seconds, 3),
        "actions_per_s": round(users * actions / seconds),
    }


def mean_distance(x, label, representative) -> float:
    """From actions to the representatives of their clusters."""
    return float(np.linalg.norm(x - x[representative[label]], axis=1).mean())


def by_micro_clusters(x, day: int, ratio: int, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """The way not taken: days to n / ratio micro-clusters each, whose centres are clustered."""
    micro, found = np.empty(len(x), np.int64), 0
    for start in range(0, len(x), day):
        today = x[start : start + day]
        micro[start : start + day] = found + hierarchical_clusters(today, -(-len(today) // ratio))
        found = micro[: start + day].max() + 1
    order, count = np.argsort(micro, kind="stable"), np.bincount(micro)
    total = np.add.reduceat(x[order].astype(np.float64), np.cumsum(count) - count)
    label = hierarchical_clusters(total / count[:, None], clusters, weight=count)[micro]
    order, count = np.argsort(label, kind="stable"), np.bincount(label)
    begin = np.cumsum(count) - count
    mean = np.add.reduceat(x[order].astype(np.float64), begin) / count[:, None]
    nearest = np.lexsort((np.linalg.norm(x - mean[label], axis=1), label))
    return label, nearest[begin]


def quality(config: BenchmarkConfig, kind: str, dim: int) -> dict:
    """Distances relative to one clustering of the whole life, the mean over three seeds."""
    n, day = config.quality_actions, config.day_actions
    x, item = content(kind, n, dim, config.seed), np.arange(n)
    settings = dataclasses.replace(config.lifelong, max_clusters=n // 50, max_actions=n)
    ends = stored_ends(chunk_ends(item // day * DAY_S, n, settings), settings)
    seen, whole, micro = ends[-1], [], {}
    for seed in (1, 2, 3):
        other = dataclasses.replace(settings, seed=config.lifelong.seed + seed)
        whole.append(mean_distance(x[:seen], *clusters_of(item[:seen], x, other)))
    whole = float(np.mean(whole))
    snapshot = mean_distance(x[:seen], *clusters_of(item[:seen], x, settings))
    for ratio in (2, 4, 12):
        found = by_micro_clusters(x[:seen], day, ratio, settings.max_clusters)
        micro[f"micro_{ratio}"] = round(mean_distance(x[:seen], *found) / whole, 3)
    return {
        "content": f"{kind}, {dim}-d",
        "whole_life": round(whole, 3),
        "snapshot": round(snapshot / whole, 3),
        **micro,
    }


def show(title: str, rows: list[dict]) -> None:
    """One table."""
    table = rich.table.Table(title=title)
    for column, value in rows[0].items():
        justify = "left" if isinstance(value, str) else "right"
        table.add_column(column.replace("_", " "), justify=justify)
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
    rich.console.Console(highlight=False).print(table)


def main(config: BenchmarkConfig) -> None:
    """Measure, print and write."""
    with threadpoolctl.threadpool_limits(1):
        speed = [single_life(config, kind) for kind in ("isotropic", "mixture-300")]
        speed.append(lives_by_days(config, "mixture-300", config.user_actions, config.users))
        speed.append(lives_by_days(config, "mixture-300", config.actions, 1))
        kinds = ("isotropic", "mixture-30", "mixture-100", "mixture-1000")
        compared = [quality(config, kind, dim) for dim in (8, config.dim) for kind in kinds]
    show(f"one core, {config.dim}-d, at most {config.lifelong.max_clusters} clusters", speed)
    show("distance to the representative / that of one clustering of the whole life", compared)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.lifelong", *sys.argv[1:]]),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 1 used",
        "settings": dataclasses.asdict(config),
        "speed": speed,
        "quality": compared,
    }
    write_text(config.out, json.dumps(report, indent=1, default=str) + "\n")
    print(f"written to {config.out}")


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, prog="python -m benchmarks.lifelong")
