"""Long lives to few clusters: `python -m experiments.compress --data FOLDER --out FOLDER …`.

For every user and day the closed part of the life, in at most 2000 clusters of like items. Likeness
is that of given item vectors, or of the centres that semantic IDs stand for. A killed command goes
on where it was when it is given again.

    python -m experiments.compress --data runs/data/kuairand --out runs/lives \
        --semantic-ids runs/ids --workers 8
    python -m experiments.compress --data runs/data/beauty --out runs/lives --vectors items.npy
"""

import dataclasses
import os
import pathlib
import time

import numpy as np
import rich.console
import rich.table

from onerec_jax import cli
from onerec_jax.data.compress import check_target, compress
from onerec_jax.data.lifelong import LifelongConfig, Snapshots
from onerec_jax.data.schema import Dataset, load_dataset
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.tokenizer.vectors import load_vectors


@dataclasses.dataclass(frozen=True)
class CompressConfig:
    """Compress the lives of all users of a data set."""

    data: pathlib.Path
    """Data set folder from experiments.prepare."""
    out: pathlib.Path
    """Folder to write."""
    semantic_ids: pathlib.Path | None = None
    """Folder from experiments.tokenize: an item's vector is the sum of the centres of its codes."""
    vectors: pathlib.Path | None = None
    """Item vectors: .npy [items, D] in the order of items.parquet, or .parquet with item_id."""
    compression: LifelongConfig = LifelongConfig()
    workers: int = 0
    """Processes; 0: one a core."""
    overwrite: bool = False
    """Replace snapshots that are already in --out, and drop unfinished ones of other settings."""

    def __post_init__(self):
        require_at_least(self, "", workers=0)
        if (self.semantic_ids is None) == (self.vectors is None):
            raise InputError("give either --semantic-ids or --vectors: what items are alike by")


def item_vectors(config: CompressConfig, dataset: Dataset) -> np.ndarray:
    """The content vectors of all items, float32 `[items, D]`."""
    if config.vectors is not None:
        return load_vectors(config.vectors, dataset.items["item_id"])
    ids = SemanticIds.load(config.semantic_ids)
    if ids.manifest.get("dataset_fingerprint") != dataset.fingerprint or ids.codes is None:
        raise InputError(
            f"--semantic-ids {config.semantic_ids} were made for another data set than "
            f"{config.data}: run experiments.tokenize on it"
        )
    from onerec_jax.tokenizer.rq_kmeans import decode  # here, so that workers do not load JAX

    return decode(ids.codes, ids.codebooks)


def show(snapshots: Snapshots, seconds: float) -> None:
    """Prints what came out."""
    counts, table = snapshots.manifest["counts"], rich.table.Table(show_header=False)
    clusters, rate = counts["clusters"], counts["actions"] / max(counts["core_seconds"], 1e-9)
    mean = counts["actions_clustered"] / max(clusters, 1)
    rows = {
        "users": f"{counts['users']:,}",
        "actions": f"{counts['actions']:,}",
        "older actions left out": f"{counts['actions_left_out']:,}",
        "snapshots": f"{counts['snapshots']:,}",
        "clusters": f"{clusters:,}",
        "compression (mean members of a cluster)": f"{mean:.2f}"
        if clusters
        else "no life is too long",
        "largest cluster": f"{snapshots.count.max():,}" if clusters else "-",
        "bytes": f"{snapshots.nbytes:,}",
        "seconds": f"{seconds:.1f}",
        "actions/s a core": f"{rate:,.0f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    table.columns[1].justify = "right"
    rich.console.Console(highlight=False).print(table)


def main(config: CompressConfig) -> None:
    """Make the snapshots, write them and show how many they are."""
    check_target(config.out, config.overwrite)
    begin = time.perf_counter()
    dataset = load_dataset(config.data)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    snapshots = compress(
        dataset,
        item_vectors(config, dataset),
        config.compression,
        config.out,
        workers=config.workers or cores,
        overwrite=config.overwrite,
        say=lambda line: print(line, flush=True),
    )
    show(snapshots, time.perf_counter() - begin)
    print(f"written to {config.out}")


if __name__ == "__main__":
    cli.run(main, CompressConfig, prog="python -m experiments.compress")
