"""A table of item pairs: looking pairs up, and its file."""

import dataclasses
import functools
import os
import pathlib

import numpy as np
import polars as pl
import scipy.sparse as sp

from onerec_jax.data.schema import Dataset, one_line, refuse_rows
from onerec_jax.errors import InputError

KINDS = ("swing", "user-to-item")
"""Names of the kinds; `ItemPairs.kind` counts in them."""


@dataclasses.dataclass(frozen=True, eq=False)
class ItemPairs:
    """P ordered pairs of different items; both kinds may name the same pair."""

    first: np.ndarray  # int32 [P], item row: the item, or the target
    second: np.ndarray  # int32 [P], item row: its neighbour, or what the user liked before
    score: np.ndarray  # float32 [P], Swing score or cosine: comparable within a kind only
    kind: np.ndarray  # uint8 [P], place in KINDS

    def __len__(self) -> int:
        return len(self.first)

    @functools.cached_property
    def _known(self) -> tuple[np.ndarray, sp.csr_array]:
        """The pairs as `_lookup` makes them."""
        return _lookup(self.first, self.second)

    @functools.cached_property
    def _known_symmetric(self) -> tuple[np.ndarray, sp.csr_array]:
        """The pairs in both orders."""
        first = np.concatenate([self.first, self.second])
        return _lookup(first, np.concatenate([self.second, self.first]))

    def contains(self, first, second, *, symmetric: bool = True) -> np.ndarray:
        """Whether (first, second) is a pair of any kind.

        `contains(i[:, None], j[None, :])` says of a whole batch which negatives are none, and takes
        a quick way for it: under a millisecond for 1024 by 1024.

        Args:
          first, second: item rows, int, of shapes that broadcast; a negative row is in no pair.
          symmetric: whether (second, first) will do.

        Returns:
          bool, of the common shape.
        """
        keys, matrix = self._known_symmetric if symmetric else self._known
        first, second = np.asarray(first, np.int64), np.asarray(second, np.int64)
        if first.ndim == second.ndim == 2 and first.shape[1] == second.shape[0] == 1:
            last = matrix.shape[0] - 1  # of no item, so for all rows that the pairs lack
            first, second = (
                np.where((rows < 0) | (rows > last), last, rows).ravel() for rows in (first, second)
            )
            return matrix[first][:, second].toarray()
        wanted = first << 32 | second
        return keys[np.searchsorted(keys, wanted)] == wanted

    def save(self, path: os.PathLike | str, dataset: Dataset) -> None:
        """Writes Parquet with `item_id`, `other_id`, `score` and `kind` (its name).

        The file appears whole or not at all and replaces an older one.

        Raises:
          InputError: it cannot be written.
        """
        path, ids = pathlib.Path(path), dataset.items["item_id"]
        frame = pl.DataFrame(
            {
                "item_id": ids.gather(self.first),
                "other_id": ids.gather(self.second),
                "score": pl.Series(self.score, dtype=pl.Float32),
                "kind": pl.Series(KINDS).gather(self.kind),
            }
        )
        tmp = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            frame.write_parquet(tmp)
            os.replace(tmp, path)
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise InputError(
                f"{path}: cannot be written ({reason}); choose another path"
            ) from error

    @classmethod
    def load(cls, path: os.PathLike | str, dataset: Dataset) -> "ItemPairs":
        """Reads a file of `save`, or one of your own with the same columns.

        Raises:
          InputError: no such file or no Parquet; a column missing or of another type; no pairs; an
            item that `dataset` lacks, a pair of an item with itself, a score that is no number or
            an unknown kind, each with its row, counted from 1.
        """
        if not pathlib.Path(path).is_file():
            raise InputError(f"{path}: no such file; check the path, or mine the pairs first")
        try:
            frame = pl.read_parquet(path, glob=False)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise InputError(
                f"{path}: unreadable Parquet ({one_line(error)}); mine the pairs again"
            ) from error
        for column in ("item_id", "other_id", "score", "kind"):
            if column not in frame.columns:
                raise InputError(f"{path}: column {column} is missing; add it")
        if frame.is_empty():
            raise InputError(f"{path}: holds no pairs; mine them again with other --pairs flags")
        for column, fits, wanted in (
            ("score", frame["score"].dtype.is_numeric(), "numbers"),
            ("kind", frame["kind"].dtype in (pl.String, pl.Categorical, pl.Enum), "strings"),
        ):
            if not fits:
                raise InputError(
                    f"{path}, column {column}: must be {wanted}, not {frame[column].dtype}; "
                    "convert it"
                )
        first = _rows_of(frame["item_id"], dataset, str(path))
        second = _rows_of(frame["other_id"], dataset, str(path))
        refuse_rows(first == second, frame["item_id"], str(path), "is paired with itself", "item")
        score = frame["score"].cast(pl.Float32)
        finite = score.is_finite().fill_null(False)
        refuse_rows(~finite, frame["score"], str(path), "is no finite number")
        names = frame["kind"].cast(pl.String)
        known = names.is_in(KINDS).fill_null(False)
        refuse_rows(~known, names, str(path), f"is none of {', '.join(KINDS)}")
        kind = names.replace_strict(KINDS, range(len(KINDS)), return_dtype=pl.UInt8)
        return cls(first.to_numpy(), second.to_numpy(), score.to_numpy(), kind.to_numpy())


def _lookup(first, second) -> tuple[np.ndarray, sp.csr_array]:
    """Pairs as sorted int64 keys, the last one of no pair, and as a bool matrix, the same."""
    keys = np.sort(first.astype(np.int64) << 32 | second)
    keys = keys[np.append(True, keys[1:] != keys[:-1])] if len(keys) else keys
    first, second = keys >> 32, keys & 0xFFFFFFFF
    size = int(max(first.max(initial=-1), second.max(initial=-1))) + 2
    matrix = sp.csr_array((np.ones(len(keys), bool), (first, second)), shape=(size, size))
    return np.append(keys, np.iinfo(np.int64).max), matrix


def _rows_of(values: pl.Series, dataset: Dataset, file: str) -> pl.Series:
    """Item rows (int32) of ids.

    Raises:
      InputError: ids of another type than the data set's, or one that it lacks.
    """
    ids, given = dataset.items["item_id"], values
    if given.dtype.is_integer():
        given = given.cast(pl.Int64, strict=False)
    elif given.dtype in (pl.Categorical, pl.Enum):
        given = given.cast(pl.String)
    if given.dtype != ids.dtype:
        raise InputError(
            f"{file}, column {values.name}: ids are {values.dtype}, but {ids.dtype} in data set "
            f"'{dataset.name}'; convert the column"
        )
    rows = given.replace_strict(ids, pl.int_range(len(ids), eager=True), default=None)
    refuse_rows(rows.is_null(), values, file, f"is no item of data set '{dataset.name}'")
    return rows.cast(pl.Int32)
