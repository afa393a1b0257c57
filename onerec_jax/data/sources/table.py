"""Your own log: one Parquet or CSV file of interactions, optionally one of items.

You name the columns; those you do not name are not read. A user's actions are ordered by the
time column if there is one (ties by file order), else by file order. Ids that are all plain
integers become integers, whatever the file type; others stay strings.
"""

import dataclasses
import pathlib
from typing import Literal

import polars as pl

from onerec_jax.data.schema import FEEDBACK, Dataset, build_dataset, refuse_rows, times
from onerec_jax.data.sources import (
    clean,
    floats,
    join_text,
    plain_ids,
    read_table,
    require_columns,
)

PER_SECOND = {"s": 1, "ms": 1000}
FLAGS = {"0": 0, "1": 1, "false": 0, "true": 1, "0.0": 0, "1.0": 1}


@dataclasses.dataclass(frozen=True)
class TableColumns:
    """Names of your columns. Only user and item are needed; what has no name is not read."""

    user: str = "user_id"
    item: str = "item_id"
    time: str | None = None
    """Unix time from 0 on, or a Parquet date-time (UTC unless it says otherwise)."""
    time_unit: Literal["s", "ms"] = "s"
    """Unit of a numeric time column; date-times know their own."""
    playtime: str | None = None
    """How long the item was watched, heard or read."""
    duration: str | None = None
    """How long the item is."""
    playtime_unit: Literal["s", "ms"] = "s"
    """Unit of the playtime and duration columns."""
    rating: str | None = None
    """Any scale; higher is better."""
    click: str | None = None
    """This and the next seven: 0 or 1, or true or false."""
    like: str | None = None
    follow: str | None = None
    comment: str | None = None
    forward: str | None = None
    hate: str | None = None
    long_view: str | None = None
    profile_enter: str | None = None
    items: pathlib.Path | None = None
    """Parquet or CSV of items; without it, items are the ids that occur and have no text."""
    items_id: str = "item_id"
    items_title: str | None = None
    """Column of the item table to show people."""
    items_text: tuple[str, ...] = ()
    """Columns of the item table for the tokenizer; if none, title and tags."""
    items_tags: str | None = None
    """Column of the item table: a list, or a string of tags between separators."""
    items_tags_separator: str = "|"
    items_author: str | None = None
    """Column of the item table with the author's (creator's, artist's) id."""


def read_own_table(
    path: pathlib.Path, columns: TableColumns | None = None, *, split: str = "leave-one-out"
) -> Dataset:
    """Tables from a user's own files.

    Args:
      path: Parquet (`.parquet`) or comma-separated file with a header (`.csv`, `.csv.gz`).
      columns: names of the columns and the item table.
      split: "leave-one-out" or "time".

    Raises:
      InputError: missing file or column, or a bad value with its row.
    """
    columns = columns or TableColumns()
    file = str(path)
    frame = read_table(path)
    fields = ("user", "item", "time", "playtime", "duration", "rating", *FEEDBACK)
    named = _require(frame, columns, fields, file)
    refuse_rows(frame[columns.user].is_null(), frame[columns.user], file, "is no user id")
    refuse_rows(frame[columns.item].is_null(), frame[columns.item], file, "is no item id")

    user_ids, item_ids = plain_ids(frame[columns.user])[0], plain_ids(frame[columns.item])[0]
    items = pl.DataFrame({"item_id": item_ids.unique()})
    if columns.items is not None:
        items, item_ids = _items(columns, frame[columns.item])
    interactions = pl.DataFrame({"user_id": user_ids, "item_id": item_ids})
    exact = None
    if columns.time:
        exact, per_second = _time(frame[columns.time], columns.time_unit, file)
        interactions = interactions.with_columns((exact // per_second).alias("time_s"))
    return build_dataset(
        path.name.split(".")[0],
        items,
        None,
        interactions.with_columns(_feedback(frame, columns, file)),
        meta={
            "source": "table",
            "origin": str(path.resolve()),
            "licence": "the owner's",
            "columns_read": named,
        },
        split=split,
        ties=exact,  # actions within one second keep their order
        items_file=str(columns.items or path),
        interactions_file=file,
    )


def _require(
    frame: pl.DataFrame, columns: TableColumns, fields: tuple[str, ...], file: str
) -> dict[str, str]:
    """Field -> column of those fields that the user named; refuses columns that are not there."""
    named = {field: getattr(columns, field) for field in fields if getattr(columns, field)}
    for field, column in named.items():
        flag = f"--table.{field.replace('_', '-')}"
        require_columns(frame, {column: f"set {flag} to the right name"}, file)
    return named


def _time(values: pl.Series, unit: str, file: str) -> tuple[pl.Series, int]:
    """int64 times and how many of their units make a second."""
    if isinstance(values.dtype, pl.Datetime):
        return times(values.dt.epoch("us"), file), 1_000_000
    return times(values, file), PER_SECOND[unit]


def _feedback(frame: pl.DataFrame, columns: TableColumns, file: str) -> list[pl.Series]:
    """The feedback columns that the user named, under our names and in our units."""
    out = []
    for field in ("playtime", "duration"):
        if name := getattr(columns, field):
            seconds = floats(frame[name], file, divisor=PER_SECOND[columns.playtime_unit])
            negative = (seconds < 0).fill_null(False)
            refuse_rows(negative, frame[name], file, f"is no {field}: it is negative")
            out.append(seconds.alias(f"{field}_s"))
    if columns.rating:
        out.append(floats(frame[columns.rating], file).alias("rating"))
    for field in FEEDBACK:
        if name := getattr(columns, field):
            words = frame[name].cast(pl.String).str.to_lowercase()
            flags = words.replace_strict(FLAGS, default=None, return_dtype=pl.Int8)
            refuse_rows(flags.is_null(), frame[name], file, "is neither 0 nor 1")
            out.append(flags.alias(field))
    return out


def _items(columns: TableColumns, used: pl.Series) -> tuple[pl.DataFrame, pl.Series]:
    """The item table under our names, and `used` (item ids of interactions) in its id type."""
    path = columns.items
    frame = read_table(path)
    fields = ("items_id", "items_title", "items_tags", "items_author")
    _require(frame, columns, fields, str(path))
    remedy = "correct --table.items-text"
    require_columns(frame, dict.fromkeys(columns.items_text, remedy), str(path))

    known, used = plain_ids(frame[columns.items_id], used)
    items = pl.DataFrame({"item_id": known})
    parts = [frame[name] for name in columns.items_text]
    if columns.items_title:
        title = frame[columns.items_title].cast(pl.String)
        items = items.with_columns(title.alias("title"))
        parts = parts if columns.items_text else [title]
    if columns.items_tags:
        tags = _tags(frame[columns.items_tags], columns.items_tags_separator)
        items = items.with_columns(tags.alias("tags"))
        parts = parts if columns.items_text else [*parts, tags.list.join(", ")]
    if columns.items_author:
        items = items.with_columns(plain_ids(frame[columns.items_author])[0].alias("author_id"))
    if parts:
        rows = zip(*(part.cast(pl.String) for part in parts), strict=True)
        items = items.with_columns(pl.Series("text", [join_text(*map(clean, r)) for r in rows]))
    return items, used


def _tags(values: pl.Series, separator: str) -> pl.Series:
    """list[str] of non-empty tags; an item without any has an empty list."""
    if not isinstance(values.dtype, pl.List):
        values = values.cast(pl.String).str.split(separator)
    rows = [[clean(tag) for tag in row or () if clean(tag)] for row in values.to_list()]
    return pl.Series(rows, dtype=pl.List(pl.String))
