"""A data set to semantic IDs: vectors, codebooks on training items, codes for every item."""

import dataclasses
import pathlib
from typing import Literal

import numpy as np

from onerec_jax.data.schema import Dataset
from onerec_jax.data.splits import item_popularity, make_split
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.tokenizer.rq_kmeans import encode, fit_rq_kmeans, spread_last_level
from onerec_jax.tokenizer.semantic_ids import SemanticIds, default_codebook_size, quality
from onerec_jax.tokenizer.text import tfidf_vectors


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Settings of residual k-means (spec: OneRec Technical Report, section 2.1.2)."""

    levels: int = 3
    codebook_size: int = 0
    """Codes a level; 0 picks a power of two at or above the root of the catalogue."""
    iterations: int = 25
    """Lloyd iterations a level."""
    text_dim: int = 256
    """Width of the TF-IDF + SVD vectors; given vectors keep theirs."""
    collisions: Literal["spread", "keep"] = "spread"
    """spread: items that would share an ID take the nearest free codes of the last level."""
    seed: int = 0

    def __post_init__(self):
        require_at_least(self, "tokenizer.", levels=1, iterations=1, text_dim=1)
        require_at_least(self, "tokenizer.", codebook_size=0, seed=0)


def load_vectors(path: pathlib.Path, num_items: int) -> np.ndarray:
    """Given item vectors, float `[items, D]` in the order of the items table.

    Raises:
      InputError: no such file, not a matrix, wrong number of rows, NaN.
    """
    try:
        vectors = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"--vectors {path}: cannot be read ({error}): give a .npy file") from error
    if not isinstance(vectors, np.ndarray) or vectors.dtype.kind not in "fiu":
        raise InputError(f"--vectors {path}: holds no array of numbers: give a .npy file")
    if vectors.ndim != 2 or len(vectors) != num_items:
        raise InputError(
            f"--vectors {path}: shape {vectors.shape}, but the data set has {num_items} items: "
            "give one row an item, in the order of items.parquet"
        )
    vectors = vectors.astype(np.float32)
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
        raise InputError(f"--vectors {path}: row {row} is not finite: mend or drop the item")
    return vectors


def tokenize(
    dataset: Dataset, cfg: TokenizerConfig, vectors_file: pathlib.Path | None = None
) -> SemanticIds:
    """Fits codebooks on the items of the training part and codes all items.

    Raises:
      InputError: no text and no vectors; more codes than training items; unreadable vectors.
    """
    popularity = item_popularity(dataset, make_split(dataset))
    fit_rows = np.flatnonzero(popularity > 0)
    if vectors_file is not None:
        vectors, origin = load_vectors(vectors_file, dataset.num_items), str(vectors_file)
    elif "text" in dataset.items.columns:
        vectors = tfidf_vectors(
            dataset.items["text"].to_list(), fit_rows, dim=cfg.text_dim, seed=cfg.seed
        )
        origin = "TF-IDF + truncated SVD of the item text"
    else:
        raise InputError(
            f"the items of data set '{dataset.name}' have no column 'text': "
            "give item vectors by --vectors file.npy"
        )
    size = cfg.codebook_size or min(default_codebook_size(dataset.num_items), len(fit_rows))
    if size > len(fit_rows):
        raise InputError(
            f"--tokenizer.codebook-size {size} is larger than the {len(fit_rows)} training items "
            f"of data set '{dataset.name}': lower it"
        )
    codebooks = fit_rq_kmeans(
        vectors[fit_rows],
        levels=cfg.levels,
        codebook_size=size,
        iterations=cfg.iterations,
        seed=cfg.seed,
    )
    codes, reconstruction = encode(vectors, codebooks)
    report = quality(codes, size, vectors, reconstruction)
    if cfg.collisions == "spread":
        codes = spread_last_level(vectors, codes, codebooks, -popularity)
        reconstruction = sum(codebooks[i][codes[:, i]] for i in range(cfg.levels))
        report = {
            **quality(codes, size, vectors, reconstruction),
            "before_spreading": report,
        }
    manifest = {
        "dataset": dataset.name,
        "dataset_fingerprint": dataset.fingerprint,
        "vectors": origin,
        "settings": dataclasses.asdict(dataclasses.replace(cfg, codebook_size=size)),
        "fitted_items": len(fit_rows),
        "items": dataset.num_items,
        "quality": report,
    }
    return SemanticIds(codes, codebooks, manifest)
