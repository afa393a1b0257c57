"""One file a source, each with a function that returns a `Dataset`; here is what they share.

Readers turn every way in which a file can be broken into an InputError that names the file.
Rows count from 1, a header not included.
"""

import gzip
import html
import json
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import polars as pl

from onerec_jax.data.schema import one_line, refuse_rows
from onerec_jax.errors import InputError


def find_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    """`folder/name` or, failing that, `folder/name.gz`.

    Raises:
      InputError: neither is there.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"{folder}: has no {name} or {name}.gz; check --path")


def read_bytes(path: pathlib.Path) -> bytes:
    """Contents of a file, unpacked if the name ends in .gz.

    Raises:
      InputError: missing, not readable, or damaged gzip.
    """
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}: damaged or truncated gzip ({one_line(error)}); fetch the file again"
        ) from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error


def read_text(path: pathlib.Path) -> str:
    """UTF-8 text of a file, .gz or not.

    Raises:
      InputError: as `read_bytes`; or not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 ({error}); convert it, for example by iconv"
        ) from error


def read_json(path: pathlib.Path, make_object: Callable[[list], Any] = dict) -> Any:
    """Parsed JSON of a file, .gz or not; `make_object` gets each object's (key, value) pairs.

    Raises:
      InputError: as `read_text`; or not JSON.
    """
    try:
        return json.loads(read_text(path), object_pairs_hook=make_object)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error}); fetch or write the file again") from error


def read_table(path: pathlib.Path) -> pl.DataFrame:
    """A Parquet file with its own types, or a comma-separated file with all columns as strings.

    Empty CSV cells are null. A name ending in .parquet is Parquet; all others are CSV or CSV.gz.

    Raises:
      InputError: missing or unreadable file, or no header.
    """
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path)
        return pl.read_csv(read_bytes(path), infer_schema=False)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except (OSError, pl.exceptions.PolarsError) as error:
        kind = "Parquet" if path.suffix == ".parquet" else "CSV with a header"
        raise InputError(
            f"{path}: not readable as {kind} ({one_line(error)}); check that it is whole"
        ) from error


def require_columns(frame: pl.DataFrame, columns: dict[str, str], file: str) -> None:
    """Check that columns are there; `columns` maps each name to the remedy if it is not.

    Raises:
      InputError: names the missing column and those that the file has.
    """
    for column, remedy in columns.items():
        if column not in frame.columns:
            has = ", ".join(frame.columns[:12])
            raise InputError(f"{file}: no column '{column}' (it has {has}); {remedy}")


def integers(values: pl.Series, file: str) -> pl.Series:
    """int64 from numbers or strings.

    Raises:
      InputError: an empty or non-integer value, with its row.
    """
    numbers = values.cast(pl.Int64, strict=False)
    refuse_rows(numbers.is_null(), values, file, "is no integer")
    return numbers


def floats(values: pl.Series, file: str, divisor: int = 1) -> pl.Series:
    """float32 from numbers or strings, divided by `divisor`; empty values stay null.

    Raises:
      InputError: a value that is no finite number, with its row.
    """
    numbers = values.cast(pl.Float64, strict=False)
    bad = values.is_not_null() & ~numbers.is_finite().fill_null(False)
    refuse_rows(bad, values, file, "is no finite number")
    return (numbers / divisor).cast(pl.Float32)


def plain_ids(*columns: pl.Series) -> tuple[pl.Series, ...]:
    """Id columns of one kind, as int64 if all their values are plain integers, else as strings.

    Plain means as Python prints an integer: "7", not "007" or "7.0", which stay different ids.
    Columns of other types (float, say) come back as they are, for `build_dataset` to refuse.
    """
    if not all(c.dtype.is_integer() or c.dtype in (pl.String, pl.Categorical) for c in columns):
        return columns
    texts = [column.cast(pl.String) for column in columns]
    plain = r"^(0|-?[1-9]\d{0,17})$"
    if all(text.str.contains(plain).all() for text in texts):
        return tuple(text.cast(pl.Int64) for text in texts)
    return tuple(texts)


def clean(text: Any) -> str:
    """A display string: HTML entities unescaped, runs of white space single; "" for None."""
    return "" if text is None else " ".join(html.unescape(str(text)).split())


def join_text(*parts: str | None) -> str:
    """Non-empty parts as sentences of one text; "" if there are none."""
    return ". ".join(part for part in parts if part)
