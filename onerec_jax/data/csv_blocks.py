"""Comma-separated files read a block at a time, so that their size does not matter.

A file may be packed (.gz), start with a byte-order mark, end its lines by CRLF and hold blank
lines (skipped). A last line with fewer fields than the header and no line end is a download that
broke off: it is dropped (one that broke off within its last field looks whole). All of this is
counted; anything else that does not fit is refused with its row. Rows count from 1, the header and
blank lines not included. A quoted field may hold commas, but no line end: blocks are cut there.
"""

import collections
import contextlib
import csv
import gzip
import io
import pathlib
import zlib
from collections.abc import Iterator

import polars as pl

from onerec_jax.data.schema import one_line
from onerec_jax.errors import InputError

BLOCK_BYTES = 32 * 2**20
LONGEST_LINE = 2**20
"""Bytes without a line end after which a file is no CSV."""


class CsvFile:
    """One file: its header, and its rows in blocks.

    Attributes:
      path: of the file.
      header: names of the columns, stripped of white space.
      counts: where oddities are added up: `files_with_bom`, `files_with_crlf`, `blank_lines`,
        `half_lines_dropped`, `integers_written_otherwise` (" 1" and "1.0" for 1).
      bytes_read: how much of the file, as it lies on disk, has been read.
    """

    def __init__(self, path: pathlib.Path, counts: collections.Counter):
        """Read the header.

        Raises:
          InputError: missing, unreadable or empty file, or a column named twice.
        """
        self.path, self.counts, self.bytes_read = path, counts, 0
        with self._open() as (file, _):
            line = file.readline(LONGEST_LINE)
        with self._as_input_error():
            names = next(csv.reader([line.decode("utf-8-sig")]), [])
        self.header = [name.strip() for name in names]
        if not any(self.header):
            raise InputError(f"{path}: has no header line; give a whole CSV file")
        doubles = [n for n, often in collections.Counter(self.header).items() if often > 1]
        if doubles:
            raise InputError(f"{path}: column {doubles[0]} is there twice; rename one")
        counts["files_with_bom"] += line.startswith(b"\xef\xbb\xbf")
        counts["files_with_crlf"] += line.endswith(b"\r\n")

    def blocks(
        self, types: dict[str, pl.DataType], size: int = BLOCK_BYTES
    ) -> Iterator[tuple[int, pl.DataFrame]]:
        """Yields (row number of the first row, rows of the columns in `types`).

        Args:
          types: column -> Int64, Float64 or String; columns must be in the header. An empty value
            is null, whatever the type.
          size: bytes of text a block, roughly.

        Raises:
          InputError: damaged file, a row with too few or too many fields, or a value of another
            type, with its row and column.
        """
        first = 1
        with self._open() as (file, raw):
            file.readline(LONGEST_LINE)
            for text in self._texts(file, size):
                self.bytes_read = raw.tell()
                if text := self._without_blank_lines(text.replace(b"\r\n", b"\n")):
                    frame = self._parsed(text, types, first)
                    yield first, frame
                    first += frame.height

    def refuse(self, first: int, bad: pl.Series, values: pl.Series, why: str) -> None:
        """Raise an InputError about the first row of a block where `bad` (bool) holds."""
        if bad.any():
            row = bad.arg_max()
            value = "an empty value" if values[row] is None else repr(values[row])
            raise InputError(
                f"{self.path}, row {first + row}, column {values.name}: {value} {why}; "
                "correct or remove such rows"
            )

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[io.BufferedIOBase, io.BufferedIOBase]]:
        """The unpacked file and the file as it lies on disk."""
        with self._as_input_error(), open(self.path, "rb") as raw:
            if self.path.suffix == ".gz":
                with gzip.GzipFile(fileobj=raw) as file:
                    yield file, raw
            else:
                yield raw, raw

    @contextlib.contextmanager
    def _as_input_error(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise InputError(f"{self.path}: no such file; check the path") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(
                f"{self.path}: damaged or truncated gzip ({one_line(error)}); fetch the file again"
            ) from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{self.path}: not readable as CSV ({error}); check it") from error

    def _texts(self, file: io.BufferedIOBase, size: int) -> Iterator[bytes]:
        """Blocks of whole lines; the last may lack its line end, but no field."""
        rest = b""
        while data := file.read(size):
            cut = data.rfind(b"\n") + 1
            if cut:
                yield rest + data[:cut]
                rest = data[cut:]
            else:
                rest += data
            if len(rest) > LONGEST_LINE:
                raise InputError(f"{self.path}: a line is over {LONGEST_LINE} bytes; is it CSV?")
        if rest.strip() and self._fields(rest) < len(self.header):
            self.counts["half_lines_dropped"] += 1
        elif rest:
            yield rest

    def _without_blank_lines(self, text: bytes) -> bytes:
        if not text.startswith(b"\n") and not any(mark in text for mark in (b"\n\n", b" ", b"\t")):
            return text
        lines = text.removesuffix(b"\n").split(b"\n")
        kept = [line for line in lines if line.strip()]
        self.counts["blank_lines"] += len(lines) - len(kept)
        return b"\n".join(kept)

    def _fields(self, line: bytes) -> int:
        if b'"' not in line:
            return line.count(b",") + 1
        with self._as_input_error():
            return len(next(csv.reader([line.decode()])))

    def _parsed(self, text: bytes, types: dict[str, pl.DataType], first: int) -> pl.DataFrame:
        """The rows of `text`, in one go if they are plain, else value by value."""
        rows = text.count(b"\n") + (not text.endswith(b"\n"))
        # All columns are read: with fewer, polars would not notice a row with too many fields.
        schema = {name: types.get(name, pl.String) for name in self.header}
        if b" " not in text:
            with contextlib.suppress(pl.exceptions.PolarsError):
                frame = pl.read_csv(text, has_header=False, schema=schema)
                # polars fills rows with too few fields; they end in a null.
                if frame.height == rows and not frame[self.header[-1]].null_count():
                    return frame.select(types.keys())
        for row, line in enumerate(text.removesuffix(b"\n").split(b"\n"), start=first):
            if (fields := self._fields(line)) != len(self.header):
                raise InputError(
                    f"{self.path}, row {row}: has {fields} fields, but the header "
                    f"{len(self.header)}; correct or remove such rows"
                )
        try:
            frame = pl.read_csv(text, has_header=False, schema=dict.fromkeys(schema, pl.String))
        except pl.exceptions.PolarsError as error:
            raise InputError(
                f"{self.path}, after row {first - 1}: not readable as CSV ({one_line(error)}); "
                "check that it is whole"
            ) from error
        if frame.height != rows:
            raise InputError(
                f"{self.path}, after row {first - 1}: a quoted field holds a line end; remove it"
            )
        return frame.select(
            self._numbers(frame[name], dtype, first) if dtype.is_numeric() else frame[name]
            for name, dtype in types.items()
        )

    def _numbers(self, values: pl.Series, dtype: pl.DataType, first: int) -> pl.Series:
        """Numbers from strings; whole floats and surrounding blanks pass for integers."""
        text = values.str.strip_chars()
        given = text.is_not_null() & (text != "")
        reals = text.cast(pl.Float64, strict=False)
        if dtype.is_float():
            finite = reals.is_finite().fill_null(False)
            self.refuse(first, given & ~finite, values, "is no finite number")
            return reals
        # Above 2**53 a float no longer tells neighbouring integers apart.
        whole = (reals == reals.floor()) & (reals.abs() < 2**53)
        numbers = text.cast(pl.Int64, strict=False)
        numbers = numbers.zip_with(numbers.is_not_null(), reals.set(~whole, None).cast(pl.Int64))
        self.refuse(first, given & numbers.is_null(), values, "is no integer")
        plain = values.str.contains(r"^-?\d+$")
        self.counts["integers_written_otherwise"] += (given & ~plain).sum()
        return numbers
