"""What items are like, as vectors: read, computed from text, or compressed from several of each."""

import dataclasses
from collections.abc import Callable

import numpy as np

from onerec_jax.data.schema import Dataset
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.alignment import Aligner
from onerec_jax.tokenizer.config import Files, TokenizerConfig
from onerec_jax.tokenizer.text import TfidfEncoder, load_sentence_encoder
from onerec_jax.tokenizer.vectors import ItemTokens, load_tokens, load_vectors

Say = Callable[[str], None]


def read_content(dataset: Dataset, cfg: TokenizerConfig, files: Files, fit_rows, say: Say, known):
    """Vectors or tokens of all items, from what there is.

    Args:
      known: the encoder that was fitted earlier, for an extension.

    Returns:
      float32 `[I, D]` or `ItemTokens`; a description for the manifest; the encoder if it was fitted
      here.

    Raises:
      InputError: no text and no files; unreadable files.
    """
    ids = dataset.items["item_id"]
    if files.vectors is not None and files.tokens is not None:
        raise InputError("--vectors and --tokens both say what the items are like: give one")
    if files.vectors is not None:
        mmap = cfg.kmeans.mini_batch > 0 and files.vectors.suffix == ".npy" and cfg.align == "off"
        vectors = load_vectors(files.vectors, ids, mmap=mmap)
        return vectors, {"kind": "vectors", "file": str(files.vectors)}, None
    if files.tokens is not None:
        tokens = load_tokens(files.tokens, ids)
        return tokens, {"kind": "tokens", "file": str(files.tokens)}, None
    if "text" not in dataset.items.columns:
        raise InputError(
            f"the items of data set '{dataset.name}' have no column 'text': "
            "give item vectors by --vectors file.npy"
        )
    texts = dataset.items["text"].to_list()
    if cfg.text == "tfidf":
        encoder = known or TfidfEncoder.fit(texts, fit_rows, dim=cfg.text_dim, seed=cfg.seed)
        vectors = encoder.encode(texts)
        return vectors, {"kind": "tfidf", "fingerprint": encoder.fingerprint}, encoder
    model = load_sentence_encoder(cfg.text, say=say)
    origin = {"kind": "sentence", "model": cfg.text, "fingerprint": model.fingerprint}
    if cfg.align == "off":
        return model.vectors(texts, say=say), origin, None
    return model.tokens(texts, max_tokens=cfg.text_tokens, say=say), origin, None


def describe(content: dict, aligned: bool) -> str:
    """The content in words."""
    words = {
        "tfidf": "TF-IDF + truncated SVD of the item text",
        "sentence": f"{content.get('model')} of the item text",
        "vectors": f"vectors of {content.get('file')}",
        "tokens": f"tokens of {content.get('file')}",
    }[content["kind"]]
    return words + (", compressed and aligned with item pairs" if aligned else "")


def flat(content, aligner: Aligner | None) -> np.ndarray:
    """What is quantised: float `[I, D]`, of unit length if it comes from tokens."""
    if aligner is not None:
        tokens = content if isinstance(content, ItemTokens) else ItemTokens.from_vectors(content)
        return aligner.encode(tokens).reshape(len(tokens.lengths), -1)
    return content.pooled() if isinstance(content, ItemTokens) else content


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of a matrix on disk, read when they are asked for."""

    x_nd: np.ndarray
    index: np.ndarray

    @property
    def shape(self):
        return len(self.index), self.x_nd.shape[1]

    def __getitem__(self, rows):
        return self.x_nd[self.index[rows]]
