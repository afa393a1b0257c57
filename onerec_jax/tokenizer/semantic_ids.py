"""The table of semantic IDs: item <-> ID in both directions, on disk and in memory."""

import dataclasses
import functools
import hashlib
import json
import pathlib

import numpy as np

from onerec_jax.errors import InputError
from onerec_jax.files import atomic_folder, file_hash

FORMAT = "onerec_jax semantic ids, version 2"
MIN_CODEBOOK, MAX_CODEBOOK = 16, 8192


def default_codebook_size(num_items: int) -> int:
    """The power of two at or above the root of the catalogue: 128 for 9,000 items.

    It reaches the published 8192 at 67 million items.
    """
    size = 2 ** int(np.ceil(np.log2(max(num_items, 1) ** 0.5)))
    return int(np.clip(size, MIN_CODEBOOK, MAX_CODEBOOK))


def sid_keys(sids, codebook_size: int) -> np.ndarray:
    """One int64 an ID, int `[..., levels]` -> `[...]`, in the same order as the IDs.

    Raises:
      InputError: there are more IDs than int64 holds.
    """
    levels = np.shape(sids)[-1]
    if codebook_size**levels >= 2**63:
        raise InputError(f"{levels} levels of {codebook_size} codes are too many: use fewer")
    radix = codebook_size ** np.arange(levels - 1, -1, -1, dtype=np.int64)
    return np.asarray(sids, np.int64) @ radix


@dataclasses.dataclass(frozen=True)
class SemanticIds:
    """Codes of every item, with the codebooks that made them."""

    sids: np.ndarray
    """int32 [items, levels], row = item row; a level more than codebooks if a code is appended."""
    codebooks: np.ndarray  # float32 [levels, codebook_size, D]
    manifest: dict
    """Data set fingerprint, origin of the vectors, settings, versions, quality."""
    codes: np.ndarray | None = None
    """int32 [items, levels], nearest codes, before balancing and before collisions are resolved."""
    item_ids: np.ndarray | None = None
    """int64 or string [items], ids of the items table in row order."""

    @property
    def levels(self) -> int:
        return self.sids.shape[1]

    @property
    def codebook_size(self) -> int:
        return self.codebooks.shape[1]

    @property
    def vectors(self) -> np.ndarray:
        """What the codes say of every item's content, float32 `[items, D]`: sums of centres."""
        codes = self.sids if self.codes is None else self.codes
        return sum(book[codes[:, level]] for level, book in enumerate(self.codebooks))

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any code."""
        table = np.ascontiguousarray(self.sids, "<i4")
        return hashlib.sha256(f"{self.codebook_size}".encode() + table.tobytes()).hexdigest()[:16]

    @functools.cached_property
    def _unique(self):
        _, first, leaf = np.unique(
            sid_keys(self.sids, self.codebook_size), return_index=True, return_inverse=True
        )
        return self.sids[first], leaf

    @property
    def leaf_sids(self) -> np.ndarray:
        """Distinct IDs in lexicographic order, int32 `[leaves, levels]`: the leaves of the trie."""
        return self._unique[0]

    @property
    def leaf_of_item(self) -> np.ndarray:
        """Leaf of every item, int32 `[items]`."""
        return self._unique[1].reshape(-1).astype(np.int32)

    @functools.cached_property
    def prefix_keys(self) -> list[np.ndarray]:
        """`sid_keys` of all prefixes of 1 to `levels` codes that some item has, ascending."""
        return [
            np.unique(sid_keys(self.leaf_sids[:, :level], self.codebook_size))
            for level in range(1, self.levels + 1)
        ]

    def find(self, sids: np.ndarray) -> np.ndarray:
        """Leaf of each ID, int `[..., levels]` -> int32 `[...]`; -1 where no item has it."""
        known = sid_keys(self.leaf_sids, self.codebook_size)
        sids = np.asarray(sids, np.int64)
        key = sid_keys(sids, self.codebook_size)
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

    def write(self, folder: pathlib.Path) -> None:
        """Writes the files of the table into an existing folder."""
        arrays = {"sids": self.sids, "codebooks": self.codebooks}
        optional = {"codes": self.codes, "item_ids": self.item_ids}
        arrays |= {name: array for name, array in optional.items() if array is not None}
        for name, array in arrays.items():
            if array.dtype == object:  # strings from polars, which NumPy would pickle
                array = array.astype(np.str_)
            np.save(folder / f"{name}.npy", array)
        manifest = self.manifest | {"format": FORMAT, "fingerprint": self.fingerprint}
        manifest["files"] = {f"{name}.npy": file_hash(folder / f"{name}.npy") for name in arrays}
        (folder / "semantic_ids.json").write_text(json.dumps(manifest, indent=1))

    def save(self, folder: pathlib.Path) -> None:
        """Writes the table; the folder appears whole or not at all."""
        with atomic_folder(folder) as tmp:
            self.write(tmp)

    @classmethod
    def load(cls, folder: pathlib.Path) -> "SemanticIds":
        """Reads a table.

        Raises:
          InputError: the folder is missing, incomplete, of another format, or its files are not
            those that were written together.
        """
        folder = pathlib.Path(folder)
        again = "make them with `python -m experiments.tokenize`"
        try:
            manifest = json.loads((folder / "semantic_ids.json").read_text())
            if manifest.get("format") != FORMAT:
                raise InputError(
                    f"{folder}: holds semantic IDs of the format '{manifest.get('format')}', not "
                    f"'{FORMAT}': {again}"
                )
            arrays = {}
            for name, digest in manifest["files"].items():
                if not (folder / name).is_file() or file_hash(folder / name) != digest:
                    raise InputError(
                        f"{folder / name}: is not the file that was written with "
                        f"semantic_ids.json: {again}"
                    )
                arrays[name.removesuffix(".npy")] = np.load(folder / name)
            ids = cls(**arrays, manifest=manifest)
        except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder} holds no semantic IDs ({error}): {again}") from error
        if ids.fingerprint != manifest.get("fingerprint"):
            raise InputError(f"{folder}: semantic_ids.json belongs to other codes: {again}")
        return ids
