"""Gradients of embedding tables, one variant beside the other: `python -m benchmarks.lookup`.

The rows of a training step's histories, under a law of popularity, are summed into a gradient as
large as the table, in float32. Variants:

scatter    as `layers.lookup` does it: rows are added where they belong, in the order of tokens
sorted     in the order of their places in the table, so that what falls on one row lies together;
           the sort of the indices is part of the time

The floor is every row read once and the gradient written once, at --gb-s.

    python -m benchmarks.lookup
    python -m benchmarks.lookup --users 8 --history 50 --items 1000 --authors 100 --codebook-size 64
"""

import dataclasses
import pathlib
import shlex
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import results
from benchmarks.random_data import TAGS_PER_ITEM, popular
from onerec_jax import cli
from onerec_jax.errors import require_at_least
from onerec_jax.inputs import TIME_BUCKETS
from onerec_jax.models.layers import lookup


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Time the gradients of the tables of a step."""

    users: int = 512
    history: int = 2276
    """Actions of each user, in all pathways."""
    d_model: int = 1024
    items: int = 200_000
    authors: int = 50_000
    tags: int = 500
    codebook_size: int = 8192
    repeats: int = 20
    gb_s: float = 2940.0
    """Of the memory, for the floor: a device copy, read and write (H100)."""
    out: pathlib.Path = pathlib.Path("runs/benchmarks/lookup.json")
    """JSON to write; further results are appended to its list."""

    def __post_init__(self):
        names = ("users", "history", "d_model", "items", "authors", "tags", "codebook_size")
        require_at_least(self, "", **dict.fromkeys((*names, "repeats"), 1))


def scatter(table_vd, index, row):
    """The gradient as training makes it."""
    _, pull = jax.vjp(lambda table: lookup(table, index, row.dtype), table_vd)
    return pull(row)[0]


def in_order(table_vd, index, row):
    """The same, rows sorted by their places in the table."""
    # An index has as many rows as trailing axes say, such as the levels of a semantic ID: all of
    # an action's rows have one gradient.
    flat = index.reshape(-1)
    row = row.reshape(-1, row.shape[-1])
    place, token = jax.lax.sort_key_val(flat, jnp.arange(flat.size) * len(row) // flat.size)
    return (
        jnp.zeros(table_vd.shape, jnp.float32)
        .at[place]
        .add(
            row[token].astype(jnp.float32),
            mode="promise_in_bounds",
            indices_are_sorted=True,
        )
    )


VARIANTS = {"scatter": scatter, "sorted": in_order}


def tables(config: BenchmarkConfig) -> dict[str, tuple[int, int, int]]:
    """Rows and width of each table, and how many of its rows an action reads."""
    return {
        "items": (config.items, config.d_model, 1),
        "codes": (3 * config.codebook_size, config.d_model, 3),
        "authors": (config.authors, 512, 1),
        "tags": (config.tags, 128, TAGS_PER_ITEM),
        "a feature in buckets": (TIME_BUCKETS, 128, 1),
    }


def time_table(config: BenchmarkConfig, name: str, size: int, width: int, reads: int) -> dict:
    """Milliseconds of each variant, and how far they differ."""
    rng = np.random.default_rng(0)
    tokens = config.users * config.history
    level = np.arange(reads) * config.codebook_size if name == "codes" else 0
    most = config.codebook_size if name == "codes" else size
    index = jnp.asarray(popular(rng, most, (tokens, reads)) + level, jnp.int32)
    row = jax.random.normal(jax.random.key(0), (tokens, width), jnp.bfloat16)
    table = jnp.zeros((size, width), jnp.float32)
    row_of = {
        "scatter": lambda row: jnp.broadcast_to(row[:, None], (tokens, reads, width)),
        "sorted": lambda row: row,
    }
    found, sums = {}, {}
    for variant, function in VARIANTS.items():
        run = jax.jit(lambda t, i, r, f=function, of=row_of[variant]: f(t, i, of(r)))
        sums[variant] = jax.block_until_ready(run(table, index, row))
        start = time.perf_counter()
        for _ in range(config.repeats):
            last = run(table, index, row)
        jax.block_until_ready(last)
        found[variant] = 1e3 * (time.perf_counter() - start) / config.repeats
    first, *others = sums.values()
    scale = float(jnp.linalg.norm(first))
    floor = (tokens * width * 2 + size * width * 4) / config.gb_s / 1e6
    result = {
        "table": name,
        "rows": size,
        "width": width,
        "reads": reads,
        "ms": found,
        "floor_ms": floor,
        "error": max(float(jnp.linalg.norm(x - first)) / scale for x in others),
    }
    print(
        f"{name:<22}{size:>8} x {width:<5}"
        + "".join(f"  {variant} {ms:.2f} ms" for variant, ms in found.items())
        + f"  floor {floor:.2f} ms  relative difference {result['error']:.1e}",
        flush=True,
    )
    return result


def main(config: BenchmarkConfig) -> None:
    """Measure, print, write."""
    device = jax.devices()[0]
    rows = [time_table(config, name, *shape) for name, shape in tables(config).items()]
    results.append(
        config.out,
        {
            "command": shlex.join(["python", "-m", "benchmarks.lookup", *sys.argv[1:]]),
            "device": device.device_kind,
            "jax": jax.__version__,
            "settings": dataclasses.asdict(config),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, prog="python -m benchmarks.lookup")
