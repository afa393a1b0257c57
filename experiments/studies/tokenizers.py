"""Plain, balanced and learned codes side by side: `python -m experiments.studies.tokenizers`.

The comparison of OneRec Technical Report (arXiv 2506.13695), Table 11, on your own vectors:
residual k-means as it is, balanced in two ways, faiss' if it is installed, and RQ-VAE in several
designs. Every method is fitted on nine tenths of the items and read on all of them and on the tenth
that it has not seen, with several seeds.

    python -m experiments.studies.tokenizers --vectors Beauty.minilm-l6-v2.f16.npy
"""

import dataclasses
import gzip
import json
import pathlib
import re
import time
from collections.abc import Callable

import numpy as np
import rich.console
import rich.table

from onerec_jax import cli
from onerec_jax.errors import InputError
from onerec_jax.files import write_text
from onerec_jax.tokenizer import report
from onerec_jax.tokenizer.rq_kmeans import KMeansConfig, decode, encode, fit_rq_kmeans
from onerec_jax.tokenizer.rq_vae import RQVAEConfig
from onerec_jax.tokenizer.rq_vae_training import fit_rq_vae

THREE_LAYERS = RQVAEConfig(
    hidden=(512, 256, 128),
    activation="relu",
    skip=False,
    weight_decay=0.0,
    batch_size=256,
    quantiser_weight=0.2,
    warmup_epochs=20,
    epochs=60,
)
RQ_VAES = {
    # As TIGER prints it: its optimizer and latent width.
    "TIGER": dataclasses.replace(
        THREE_LAYERS,
        latent=32,
        codebook="gradient",
        quantiser_weight=1.0,
        optimizer="adagrad",
        learning_rate=0.4,
        batch_size=1024,
        warmup_epochs=0,
        epochs=250,
    ),
    "latent 32": dataclasses.replace(THREE_LAYERS, latent=32, epochs=100),
    "latent 64": dataclasses.replace(THREE_LAYERS, latent=64),
    # One linear map each way: what is learned is the metric of the codes.
    "linear": dataclasses.replace(THREE_LAYERS, hidden=(), latent=384, warmup_epochs=0),
    "wide": RQVAEConfig(),
}
"""Designs of RQ-VAE, from the smallest latent to the widest; see docs/tokenizer.md."""


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Compare tokenizers on the same item vectors."""

    vectors: pathlib.Path
    """.npy [items, D]."""
    levels: int = 3
    codebook_size: int = 256
    iterations: int = 25
    seeds: int = 3
    held_out: float = 0.1
    """Share of the items that nothing is fitted on."""
    rq_vae: tuple[str, ...] = tuple(RQ_VAES)
    """Designs of RQ-VAE to train, by name."""
    published: pathlib.Path | None = None
    """A published index, .json[.gz] {item: [token, …]}, whose use of codes is shown beside."""
    out: pathlib.Path = pathlib.Path("runs/studies/tokenizers")


@dataclasses.dataclass(frozen=True)
class Coded:
    """What a method makes of all items."""

    codes: np.ndarray  # int32 [N, L]
    vectors: np.ndarray  # float32 [N, D], what the codes stand for
    seconds: float
    nearest: tuple[np.ndarray, np.ndarray] | None = None  # the same of nearest centres


def kmeans(**changes) -> Callable:
    """A method: residual k-means with these settings."""

    def method(x_nd, fit_rows, config: StudyConfig, seed: int) -> Coded:
        cfg = KMeansConfig(iterations=config.iterations, **changes)
        begin = time.perf_counter()
        fit = fit_rq_kmeans(
            x_nd[fit_rows], levels=config.levels, codebook_size=config.codebook_size,
            cfg=cfg, seed=seed,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        nearest = encode(x_nd, fit.codebooks)
        codes = nearest.copy()
        codes[fit_rows] = fit.codes
        both = [(c, decode(c, fit.codebooks)) for c in (codes, nearest)]
        return Coded(*both[0], seconds, None if cfg.assignment == "plain" else both[1])

    return method


def faiss_kmeans(x_nd, fit_rows, config: StudyConfig, seed: int) -> Coded:
    """Residual k-means by faiss-cpu, from random points."""
    import faiss

    begin = time.perf_counter()
    rest, codes, seconds = x_nd.copy(), [], 0.0
    for level in range(config.levels):
        begin = time.perf_counter()
        fit = faiss.Kmeans(
            x_nd.shape[1], config.codebook_size, niter=config.iterations,
            seed=seed * config.levels + level + 1, max_points_per_centroid=len(x_nd),
        )  # fmt: skip
        fit.train(rest[fit_rows])
        seconds += time.perf_counter() - begin
        _, index = fit.index.search(rest, 1)
        rest -= fit.centroids[index[:, 0]]
        codes.append(index[:, 0])
    return Coded(np.stack(codes, axis=1).astype(np.int32), x_nd - rest, seconds)


def rq_vae(name: str) -> Callable:
    """A method: RQ-VAE of one design."""

    def method(x_nd, fit_rows, config: StudyConfig, seed: int) -> Coded:
        begin = time.perf_counter()
        fit = fit_rq_vae(
            x_nd[fit_rows], levels=config.levels, codebook_size=config.codebook_size,
            cfg=RQ_VAES[name], seed=seed,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        return Coded(*fit.encode(x_nd), seconds)

    return method


def measure(x_nd, codes_nl, vectors_nd, fit_rows, size: int) -> dict:
    """Numbers of one reading of the codes."""
    error_n = ((x_nd - vectors_nd).astype(np.float64) ** 2).mean(1)
    new = np.setdiff1d(np.arange(len(x_nd)), fit_rows)
    usage, ids = report.code_usage(codes_nl, size), report.id_usage(codes_nl, size)
    near = report.neighbours_kept(
        x_nd, np.arange(len(x_nd))[:, None], lambda r: vectors_nd[r[:, 0]]
    )
    return {
        "loss": float(error_n[fit_rows].mean()),
        "loss_new": float(error_n[new].mean()) if len(new) else None,
        "utilisation": usage["utilisation"],
        "entropy": usage["entropy"],
        "distinct_ids": ids["distinct_ids"],
        "largest_collision": ids["largest_collision"],
        "neighbours_kept": near,
    }


def published_usage(path: pathlib.Path) -> dict:
    """Use of codes and collisions of a published index; its codes are numbered by level."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        index = json.load(file)
    tokens = [[int(re.search(r"\d+", token)[0]) for token in item] for item in index.values()]
    codes_nl = np.array(tokens, np.int32)
    size = int(codes_nl.max()) + 1
    return {
        "items": len(codes_nl),
        "codebook_size": size,
        **report.code_usage(codes_nl, size),
        **report.id_usage(codes_nl, size),
    }


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: the mean over seeds and, in brackets, the range."""
    header = ["method", "loss x 1e4", "new items", "used", "entropy 1", "entropy 2", "entropy 3"]
    header += ["IDs", "largest", "neighbours", "s"]

    def cell(values, pattern):
        mean, low, high = np.mean(values), np.min(values), np.max(values)
        text = pattern.format(mean)
        return (
            text if len(values) == 1 else f"{text} [{pattern.format(low)}, {pattern.format(high)}]"
        )

    cells = []
    for row in rows:
        runs = row["seeds"]
        entropy = [[run["entropy"][level] for run in runs] for level in range(3)]
        new = [run["loss_new"] for run in runs]
        cells.append(
            [
                row["method"],
                cell([1e4 * run["loss"] for run in runs], "{:.2f}"),
                "" if None in new else cell([1e4 * value for value in new], "{:.2f}"),
                cell([100 * np.mean(run["utilisation"]) for run in runs], "{:.1f}%"),
                *(cell(values, "{:.2f}") for values in entropy),
                cell([run["distinct_ids"] for run in runs], "{:,.0f}"),
                cell([run["largest_collision"] for run in runs], "{:.0f}"),
                cell([100 * run["neighbours_kept"] for run in runs], "{:.1f}%"),
                cell([run["seconds"] for run in runs], "{:.1f}"),
            ]
        )
    return header, cells


def main(config: StudyConfig) -> None:
    """Fit, measure, print and write."""
    if unknown := set(config.rq_vae) - set(RQ_VAES):
        raise InputError(f"--rq-vae {min(unknown)}: choose of {', '.join(RQ_VAES)}")
    if config.levels != 3:
        raise InputError(f"--levels {config.levels}: the table is made for 3")
    x_nd = np.load(config.vectors).astype(np.float32)
    methods: dict[str, Callable] = {
        "RQ-k-means, plain": kmeans(),
        "RQ-k-means, plain, random start": kmeans(init="random"),
        "RQ-k-means, balanced": kmeans(assignment="balanced"),
        "RQ-k-means, sweep (V0 Algorithm 1)": kmeans(assignment="sweep"),
        "faiss-cpu residual k-means": faiss_kmeans,
        **{f"RQ-VAE, {name}": rq_vae(name) for name in config.rq_vae},
    }
    rows = []
    for name, method in methods.items():
        row, nearest = {"method": name, "seeds": []}, {"method": "  read by nearest", "seeds": []}
        for seed in range(config.seeds):
            rng = np.random.default_rng(seed)
            count = round(len(x_nd) * (1 - config.held_out))
            fit_rows = np.sort(rng.choice(len(x_nd), count, replace=False))
            try:
                coded = method(x_nd, fit_rows, config, seed)
            except ImportError as error:
                print(f"{name}: left out, {error.name} is not installed")
                break
            parts = [(row, coded.codes, coded.vectors)]
            if coded.nearest is not None:
                parts.append((nearest, *coded.nearest))
            for target, codes_nl, vectors_nd in parts:
                numbers = measure(x_nd, codes_nl, vectors_nd, fit_rows, config.codebook_size)
                target["seeds"].append(numbers | {"seconds": coded.seconds})
            print(f"{name}, seed {seed}: loss {row['seeds'][-1]['loss']:.6g}", flush=True)
        rows += [part for part in (row, nearest) if part["seeds"]]

    header, cells = table(rows)
    shown = rich.table.Table(title=f"{len(x_nd):,} x {x_nd.shape[1]}, {config.seeds} seeds")
    for column in header:
        shown.add_column(column)
    for line in cells:
        shown.add_row(*line)
    rich.console.Console(width=200).print(shown)
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(line) + " |" for line in cells]
    result = {"config": dataclasses.asdict(config), "rows": rows}
    if config.published is not None:
        usage = result["published"] = published_usage(config.published)
        entropy = ", ".join(f"{value:.2f}" for value in usage["entropy"])
        words = (
            f"{config.published.name}: {usage['distinct_ids']:,} IDs of {usage['items']:,} items "
            f"with {usage['codebook_size']} codes a level; entropy by level {entropy}; "
            f"codes used {', '.join(f'{value:.1%}' for value in usage['utilisation'])}"
        )
        print(words)
        lines += ["", words]
    config.out.mkdir(parents=True, exist_ok=True)
    write_text(config.out / "report.json", json.dumps(result, indent=1, default=str) + "\n")
    write_text(config.out / "report.md", "\n".join(lines) + "\n")
    print(f"written to {config.out}")


if __name__ == "__main__":
    cli.run(main, StudyConfig, prog="python -m experiments.studies.tokenizers")
