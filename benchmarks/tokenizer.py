"""Speed of residual k-means: `python -m benchmarks.tokenizer`.

    python -m benchmarks.tokenizer --vectors Beauty.minilm-l6-v2.f16.npy --codebook-size 256
    python -m benchmarks.tokenizer --points 10_000_000 --width 512 --codebook-size 8192   # a GPU

Ours and, where it is installed, faiss-cpu: the same points, centres, iterations and restarts, in
one process, one after the other. Compiling is timed apart, by fitting once with one iteration.
Without --vectors the points are a mixture of Gaussians drawn on the device.
"""

import dataclasses
import json
import pathlib
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from onerec_jax import cli
from onerec_jax.files import write_text
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer.nearest import Points, assign, default_chunk
from onerec_jax.tokenizer.rq_kmeans import KMeansConfig, fit_rq_kmeans

PEAK_PRODUCT = 8192
"""Side of the square matrix product whose speed is the ceiling."""


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Time residual k-means beside faiss."""

    vectors: pathlib.Path | None = None
    """.npy [points, width]; default: drawn on the device."""
    points: int = 50_000
    width: int = 384
    levels: int = 3
    codebook_size: int = 256
    kmeans: KMeansConfig = KMeansConfig(init="random")
    """faiss starts from random points; so do we unless told otherwise."""
    groups: int = 100_000
    """Gaussians of the mixture that is drawn."""
    repeats: int = 3
    """Timed fits, each with a seed of its own; the median time counts."""
    devices: int = 1
    faiss: bool = True
    """Compare with faiss-cpu if it is installed."""
    seed: int = 0
    out: pathlib.Path = pathlib.Path("runs/benchmarks/tokenizer.json")


def draw(config: BenchmarkConfig, mesh) -> jax.Array:
    """A mixture of Gaussians, float32 `[points, width]`, a block at a time."""
    n, d, groups = config.points, config.width, min(config.groups, config.points)
    block = min(n, 1 << 17)

    @jax.jit
    def generate(key):
        centre = jax.random.normal(jax.random.fold_in(key, 0), (groups, d))

        def fill(i, x_nd):
            begin = jnp.minimum(i * block, n - block)
            which, noise = jax.random.split(jax.random.fold_in(key, i + 1))
            group = jax.random.randint(which, (block,), 0, groups)
            x_bd = centre[group] + jax.random.normal(noise, (block, d))
            return jax.lax.dynamic_update_slice_in_dim(x_nd, x_bd, begin, 0)

        return jax.lax.fori_loop(0, -(-n // block), fill, jnp.zeros((n, d), jnp.float32))

    return jax.block_until_ready(generate(jax.random.key(config.seed)))


def fresh_points(config: BenchmarkConfig, mesh):
    """Points that a fit may consume."""
    if config.vectors is None:
        return draw(config, mesh)
    return jnp.asarray(np.load(config.vectors).astype(np.float32))


def fit_ours(config: BenchmarkConfig, mesh, iterations: int, seed: int):
    """One fit; seconds are those of start, iterations and final assignment."""
    x_nd = fresh_points(config, mesh)
    cfg = dataclasses.replace(config.kmeans, iterations=iterations)
    begin = time.perf_counter()
    fit = fit_rq_kmeans(
        x_nd, levels=config.levels, codebook_size=config.codebook_size, cfg=cfg, seed=seed,
        mesh=mesh, say=lambda line: print(line, flush=True), consume=True,
    )  # fmt: skip
    return fit, time.perf_counter() - begin


def fit_faiss(x_nd: np.ndarray, config: BenchmarkConfig, seed: int):
    """Residual k-means by faiss-cpu: inertia of the last level, and seconds."""
    import faiss

    rest = x_nd.copy()
    begin = time.perf_counter()
    for level in range(config.levels):
        kmeans = faiss.Kmeans(
            rest.shape[1], config.codebook_size, niter=config.kmeans.iterations,
            nredo=config.kmeans.restarts, seed=seed * config.levels + level + 1,
            max_points_per_centroid=len(rest),
        )  # fmt: skip
        kmeans.train(rest)
        _, index = kmeans.index.search(rest, 1)
        rest -= kmeans.centroids[index[:, 0]]
    return float((rest.astype(np.float64) ** 2).sum()), time.perf_counter() - begin


def product_ceiling(precision: str) -> float:
    """TFLOP/s of a large square product at this precision."""
    side = PEAK_PRODUCT if jax.default_backend() != "cpu" else 2048
    a, b = jax.random.normal(jax.random.key(1), (2, side, side))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    jax.block_until_ready(product(a, b))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(product(a, b))
        times.append(time.perf_counter() - begin)
    return 2 * side**3 / float(np.median(times)) / 1e12


def changed_by_precision(config: BenchmarkConfig, mesh, fit) -> list[float]:
    """Share of points, a level, that a product at the fitting precision sends elsewhere."""
    points = Points.place(fresh_points(config, mesh), mesh, consume=True)
    shares = []
    for centres_kd in jnp.asarray(fit.codebooks):
        exact = assign(points, centres_kd).index_n
        rough = assign(points, centres_kd, precision=config.kmeans.fit_precision).index_n
        shares.append(float(jnp.where(points.known, exact != rough, False).sum() / points.valid))
        points.subtract(centres_kd, exact)
    return shares


def peak_bytes(mesh) -> dict[str, int]:
    """Peak memory of this process so far: host, and the busiest device if it tells."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stats = [device.memory_stats() or {} for device in mesh.devices.flat]
    peak = max(stat.get("peak_bytes_in_use", 0) for stat in stats)
    return {"host": host} | ({"device": peak} if peak else {})


def main(config: BenchmarkConfig) -> None:
    """Fit, compare, print and write."""
    mesh = make_mesh(config.devices)
    if config.vectors is not None:
        shape = np.load(config.vectors, mmap_mode="r").shape
        config = dataclasses.replace(config, points=shape[0], width=shape[1])
    n, d, k = config.points, config.width, config.codebook_size
    device = mesh.devices.flat[0].device_kind
    print(f"{n:,} x {d}, {config.levels} x {k:,} codes, {config.kmeans}, {device}", flush=True)

    begin = time.perf_counter()
    fit_ours(config, mesh, 1, config.seed)
    compiled = time.perf_counter() - begin
    seeds = range(config.seed, config.seed + config.repeats)
    runs = [fit_ours(config, mesh, config.kmeans.iterations, seed) for seed in seeds]
    peak = peak_bytes(mesh)
    fit = runs[0][0]
    seconds = float(np.median([run[1] for run in runs]))
    passes = sum(len(level["inertia"]) for level in fit.levels)
    flops = 2 * n * d * k * passes
    losses = [run[0].levels[-1]["inertia"][-1] / n / d for run in runs]
    precision = config.kmeans.fit_precision
    result = {
        "device": device,
        "jax": jax.__version__,
        "config": dataclasses.asdict(config),
        "chunk": config.kmeans.chunk or default_chunk(k),
        "seconds": [run[1] for run in runs],
        "seconds_by_level": [level["seconds"] for level in fit.levels],
        "first_fit_of_one_iteration_s": compiled,
        "passes": passes,
        "tflops": flops / seconds / 1e12,
        "ceiling_tflops": {p: product_ceiling(p) for p in {precision, "highest"}},
        "mse": losses,
        "peak_bytes": peak,
        "changed_by_precision": changed_by_precision(config, mesh, fit),
    }
    rows = [("onerec_jax", seconds, losses)]
    if config.faiss and jax.default_backend() == "cpu":
        try:
            x_nd = np.asarray(fresh_points(config, mesh))
            theirs = [fit_faiss(x_nd, config, seed) for seed in seeds]
            result["faiss_seconds"] = [t for _, t in theirs]
            result["faiss_mse"] = [total / n / d for total, _ in theirs]
            median = float(np.median(result["faiss_seconds"]))
            result["seconds_over_faiss"] = seconds / median
            rows.append(("faiss-cpu", median, result["faiss_mse"]))
        except ImportError:
            print("faiss-cpu is not installed: pip install faiss-cpu to compare")

    table = rich.table.Table(title=f"{n:,} x {d}, {config.levels} x {k:,} codes, {device}")
    for name in ("", "seconds", "mean squared error [range over seeds]"):
        table.add_column(name, justify="right" if name else "left")
    for name, taken, error in rows:
        span = f"{np.mean(error):.6g} \\[{min(error):.6g}, {max(error):.6g}]"
        table.add_row(name, f"{taken:.2f}", span)
    rich.console.Console().print(table)
    ceilings = ", ".join(f"{p} {v:.1f}" for p, v in result["ceiling_tflops"].items())
    print(
        f"{result['tflops']:.2f} TFLOP/s over {passes} passes (a square product: {ceilings}); "
        f"first fit of one iteration, compiling included, {compiled:.1f} s"
    )
    print("assignments that the fitting precision changes, by level: ", end="")
    print(", ".join(f"{share:.3%}" for share in result["changed_by_precision"]))
    print("peak memory: " + ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in peak.items()))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.out, json.dumps(result, indent=1, default=str) + "\n")
    print(f"written to {config.out}")


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, prog="python -m benchmarks.tokenizer")
