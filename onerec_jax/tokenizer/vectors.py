"""What is known of every item: one vector, or one vector for each token of its text or media.

Item vectors come from a file of the user's (`load_vectors`, `load_tokens`) or from the item text
(`tokenizer/text.py`). Arrays are walked through in blocks of rows, so that checks and hashes of a
memory map cost no memory.

Rows of .npy and .npz files count from 0, as in NumPy; rows of Parquet files from 1, as elsewhere.
"""

import dataclasses
import hashlib
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
import polars as pl

from onerec_jax.data.schema import one_line, refuse_rows
from onerec_jax.errors import InputError

BLOCK_VALUES = 2**22
"""Numbers that a block of rows holds: 16 MiB of float32."""


@dataclasses.dataclass(frozen=True, eq=False)
class ItemTokens:
    """One vector for every token of an item, valid tokens first.

    Input of the alignment model (OneRec Technical Report, section 2.1.1), which compresses the
    tokens of an item into a few. What lies behind the last valid token has no meaning.
    """

    values: np.ndarray  # float16 or float32 [I, T, D]
    lengths: np.ndarray  # int32 [I], 0..T; 0 where nothing is known of the item

    @classmethod
    def from_vectors(cls, x: np.ndarray) -> "ItemTokens":
        """One token an item (T = 1); a zero row counts as an item of which nothing is known.

        Args:
          x: float `[I, D]`; float16 and float32 are kept, others become float32.
        """
        x = x if x.dtype in (np.float16, np.float32) else x.astype(np.float32)
        known = [(x[rows] != 0).any(1) for rows in _blocks(x)]
        return cls(x[:, None], np.concatenate([*known, []]).astype(np.int32))

    @classmethod
    def load(cls, path, item_ids: pl.Series) -> "ItemTokens":
        """`load_tokens`: a file of `save` or of the user's."""
        return load_tokens(path, item_ids)

    def save(self, path, item_ids: pl.Series | None = None) -> None:
        """Writes .npz with `values`, `lengths` and, if given, `item_ids`; whole or not at all."""
        path = pathlib.Path(path)
        arrays = {"values": self.values, "lengths": self.lengths}
        if item_ids is not None:
            # Fixed-width strings: NumPy writes object arrays as pickles only.
            strings = item_ids.dtype == pl.String
            arrays["item_ids"] = np.array(item_ids.to_list(), np.str_ if strings else np.int64)
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f".{path.name}.tmp")
        try:
            with open(tmp, "wb") as file:
                np.savez(file, **arrays)
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)

    def pooled(self) -> np.ndarray:
        """Mean over the valid tokens, float32 `[I, D]`, unit length; zero where there are none."""
        items, width, dim = self.values.shape
        pooled = np.zeros((items, dim), np.float32)
        for rows in _blocks(self.values):
            valid = np.arange(width) < self.lengths[rows, None]
            block = np.where(valid[..., None], self.values[rows], 0)
            total = block.sum(1, dtype=np.float32)
            # The mean and the sum have the same direction.
            norm = np.linalg.norm(total, axis=1, keepdims=True)
            pooled[rows] = total / np.where(norm > 0, norm, 1)
        return pooled

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any value or length."""
        both = fingerprint(self.values) + fingerprint(self.lengths)
        return hashlib.sha256(both.encode()).hexdigest()[:16]


def load_vectors(path, item_ids: pl.Series, *, mmap: bool = False) -> np.ndarray:
    """Item vectors from a file, in the order of the items table.

    Args:
      path: `.npy`, numbers `[I, D]`, one row an item in the order of items.parquet; or
        `.parquet` with a column `item_id` and one list or array column of numbers (the only
        other one, or the one named `vector`), rows in any order. Items that the data set lacks
        are left out.
      item_ids: `[I]`, int64 or string.
      mmap: give a .npy file of float16 or float32 as the memory map it is, with only its shape
        and dtype checked (`check_vectors` does the rest).

    Returns:
      Float32 `[I, D]`, finite; with `mmap` float16 or float32, unchecked.

    Raises:
      InputError: no such file, not a matrix, wrong number of rows, NaN; for Parquet also an id
        that is missing, doubled or of another type, or vectors of different lengths.
    """
    path = pathlib.Path(path)
    file = f"--vectors {path}"
    if path.suffix == ".parquet":
        return _read_parquet(path, file, item_ids)
    try:
        vectors = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{file}: cannot be read ({one_line(error)}): give a .npy or .parquet file"
        ) from error
    if not isinstance(vectors, np.ndarray) or vectors.dtype.kind not in "fiu":
        raise InputError(f"{file}: holds no array of numbers: give a .npy or .parquet file")
    if vectors.ndim != 2 or len(vectors) != len(item_ids) or not vectors.shape[1]:
        raise InputError(
            f"{file}: shape {vectors.shape}, but the data set has {len(item_ids)} items: "
            "give one row an item, in the order of items.parquet"
        )
    if mmap:
        if vectors.dtype not in (np.float16, np.float32):
            raise InputError(
                f"{file}: holds {vectors.dtype}, which cannot be used as it lies on disk: "
                "write float16 or float32"
            )
        return vectors
    with np.errstate(over="ignore"):  # what overflows is named as infinite below
        vectors = np.asarray(vectors).astype(np.float32)
    _refuse_not_finite(vectors, file)
    return vectors


def load_tokens(path, item_ids: pl.Series) -> ItemTokens:
    """Token vectors of every item from .npz, in the order of the items table.

    Args:
      path: .npz with `values` float `[I, T, D]`, `lengths` int `[I]` (0..T, valid tokens first)
        and optionally `item_ids` `[I]`, without which rows must be in the order of items.parquet.
      item_ids: `[I]`, int64 or string.

    Raises:
      InputError: no such file, wrong names, shapes or types, lengths out of range, NaN or
        infinity in a valid token, or ids that are not those of the data set.
    """
    arrays = _read_npz(path, ("values", "lengths"), ("item_ids",))
    values, lengths, ids = arrays["values"], arrays["lengths"], arrays.get("item_ids")
    if values.ndim != 3 or values.dtype.kind != "f" or 0 in values.shape[1:]:
        raise InputError(
            f"{path}: 'values' is {values.dtype} {values.shape}: give float16 or float32 "
            "[items, tokens, width]"
        )
    items, width, _ = values.shape
    if lengths.shape != (items,) or lengths.dtype.kind not in "iu":
        raise InputError(
            f"{path}: 'lengths' is {lengths.dtype} {lengths.shape}: give {items} integers, one "
            "for each row of 'values'"
        )
    bad = np.flatnonzero((lengths < 0) | (lengths > width))
    if len(bad):
        raise InputError(
            f"{path}: row {bad[0]} of 'lengths' is {lengths[bad[0]]}, outside 0..{width} (tokens "
            "of 'values'): give the number of valid tokens"
        )
    if ids is None and items != len(item_ids):
        raise InputError(
            f"{path}: holds {items} items, but the data set has {len(item_ids)}: give one row an "
            "item, in the order of items.parquet, or add 'item_ids'"
        )
    if ids is not None:
        if ids.shape != (items,):
            raise InputError(f"{path}: 'item_ids' has shape {ids.shape}: give {items} ids")
        rows = _rows_of(item_ids, pl.Series("item_ids", ids), str(path), extras=False)
        if not np.array_equal(rows, np.arange(items)):
            values, lengths = values[rows], lengths[rows]
    if values.dtype not in (np.float16, np.float32):
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
    for rows in _blocks(values):
        valid = np.arange(width) < lengths[rows, None]
        bad = (valid & ~np.isfinite(values[rows]).all(2)).any(1)
        if bad.any():
            item = item_ids[rows.start + int(bad.argmax())]
            raise InputError(
                f"{path}: a valid token of item {item!r} is not finite: mend it or lower 'lengths'"
            )
    return ItemTokens(values, lengths.astype(np.int32))


def check_vectors(x: np.ndarray, what: str) -> None:
    """Refuses vectors that cannot be clustered; a memory map is read once, in blocks.

    Args:
      x: float `[I, D]`.
      what: they are, to begin the message with: a flag and its file.

    Raises:
      InputError: NaN or infinity, or all rows equal.
    """
    _refuse_not_finite(x, what)
    if len(x) > 1 and all((x[rows] == x[:1]).all() for rows in _blocks(x)):
        raise InputError(
            f"{what}: all {len(x)} rows are equal, so that there is nothing to cluster: give "
            "vectors that tell items apart"
        )


def distinct_rows(x: np.ndarray) -> int:
    """Number of different rows of `x` `[I, D]`, by a 64-bit hash of their bytes.

    Takes 8 bytes and about 2 µs a row. Two hashes in a million rows agree by chance once in 10^7.
    """
    hashes = np.empty(len(x), np.int64)
    for rows in _blocks(x):
        block = np.ascontiguousarray(x[rows]) + 0  # makes 0 of -0, which is equal to it
        size = block[0].nbytes
        data = memoryview(block).cast("B")
        hashes[rows] = [hash(data[i : i + size].tobytes()) for i in range(0, len(data), size)]
    return len(np.unique(hashes))


def fingerprint(x: np.ndarray) -> str:
    """SHA-256 over shape, dtype and bytes of an array, 16 hex digits."""
    digest = hashlib.sha256(f"{x.shape} {x.dtype.newbyteorder('<').str}".encode())
    for rows in _blocks(x):
        digest.update(np.ascontiguousarray(x[rows], x.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()[:16]


def _blocks(x: np.ndarray) -> Iterator[slice]:
    """Slices of rows of BLOCK_VALUES numbers each."""
    step = max(1, BLOCK_VALUES // max(1, int(np.prod(x.shape[1:]))))
    for start in range(0, len(x), step):
        yield slice(start, min(start + step, len(x)))


def _refuse_not_finite(x: np.ndarray, what: str) -> None:
    for rows in _blocks(x):
        finite = np.isfinite(x[rows]).all(1)
        if not finite.all():
            row = rows.start + int(finite.argmin())
            raise InputError(f"{what}: row {row} is not finite: mend or drop the item")


def _read_parquet(path: pathlib.Path, file: str, item_ids: pl.Series) -> np.ndarray:
    """Vectors of a Parquet file, float32 `[I, D]` in the order of `item_ids`."""
    try:
        names = list(pl.read_parquet_schema(path))
        others = [name for name in names if name != "item_id"]
        name = others[0] if len(others) == 1 else "vector"
        if "item_id" not in names or name not in others:
            raise InputError(
                f"{file}: has the columns {', '.join(names) or '(none)'}: give 'item_id' and "
                "'vector', a list of numbers"
            )
        table = pl.read_parquet(path, columns=["item_id", name])
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(
            f"{file}: cannot be read ({one_line(error)}): give a .npy or .parquet file"
        ) from error
    vectors, file = table[name], f"--vectors {path}"
    inner = getattr(vectors.dtype, "inner", None)
    if inner is None or not inner.is_numeric():
        raise InputError(
            f"{file}, column {name}: holds {vectors.dtype}: give a list or array of numbers a row"
        )
    rows = _rows_of(item_ids, table["item_id"], file, extras=True)
    vectors = vectors.cast(pl.List(pl.Float32))[rows]
    lengths = vectors.list.len()
    width = lengths.drop_nulls().mode().sort()[-1] if lengths.drop_nulls().len() else 0
    bad = ((lengths != width) | (lengths == 0)).fill_null(True)
    if bad.any():
        place = f"{file}, row {rows[bad.arg_max()] + 1}, column {name}"
        length = lengths[bad.arg_max()]
        found = "no vector" if not length else f"a vector of {length} numbers, others have {width}"
        raise InputError(f"{place}: {found}; correct the item's vector ({bad.sum()} such rows)")
    matrix = vectors.explode().to_numpy().reshape(len(rows), width)
    for block in _blocks(matrix):
        finite = np.isfinite(matrix[block]).all(1)
        if not finite.all():
            row = rows[block.start + int(finite.argmin())] + 1
            raise InputError(f"{file}, row {row}, column {name}: is not finite; mend the vector")
    return matrix


def _rows_of(item_ids: pl.Series, ids: pl.Series, file: str, *, extras: bool) -> np.ndarray:
    """Row of each of `item_ids` among `ids`, the id column of a file; int64 `[I]`.

    Raises:
      InputError: other type, empty or doubled id, an item without row; without `extras` also a
        row without item.
    """
    if not (
        (ids.dtype.is_integer() and item_ids.dtype.is_integer())
        or (ids.dtype == pl.String and item_ids.dtype == pl.String)
    ):
        raise InputError(
            f"{file}, column {ids.name}: holds {ids.dtype}, but the data set's ids are "
            f"{item_ids.dtype}: write the ids of items.parquet"
        )
    refuse_rows(ids.is_null(), ids, file, "is no id")
    refuse_rows(~ids.is_first_distinct(), ids, file, "comes twice")
    known = ids.cast(item_ids.dtype, strict=False)
    place = pl.DataFrame({"id": known}).with_row_index("row")
    rows = (
        pl.DataFrame({"id": item_ids})
        .join(place, on="id", how="left", maintain_order="left")
        .get_column("row")
    )
    if rows.null_count():
        missing = item_ids[rows.is_null().arg_max()]
        raise InputError(
            f"{file}, column {ids.name}: lacks item {missing!r} ({rows.null_count()} of "
            f"{len(item_ids)} items of the data set): add their rows"
        )
    if not extras:
        wanted = set(item_ids)
        foreign = pl.Series([value not in wanted for value in known])
        refuse_rows(foreign, ids, file, "is no item of the data set")
    return rows.to_numpy().astype(np.int64)


def _read_npz(path, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Arrays of an .npz file by name; optional ones only if there."""
    try:
        file = np.load(path)
        if isinstance(file, np.ndarray):
            raise ValueError("it is a single array")
        with file:
            names = [name for name in (*required, *optional) if name in file.files]
            if missing := set(required) - set(names):
                raise ValueError(f"it lacks '{min(missing)}'")
            return {name: file[name] for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: cannot be read ({one_line(error)}): give an .npz file with "
            f"{' and '.join(required)}"
        ) from error
