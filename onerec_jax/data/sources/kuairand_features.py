"""KuaiRand's tables of users and videos; what is read of them is said in `kuairand.py`."""

import collections
import pathlib
from collections.abc import Callable

import polars as pl

from onerec_jax.data.csv_blocks import CsvFile
from onerec_jax.data.schema import refuse_rows
from onerec_jax.errors import InputError

VIDEO_TYPES = {
    "author_id": pl.Int64,
    "visible_status": pl.Int32,
    "server_width": pl.Int32,
    "server_height": pl.Int32,
    "music_id": pl.Int64,
    "music_type": pl.Int32,
}


def require_header(file: CsvFile, columns: tuple[str, ...]) -> None:
    """Refuse a file that lacks one of `columns`.

    Raises:
      InputError: names the column and those that the file has.
    """
    if missing := [name for name in columns if name not in file.header]:
        raise InputError(
            f"{file.path}: no column '{missing[0]}' (it has {', '.join(file.header[:12])}); give "
            "the file as published"
        )


def seconds(milliseconds: pl.Series) -> pl.Series:
    """float32 seconds from milliseconds."""
    return (milliseconds / 1000).cast(pl.Float32)


def user_table(
    files: list[pathlib.Path], ids: pl.Series, counts: collections.Counter, block_bytes: int
) -> pl.DataFrame:
    """One row for every user in `ids`, with features where there are files of them."""

    def convert(file: CsvFile, first: int, frame: pl.DataFrame) -> pl.DataFrame:
        return frame.select(
            values if values.dtype == pl.String else _whole(file, first, values, pl.Int64)
            for values in frame
        )

    def types(name: str) -> pl.DataType:
        words = name == "user_active_degree" or name.endswith("_range")
        return pl.String if words else pl.Float64

    table = pl.DataFrame({"user_id": ids})
    if not files:
        return table
    features = _features(files, "user_id", types, convert, counts, block_bytes)
    counts["users_without_actions"] = features.join(table, on="user_id", how="anti").height
    counts["users_without_features"] = table.join(features, on="user_id", how="anti").height
    return table.join(features, on="user_id", how="left")


def video_table(
    files: dict[str, list[pathlib.Path]],
    ids: pl.Series,
    counts: collections.Counter,
    block_bytes: int,
) -> pl.DataFrame:
    """One row for every video in `ids` or in the basic features."""

    def convert(file: CsvFile, first: int, frame: pl.DataFrame) -> pl.DataFrame:
        out = [frame["item_id"]]
        for values in frame.drop("item_id"):
            if values.name in VIDEO_TYPES:
                values = _whole(file, first, values, VIDEO_TYPES[values.name])
            elif values.name == "video_duration":
                nothing = (values <= 0).fill_null(False)
                counts["video_duration_not_positive"] += nothing.sum()
                values = seconds(values.set(nothing, None)).alias("duration_s")
            elif values.name == "upload_dt":
                dates = values.str.to_date("%Y-%m-%d", strict=False)
                counts["unreadable_upload_date"] += dates.null_count() - values.null_count()
                values = dates.alias("upload_date")
            elif values.name == "tag":
                values = values.fill_null("").str.split(",").alias("tags")
                values = values.list.eval(pl.element().str.strip_chars()).list.eval(
                    pl.element().filter(pl.element() != "")
                )
            out.append(values)
        return pl.DataFrame(out)

    def types(name: str) -> pl.DataType:
        return pl.Float64 if name == "video_duration" or name in VIDEO_TYPES else pl.String

    def statistics(file: CsvFile, first: int, frame: pl.DataFrame) -> pl.DataFrame:
        return frame.select("item_id", pl.exclude("item_id").cast(pl.Float32).name.prefix("stat_"))

    table = pl.DataFrame({"item_id": ids})
    basic, statistic = files["video_features_basic"], files["video_features_statistic"]
    if basic:
        features = _features(basic, "video_id", types, convert, counts, block_bytes)
        strangers = table.join(features, on="item_id", how="anti")
        counts["videos_without_features"] = strangers.height
        table = pl.concat([features, strangers], how="diagonal")
    if statistic:
        numbers = _features(
            statistic, "video_id", lambda _: pl.Float64, statistics, counts, block_bytes
        )
        table = table.join(numbers, on="item_id", how="left")
    return table.sort("item_id")  # here, where the unsorted copy can go


def _features(
    files: list[pathlib.Path],
    key: str,
    types: Callable[[str], pl.DataType],
    convert: Callable[[CsvFile, int, pl.DataFrame], pl.DataFrame],
    counts: collections.Counter,
    block_bytes: int,
) -> pl.DataFrame:
    """All rows of a feature table, which may be in several files; `key` is unique and named
    `user_id` or `item_id`."""
    ours = key.replace("video", "item")
    parts = []
    for path in files:
        file = CsvFile(path, counts)
        require_header(file, (key,))
        wanted = {name: pl.Int64 if name == key else types(name) for name in file.header}
        for first, frame in file.blocks(wanted, block_bytes):
            file.refuse(first, frame[key].is_null(), frame[key], f"is no {key}")
            parts.append(convert(file, first, frame.rename({key: ours})))
    if not parts:
        raise InputError(f"{files[0]}: holds no rows; give the file as published or remove it")
    table = pl.concat(parts, how="diagonal")
    names = ", ".join(path.name for path in files)
    refuse_rows(table[ours].is_duplicated(), table[ours], names, "is a duplicate", key)
    return table


def _whole(file: CsvFile, first: int, values: pl.Series, dtype: pl.DataType) -> pl.Series:
    """Integers, which are published as floats ("9.0")."""
    numbers = values.cast(dtype, strict=False)
    bad = values.is_not_null() & (numbers.cast(values.dtype) != values).fill_null(True)
    file.refuse(first, bad, values, f"is no integer, or too large for {dtype}")
    return numbers
