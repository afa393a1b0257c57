"""The tables in which every source ends: items, users, interactions and a description.

On disk a data set is a folder of four files:

- `items.parquet`: one row an item. `item_id` (int64 or string, unique); where the source has
  them `title` (for display, may be null), `text` (all words of the item joined, never null),
  `tags` (list of strings), `brand`, `author_id`.
- `users.parquet`: one row a user: `user_id` (int64 or string) and static features if any.
- `interactions.parquet`: `user_id`, `item_id`, `position` (int32, from 0 within the user) and
  whatever of `time_s` and the feedback columns the source has.
- `dataset.json`: name, counts, columns with units, origin, licence, order, split, fingerprint.

A column that the source lacks is missing from the file; nothing is filled in.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

import numpy as np
import polars as pl

from onerec_jax.errors import InputError

FORMAT = "onerec_jax data set, version 1"
TABLES = ("items", "users", "interactions")
FILES = {"dataset.json", *(f"{table}.parquet" for table in TABLES)}
SPLITS = ("leave-one-out", "time")
FEEDBACK = (
    "click",
    "like",
    "follow",
    "comment",
    "forward",
    "hate",
    "long_view",
    "profile_enter",
)

UNITS = {
    "position": "int32, order within the user from 0",
    "time_s": "int64, Unix time in seconds",
    "rating": "float32, on the source's own scale",
    "playtime_s": "float32, seconds",
    "duration_s": "float32, seconds",
    "profile_stay_s": "float32, seconds on the author's page",
    "comment_stay_s": "float32, seconds in the comments",
    "session": "int32, session of the user from 0",
    "slot": "int32, place within the session from 0",
    "is_rand": "int8, 1: shown at random",
    "viral_farm": "int8, 1: from a content farm; for rewards, no model input",
    "tab": "int8, page of the app",
    **dict.fromkeys(FEEDBACK, "int8, 0 or 1"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Tables of one data set in memory, sorted and cross-referenced by row number.

    `items` is sorted by item_id and `users` by user_id (integers by value, strings by code
    point). `interactions` is sorted by (user_row, position) and has, beyond the columns on disk,
    int32 `user_row` and `item_row`: the row in `users` and in `items`.
    `meta` holds at least `split`, `origin`, `licence` and `order`.
    """

    name: str
    items: pl.DataFrame
    users: pl.DataFrame
    interactions: pl.DataFrame
    meta: dict[str, Any]

    @property
    def num_users(self) -> int:
        """U, rows of `users`."""
        return self.users.height

    @property
    def num_items(self) -> int:
        """I, rows of `items`."""
        return self.items.height

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64 [U + 1]: user u owns the interactions offsets[u] to offsets[u + 1] - 1."""
        lengths = np.bincount(self.interactions["user_row"].to_numpy(), minlength=self.num_users)
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    @functools.cached_property
    def item_rows(self) -> np.ndarray:
        """int32 [N]: the row in `items` of every interaction."""
        return self.interactions["item_row"].to_numpy()

    def column(self, name: str) -> np.ndarray | None:
        """[N] values of an interaction column, or None where the source has no such column.

        Single values that the source leaves out are NaN (an integer column then becomes float).
        """
        return self.interactions[name].to_numpy() if name in self.interactions.columns else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any value of any table and with the kind of split.

        All that a later stage computes from; the origin, the licence and the name do not enter.
        """
        digest = hashlib.sha256(self.meta["split"].encode())
        for name in TABLES:
            frame = getattr(self, name)
            if name == "interactions":
                frame = frame.drop("user_id", "item_id")  # the row numbers say the same, and faster
            for column in sorted(frame.columns):
                values = frame[column]
                digest.update(f"{name}.{column}".encode())
                if values.dtype.is_numeric():
                    digest.update(np.ascontiguousarray(values.to_numpy()).tobytes())
                else:
                    digest.update(json.dumps(values.to_list(), default=str).encode())
        return digest.hexdigest()[:16]

    @property
    def counts(self) -> dict[str, int | float]:
        """Users, items, interactions, and least, median and most actions of a user."""
        lengths = np.diff(self.offsets)
        return {
            "users": self.num_users,
            "items": self.num_items,
            "interactions": self.interactions.height,
            "actions_per_user_min": int(lengths.min()),
            "actions_per_user_median": float(np.median(lengths)),
            "actions_per_user_max": int(lengths.max()),
        }

    def table(self, name: str) -> pl.DataFrame:
        """`items`, `users` or `interactions` as it lies on disk, without row numbers."""
        return getattr(self, name).drop("user_row", "item_row", strict=False)


def build_dataset(
    name: str,
    items: pl.DataFrame,
    users: pl.DataFrame | None,
    interactions: pl.DataFrame,
    *,
    meta: dict[str, Any],
    split: str,
    ties: pl.Series | None = None,
    items_file: str = "items",
    interactions_file: str = "interactions",
) -> Dataset:
    """Check the tables of a source, order every user's actions and number all rows.

    Args:
      name: name of the data set.
      items: `item_id` and any further columns, in any order; items nobody touched are welcome.
      users: `user_id` and static features, or None to take the users of `interactions`.
      interactions: `user_id`, `item_id`, optionally `time_s` (any numeric or string type) and
        feedback, in source order. `position` is computed: by time, or by source order without.
      meta: `origin`, `licence` and whatever else dataset.json should say.
      split: "leave-one-out" or "time"; `splits.make_split` reads it back.
      ties: [N] key that orders a user's actions at equal `time_s`; source order settles the
        rest. Its name goes to dataset.json.
      items_file, interactions_file: what errors call the two tables.

    Raises:
      InputError: empty table, missing id, duplicate item or user, unusable time, or an
        interaction whose item or user has no row. Rows count from 1, a header not included.
    """
    if split not in SPLITS:
        raise InputError(f"--split {split}: unknown; choose one of {', '.join(SPLITS)}")
    if interactions.is_empty():
        raise InputError(f"{interactions_file}: holds no interactions; give a file with rows")
    if users is None:
        users = interactions.select("user_id").drop_nulls().unique()

    items = _sorted_by_id(items, "item_id", items_file)
    users = _sorted_by_id(users, "user_id", "users")
    interactions = interactions.with_columns(
        _ids(interactions["user_id"], interactions_file),
        _ids(interactions["item_id"], interactions_file),
    )
    interactions = _numbered(items, users, interactions, items_file, interactions_file)
    keys, stated = [pl.col("user_row")], "source order"
    if "time_s" in interactions.columns:
        interactions = interactions.with_columns(times(interactions["time_s"], interactions_file))
        keys, stated = [*keys, pl.col("time_s")], "time_s, then source order"
        if ties is not None:
            keys, stated = [*keys, ties], f"time_s, then {ties.name}, then source order"
    interactions = interactions.sort(keys, maintain_order=True).with_columns(
        pl.int_range(pl.len(), dtype=pl.Int32).over("user_row").alias("position")
    )
    first = ["user_id", "item_id", "position"]
    interactions = interactions.select(*first, pl.exclude(first))
    return Dataset(name, items, users, interactions, {**meta, "order": stated, "split": split})


def times(values: pl.Series, file: str) -> pl.Series:
    """int64 Unix times, in the unit of `values`, from numbers or strings.

    Raises:
      InputError: a time that is missing, NaN, negative or not whole, with its row and column.
    """
    numbers = values.cast(pl.Float64, strict=False)
    # Above 2**53 a float64 cannot tell neighbouring integers apart; no clock gets there.
    good = numbers.is_between(0, 2**53) & (numbers == numbers.floor())
    refuse_rows(~good.fill_null(False), values, file, "is no whole Unix time from 0 on")
    return numbers.cast(pl.Int64)


def refuse_rows(
    bad: pl.Series, values: pl.Series, file: str, why: str, what: str | None = None
) -> None:
    """Raise an InputError about the first row where `bad` (bool) holds; rows count from 1.

    The message reads "FILE, row R, WHAT VALUE WHY …"; WHAT is the name of `values` if not given.
    """
    if not bad.any():
        return
    row = bad.arg_max()
    what = what or f"column {values.name}:"
    value = "an empty value" if values[row] is None else repr(values[row])
    more = f" (and {bad.sum() - 1} more rows)" if bad.sum() > 1 else ""
    raise InputError(
        f"{file}, row {row + 1}, {what} {value} {why}{more}; correct or remove such rows"
    )


def drop_short_users(dataset: Dataset, minimum: int) -> Dataset:
    """The data set without users of fewer than `minimum` actions; the catalogue stays whole.

    Raises:
      InputError: nobody would be left.
    """
    lengths = np.diff(dataset.offsets)
    keep = lengths >= minimum
    if not keep.any():
        raise InputError(
            f"--min-user-actions {minimum}: no user of {dataset.name} has as many actions "
            f"(the longest has {lengths.max()}); give a smaller number"
        )
    users = dataset.users.filter(pl.Series(keep))
    interactions = dataset.table("interactions").filter(pl.Series(np.repeat(keep, lengths)))
    return dataclasses.replace(
        dataset,
        users=users,
        interactions=_numbered(dataset.items, users, interactions, "items", "interactions"),
        meta={**dataset.meta, "min_user_actions": minimum, "users_dropped": int((~keep).sum())},
    )


def check_target(folder: os.PathLike | str, overwrite: bool) -> None:
    """Refuse a folder that `save_dataset` must not write to.

    Raises:
      InputError: `folder` is a file, holds anything but a data set, or holds one and
        `overwrite` is False.
    """
    folder = pathlib.Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; choose another folder")
    held = {entry.name for entry in folder.iterdir()}
    if foreign := held - FILES:
        raise InputError(
            f"--out {folder}: holds other things than a data set ({min(foreign)}); "
            "choose another folder"
        )
    if held and not overwrite:
        raise InputError(
            f"--out {folder}: already holds a data set; "
            "give --overwrite to replace it, or choose another folder"
        )


def save_dataset(dataset: Dataset, folder: os.PathLike | str, *, overwrite: bool = False) -> None:
    """Write the four files so that `folder` appears whole or not at all.

    An existing data set is replaced only with `overwrite`, and only after the new one is
    written; a process killed between the two renames leaves the old one in a hidden sibling.

    Raises:
      InputError: as `check_target`; or the folder cannot be written.
    """
    check_target(folder, overwrite)
    folder = pathlib.Path(folder).resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            new, old = pathlib.Path(scratch, "new"), pathlib.Path(scratch, "old")
            new.mkdir()
            for table in TABLES:
                dataset.table(table).write_parquet(new / f"{table}.parquet")
            text = json.dumps(_description(dataset), indent=2, ensure_ascii=False)
            (new / "dataset.json").write_text(text + "\n", encoding="utf-8")
            _swap(new, folder, old)
    except OSError as error:
        raise InputError(
            f"--out {folder}: cannot be written ({error.strerror or error}); choose another folder"
        ) from error


def load_dataset(folder: os.PathLike | str) -> Dataset:
    """Read a folder that `save_dataset` wrote.

    Raises:
      InputError: no such folder, a file missing or unreadable, a column missing, or tables
        whose ids or sequences are not those that were saved.
    """
    folder = pathlib.Path(folder)
    again = "make it with python -m experiments.prepare"
    for path in (folder, *(folder / file for file in sorted(FILES))):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; {again}")
    try:
        meta = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'dataset.json'}: unreadable ({error}); {again}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise InputError(f"{folder / 'dataset.json'}: not in the format '{FORMAT}'; {again}")

    needed = {
        "items": {"item_id"},
        "users": {"user_id"},
        "interactions": {"user_id", "item_id", "position"},
    }
    tables = {}
    for table in TABLES:
        path = folder / f"{table}.parquet"
        try:
            tables[table] = pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise InputError(f"{path}: unreadable Parquet ({one_line(error)}); {again}") from error
        if missing := needed[table] - set(tables[table].columns):
            raise InputError(f"{path}: column {min(missing)} is missing; {again}")

    items = _sorted_by_id(tables["items"], "item_id", str(folder / "items.parquet"))
    users = _sorted_by_id(tables["users"], "user_id", str(folder / "users.parquet"))
    interactions = _numbered(
        items, users, tables["interactions"], "items.parquet", str(folder / "interactions.parquet")
    ).sort("user_row", "position")
    dataset = Dataset(meta["name"], items, users, interactions, meta)
    if dataset.fingerprint != meta.get("fingerprint"):
        raise InputError(f"{folder}: the tables are not those that dataset.json names; {again}")
    return dataset


def one_line(error: Exception) -> str:
    """First line of a library's message, for quoting inside an InputError."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _description(dataset: Dataset) -> dict[str, Any]:
    """Contents of dataset.json."""
    columns = {
        table: {
            column: UNITS.get(column, str(dtype))
            for column, dtype in dataset.table(table).schema.items()
        }
        for table in TABLES
    }
    return {
        **dataset.meta,
        "format": FORMAT,
        "name": dataset.name,
        "counts": dataset.counts,
        "columns": columns,
        "fingerprint": dataset.fingerprint,
    }


def _swap(new: pathlib.Path, folder: pathlib.Path, old: pathlib.Path) -> None:
    """Move `new` to `folder`; what lay there goes to `old`, and back if the move fails."""
    if not folder.exists():
        os.rename(new, folder)
        return
    os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old, folder)
        raise


def _ids(values: pl.Series, file: str) -> pl.Series:
    """Ids as int64 or string; refuses missing ones and other types."""
    if values.dtype.is_integer():
        values = values.cast(pl.Int64)
    elif values.dtype in (pl.Categorical, pl.Enum):
        values = values.cast(pl.String)
    elif values.dtype != pl.String:
        raise InputError(
            f"{file}, column {values.name}: ids must be integers or strings, not {values.dtype}; "
            "convert the column"
        )
    refuse_rows(values.is_null(), values, file, "is no id")
    return values


def _sorted_by_id(frame: pl.DataFrame, column: str, file: str) -> pl.DataFrame:
    """The frame sorted by its id column, which must be there, filled and unique."""
    if frame.is_empty():
        raise InputError(f"{file}: holds no rows; give a table with at least one")
    frame = frame.with_columns(_ids(frame[column], file))
    refuse_rows(~frame[column].is_first_distinct(), frame[column], file, "is a duplicate", column)
    return frame.sort(column)


def _numbered(
    items: pl.DataFrame,
    users: pl.DataFrame,
    interactions: pl.DataFrame,
    items_file: str,
    interactions_file: str,
) -> pl.DataFrame:
    """`interactions` in the same order with int32 `user_row` and `item_row`.

    Raises:
      InputError: an id without a row in its table, or ids of different types.
    """
    for table, kind, file in ((users, "user", "users"), (items, "item", items_file)):
        column, row = f"{kind}_id", f"{kind}_row"
        ids, given = table[column], interactions[column]
        if ids.dtype != given.dtype:
            raise InputError(
                f"{interactions_file}, column {column}: ids are {given.dtype}, but {ids.dtype} in "
                f"{file}; give both the same type"
            )
        index = table.select(column, pl.int_range(pl.len(), dtype=pl.Int32).alias(row))
        interactions = interactions.join(index, on=column, how="left", maintain_order="left")
        unknown = interactions[row].is_null()
        refuse_rows(unknown, given, interactions_file, f"has no row in {file}", kind)
    return interactions
