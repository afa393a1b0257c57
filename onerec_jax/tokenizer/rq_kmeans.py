"""Residual k-means: level after level, the nearest centre and what it leaves over.

OneRec Technical Report (arXiv 2506.13695), section 2.1.2; balanced as in OneRec V0 (arXiv
2502.18965), Algorithm 1. The clustering itself is in `kmeans.py` and `balanced.py`.

Axes: N points, D width, K centres, L levels.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from onerec_jax.errors import InputError, require_at_least
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer.balanced import market_kmeans, sweep_kmeans
from onerec_jax.tokenizer.kmeans import START_SAMPLE, lloyd, mini_batch_lloyd, start_centres
from onerec_jax.tokenizer.nearest import Points, assign, default_chunk

BLOCK_BYTES = 512 << 20
"""Points that `encode` and `decode` have in hand at once."""
RUN = 4096
"""Neighbouring rows that a mini-batch takes together, for the sake of files on disk."""


@dataclasses.dataclass(frozen=True)
class KMeansConfig:
    """How one level is clustered."""

    iterations: int = 25
    """Lloyd iterations a level; passes over the catalogue with --tokenizer.kmeans.mini-batch."""
    assignment: Literal["plain", "balanced", "sweep"] = "plain"
    """plain: nearest centre (V1). balanced: every code gets as many items, by prices.
    sweep: the same by V0's Algorithm 1, which costs more in reconstruction."""
    slack: float = 0.0
    """balanced: share by which a code may exceed its fair number of items; 0 = at most one item."""
    init: Literal["k-means++", "random"] = "k-means++"
    restarts: int = 1
    """Starts of each level, of which the one with the least inertia stays (plain only)."""
    mini_batch: int = 0
    """Points a mini-batch, for catalogues that do not fit into memory (plain only); 0 = all."""
    chunk: int = 0
    """Points whose distances to all centres are held at once; 0 = what suits the device."""
    precision: Literal["auto", "highest", "high", "default"] = "auto"
    """Of the products while fitting. auto: tf32 on a GPU, float32 elsewhere. The final assignment
    and the coding of new items are always float32."""

    def __post_init__(self):
        ones, zeros = ("iterations", "restarts"), ("slack", "mini_batch", "chunk")
        prefix = "tokenizer.kmeans."
        require_at_least(self, prefix, **dict.fromkeys(ones, 1), **dict.fromkeys(zeros, 0))
        if self.assignment != "plain" and (self.mini_batch or self.restarts > 1):
            flag = "mini-batch" if self.mini_batch else "restarts"
            raise InputError(
                f"--tokenizer.kmeans.{flag} works with --tokenizer.kmeans.assignment plain only: "
                "drop one of them"
            )

    @property
    def fit_precision(self) -> str:
        """Of the products while fitting, on the present backend."""
        if self.precision != "auto":
            return self.precision
        return "default" if jax.default_backend() == "gpu" else "highest"


@dataclasses.dataclass(frozen=True, eq=False)
class RQKMeans:
    """Fitted codebooks and the codes of the points they were fitted on."""

    codebooks: np.ndarray  # float32 [L, K, D]
    codes: np.ndarray  # int32 [N, L]; the balanced assignment if there is one, else the nearest
    levels: list[dict]
    """A level's log: inertia of every iteration, re-seeded and moved points, seconds."""


def fit_rq_kmeans(
    x_nd,
    *,
    levels: int,
    codebook_size: int,
    cfg: KMeansConfig | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    say: Callable[[str], None] = lambda line: None,
    consume: bool = False,
) -> RQKMeans:
    """Fits one codebook a level on the residuals of the levels before.

    Args:
      x_nd: float `[N, D]` with N >= codebook_size: NumPy (a memory map with `cfg.mini_batch`) or
        JAX.
      mesh: points are split over its devices; default: one device.
      say: takes lines of progress.
      consume: `x_nd` is a float32 JAX array that is not needed afterwards; the residuals take its
        place.

    Raises:
      InputError: the fit does not fit into the memory of the devices.
    """
    cfg, mesh = cfg or KMeansConfig(), mesh or make_mesh(data=1)
    keys = [jax.random.fold_in(jax.random.key(seed), level) for level in range(levels)]
    refuse_too_large(x_nd.shape, codebook_size, cfg, mesh)
    if cfg.mini_batch and cfg.mini_batch < x_nd.shape[0]:
        return _fit_mini_batch(x_nd, keys, codebook_size, cfg, seed, mesh, say)
    points = Points.place(x_nd, mesh, consume=consume)
    codebooks, codes, log = [], [], []
    for level, key in enumerate(keys):
        begin = time.perf_counter()
        say(f"level {level + 1} of {levels}: {codebook_size:,} centres, {points.valid:,} points")
        centres_kd, index_n, entry = _fit_level(points, key, codebook_size, cfg, say)
        points.subtract(centres_kd, index_n)
        codebooks.append(np.asarray(centres_kd))
        codes.append(np.asarray(index_n)[: points.valid])
        log.append(entry | {"seconds": time.perf_counter() - begin})
    return RQKMeans(np.stack(codebooks), np.stack(codes, axis=1), log)


def _fit_level(points: Points, key, k: int, cfg: KMeansConfig, say):
    """Centres `[K, D]`, the centre of every point (padding included) and a log entry."""
    options = {"chunk": cfg.chunk, "say": say}
    if cfg.assignment == "plain":
        fits = []
        for restart in range(cfg.restarts):
            start_kd = start_centres(jax.random.fold_in(key, restart), points, k, cfg.init)
            fit = lloyd(
                points,
                start_kd,
                iterations=cfg.iterations,
                precision=cfg.fit_precision,
                **options,
            )
            out = assign(points, fit.centres_kd, chunk=cfg.chunk)
            total = float(jnp.where(points.known, out.distance_n, 0).sum())
            fits.append((total, restart, fit, out.index_n))
        total, _, fit, index_n = min(fits, key=lambda fit: fit[:2])
        entry = {"inertia": [*fit.inertia, total], "reseeded": fit.reseeded}
        return fit.centres_kd, index_n, entry
    start_kd = start_centres(jax.random.fold_in(key, 0), points, k, cfg.init)
    if cfg.assignment == "balanced":
        fit = market_kmeans(
            points,
            start_kd,
            iterations=cfg.iterations,
            slack=cfg.slack,
            precision=cfg.fit_precision,
            **options,
        )
    else:
        fit = sweep_kmeans(points, start_kd, seed=int(jax.random.key_data(key)[-1]), say=say)
    entry = {"inertia": fit.inertia, "moved": fit.moved}
    return fit.centres_kd, points.padded(fit.index_n, 0), entry


def _fit_mini_batch(x_nd, keys, k, cfg: KMeansConfig, seed, mesh, say):
    """As `fit_rq_kmeans`, with one batch of points on the devices at a time."""
    n = x_nd.shape[0]
    rng = np.random.default_rng(seed)
    codebooks, log = [], []

    def residuals(rows):
        points = Points.place(x_nd[rows], mesh)
        for centres_kd in codebooks:
            points.subtract(centres_kd, assign(points, centres_kd, chunk=cfg.chunk).index_n)
        return points

    def batches(rng):
        """Runs of neighbours in random order, of one size: an epoch may miss a few rows."""
        runs = rng.permutation(-(-n // min(RUN, cfg.mini_batch)))
        size = min(RUN, cfg.mini_batch)
        rows = (runs[:, None] * size + np.arange(size)).reshape(-1)
        rows = rows[rows < n]
        for begin in range(0, n - cfg.mini_batch + 1, cfg.mini_batch):
            yield residuals(np.sort(rows[begin : begin + cfg.mini_batch]))

    for level, key in enumerate(keys):
        begin = time.perf_counter()
        say(f"level {level + 1} of {len(keys)}: {k:,} centres, batches of {cfg.mini_batch:,}")
        sample = min(n, max(min(cfg.mini_batch, k * START_SAMPLE), k))
        sample = np.sort(rng.choice(n, sample, replace=False))
        fit = mini_batch_lloyd(
            batches,
            start_centres(key, residuals(sample), k, cfg.init),
            epochs=cfg.iterations,
            rng=rng,
            chunk=cfg.chunk,
            precision=cfg.fit_precision,
            say=say,
        )
        codebooks.append(fit.centres_kd)
        seconds = time.perf_counter() - begin
        log.append({"inertia": fit.inertia, "reseeded": fit.reseeded, "seconds": seconds})
    codebooks = np.stack([np.asarray(centres_kd) for centres_kd in codebooks])
    return RQKMeans(codebooks, encode(x_nd, codebooks, mesh=mesh, chunk=cfg.chunk), log)


def encode(x_nd, codebooks_lkd, *, mesh: Mesh | None = None, chunk: int = 0) -> np.ndarray:
    """Nearest codes of any points, int32 `[N, L]`, block by block, in float32."""
    mesh = mesh or make_mesh(data=1)
    n, d = x_nd.shape
    block = min(n, max(BLOCK_BYTES // (4 * d), 1))
    codes_nl = np.empty((n, len(codebooks_lkd)), np.int32)
    for begin in range(0, n, block):
        rows = slice(begin, min(begin + block, n))
        x_bd = x_nd[rows]
        if len(x_bd) < block:  # one shape, one compilation
            x_bd = np.pad(np.asarray(x_bd), ((0, block - len(x_bd)), (0, 0)))
        points = Points.place(x_bd, mesh)
        for level, centres_kd in enumerate(jnp.asarray(codebooks_lkd)):
            index_b = assign(points, centres_kd, chunk=chunk).index_n
            points.subtract(centres_kd, index_b)
            codes_nl[rows, level] = np.asarray(index_b)[: rows.stop - begin]
    return codes_nl


def decode(codes_nl, codebooks_lkd) -> np.ndarray:
    """The vectors that codes stand for, float32 `[N, D]`: the sum of their centres."""
    codebooks_lkd = np.asarray(codebooks_lkd)
    return sum(codebooks_lkd[level][codes_nl[:, level]] for level in range(len(codebooks_lkd)))


# ---------------------------------------------------------------------------------------- memory


def device_bytes(shape, codebook_size: int, cfg: KMeansConfig, devices: int = 1) -> int:
    """Estimate of the largest memory a device needs for a fit.

    Points, or a mini-batch of them; the sample of the start;
    distances and one-hot comparison of a chunk; centres, their sums and update.
    """
    (n, d), k = shape, codebook_size
    n = min(cfg.mini_batch or n, n)
    rows = -(-n // devices)
    sample = min(n, k * START_SAMPLE) if cfg.init == "k-means++" else k
    chunk = min(cfg.chunk or default_chunk(k), rows)
    start = sample * (d + 2) + sample * 128
    work = 2 * chunk * k + 2 * chunk * (d + 2)
    return 4 * (rows * (d + 4) + max(start, work) + 6 * k * (d + 2))


def refuse_too_large(shape, codebook_size: int, cfg: KMeansConfig, mesh: Mesh) -> None:
    """Refuses a fit that the devices' memory cannot hold, where they tell how much they have.

    Raises:
      InputError: with the estimate and the flags to change.
    """
    stats = mesh.devices.flat[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    need = device_bytes(shape, codebook_size, cfg, mesh.devices.size)
    if limit and need > limit:
        raise InputError(too_large(shape, codebook_size, cfg, mesh, f"has {limit / 1e9:.1f} GB"))


def too_large(shape, codebook_size: int, cfg: KMeansConfig, mesh: Mesh, have: str) -> str:
    """One line on memory, for an InputError."""
    need = device_bytes(shape, codebook_size, cfg, mesh.devices.size) / 1e9
    chunk = cfg.chunk or default_chunk(codebook_size)
    return (
        f"k-means of {shape[0]:,} x {shape[1]} points with {codebook_size:,} centres needs about "
        f"{need:.1f} GB a device, which {have}: lower --tokenizer.kmeans.chunk (now {chunk:,}), "
        "use more devices or set --tokenizer.kmeans.mini-batch"
    )
