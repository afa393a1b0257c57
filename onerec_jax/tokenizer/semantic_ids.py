"""The table of semantic IDs: item <-> ID in both directions, on disk and in memory."""

import dataclasses
import functools
import hashlib
import json
import pathlib

import numpy as np

from onerec_jax.errors import InputError
from onerec_jax.files import atomic_folder

MIN_CODEBOOK, MAX_CODEBOOK = 16, 8192


def default_codebook_size(num_items: int) -> int:
    """The power of two at or above the root of the catalogue: 128 for 9,000 items.

    It reaches the published 8192 at 67 million items.
    """
    size = 2 ** int(np.ceil(np.log2(max(num_items, 1) ** 0.5)))
    return int(np.clip(size, MIN_CODEBOOK, MAX_CODEBOOK))


@dataclasses.dataclass(frozen=True)
class SemanticIds:
    """Codes of every item, with the codebooks that made them."""

    sids: np.ndarray  # int32 [items, levels], row = item row
    codebooks: np.ndarray  # float32 [levels, codebook_size, D]
    manifest: dict
    """Data set fingerprint, origin of the vectors, seed, settings, quality."""

    @property
    def levels(self) -> int:
        return self.sids.shape[1]

    @property
    def codebook_size(self) -> int:
        return self.codebooks.shape[1]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any code."""
        table = np.ascontiguousarray(self.sids, "<i4")
        return hashlib.sha256(f"{self.codebook_size}".encode() + table.tobytes()).hexdigest()[:16]

    @functools.cached_property
    def _unique(self):
        return np.unique(self.sids, axis=0, return_inverse=True)

    @property
    def leaf_sids(self) -> np.ndarray:
        """Distinct IDs in lexicographic order, int32 `[leaves, levels]`: the leaves of the trie."""
        return self._unique[0]

    @property
    def leaf_of_item(self) -> np.ndarray:
        """Leaf of every item, int32 `[items]`."""
        return self._unique[1].reshape(-1).astype(np.int32)

    def find(self, sids: np.ndarray) -> np.ndarray:
        """Leaf of each ID, int `[..., levels]` -> int32 `[...]`; -1 where no item has it."""
        radix = self.codebook_size ** np.arange(self.levels - 1, -1, -1, dtype=np.int64)
        known = self.leaf_sids @ radix
        sids = np.asarray(sids, np.int64)
        key = sids @ radix
        place = np.minimum(np.searchsorted(known, key), len(known) - 1)
        codes = (sids >= 0) & (sids < self.codebook_size)  # others would alias a neighbour
        legal = (known[place] == key) & codes.all(-1)
        return np.where(legal, place, -1).astype(np.int32)

    def items_by_leaf(self, tie_order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items of every leaf in serving order.

        Items that share an ID are equally probable; they come in `tie_order` (by popularity, then
        by lower item row), as equal scores do for every other model.

        Returns:
          offsets int64 `[leaves + 1]` and items int32 `[items]`, a CSR list.
        """
        items = np.lexsort((tie_order, self.leaf_of_item)).astype(np.int32)
        counts = np.bincount(self.leaf_of_item, minlength=len(self.leaf_sids))
        return np.concatenate([[0], np.cumsum(counts)]), items

    def save(self, folder: pathlib.Path) -> None:
        """Writes the table; the folder appears whole or not at all."""
        with atomic_folder(folder) as tmp:
            np.save(tmp / "sids.npy", self.sids)
            np.save(tmp / "codebooks.npy", self.codebooks)
            (tmp / "semantic_ids.json").write_text(json.dumps(self.manifest, indent=1))

    @classmethod
    def load(cls, folder: pathlib.Path) -> "SemanticIds":
        """Reads a table.

        Raises:
          InputError: the folder is missing or incomplete.
        """
        folder = pathlib.Path(folder)
        try:
            manifest = json.loads((folder / "semantic_ids.json").read_text())
            return cls(np.load(folder / "sids.npy"), np.load(folder / "codebooks.npy"), manifest)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"{folder} holds no semantic IDs ({error}): make them with "
                "`python -m experiments.tokenize`"
            ) from error


def quality(sids, codebook_size, vectors, reconstruction) -> dict:
    """How good a table is.

    Returns:
      `reconstruction_loss` (mean squared error a dimension), per level `utilisation` (share of the
      codebook in use) and `entropy` (nats), `distinct_ids`, `collision_rate` (1 - distinct /
      items) and `largest_collision` (items on one ID). Report, section 4.4; spec 2.3.
    """
    _, counts = np.unique(sids, axis=0, return_counts=True)
    utilisation, entropy = [], []
    for level in range(sids.shape[1]):
        share = np.bincount(sids[:, level], minlength=codebook_size) / len(sids)
        used = share[share > 0]
        utilisation.append(float(len(used) / codebook_size))
        entropy.append(float(-(used * np.log(used)).sum()))
    return {
        "reconstruction_loss": float(((vectors - reconstruction) ** 2).mean()),
        "utilisation": utilisation,
        "entropy": entropy,
        "distinct_ids": len(counts),
        "collision_rate": float(1 - len(counts) / len(sids)),
        "largest_collision": int(counts.max()),
    }
