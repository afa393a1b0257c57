"""Data sets larger than memory: actions go to disk in sorted runs and come back user by user.

`Spool` takes the actions of a source in blocks and writes them as runs, each sorted by user;
`write_streamed` merges the runs into a folder that equals, fingerprint included, what
`schema.build_dataset` and `schema.save_dataset` make of the same actions at once.

In memory are at any time about `ROWS` actions (or all of one user, if he has more), the tables of
users and items, and numbers a user or item. On disk the runs need about 50 bytes an action until
the end, in a hidden folder beside the data set, which disappears with success and with errors.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from onerec_jax.data.schema import FORMAT, SPLITS, TABLES, UNITS, check_target, refuse_rows
from onerec_jax.data.splits import leave_one_out
from onerec_jax.errors import InputError
from onerec_jax.files import atomic_folder

ROWS = 4_000_000
"""Actions in memory at a time."""
STRETCH = 1_000_000
"""Values of a column in memory at a time for the fingerprint."""

Report = Callable[[str, int, int, int], None]
"""Called with stage, units done, units in all, and rows done."""


class Spool:
    """Actions on disk, in runs sorted by user; within a user in the order of adding.

    Attributes:
      users: DataFrame (user_id, len) of all users added, in no order.
      items: DataFrame (item_id, len) of all items added, in no order.
      rows: number of actions added.
    """

    def __init__(self, folder: pathlib.Path, rows_in_memory: int = ROWS):
        self.folder, self.rows_in_memory, self.rows = folder, rows_in_memory, 0
        self._waiting: list[pl.DataFrame] = []
        self._waiting_rows = 0
        self._runs: list[pathlib.Path] = []
        self._tallies = {"user_id": _Tally("user_id"), "item_id": _Tally("item_id")}

    def add(self, frame: pl.DataFrame) -> None:
        """Take a block: int64 `user_id` and `item_id`, `time_s` and further columns, always the
        same, in source order."""
        self._waiting.append(frame)
        self._waiting_rows += frame.height
        self.rows += frame.height
        if self._waiting_rows >= self.rows_in_memory:
            self._flush()

    @property
    def users(self) -> pl.DataFrame:
        self._flush()
        return self._tallies["user_id"].total()

    @property
    def items(self) -> pl.DataFrame:
        self._flush()
        return self._tallies["item_id"].total()

    @property
    def schema(self) -> pl.Schema:
        self._flush()
        return pl.read_ipc_schema(self._runs[0])

    def groups(self) -> Iterator[pl.DataFrame]:
        """Yields all actions, whole users at a time by rising id, each in the order of adding."""
        users = self.users.sort("user_id")
        ends = np.cumsum(users["len"].to_numpy())
        group = (ends - 1) // self.rows_in_memory  # users that end in the same stretch of rows
        lasts = users["user_id"].to_numpy()[np.flatnonzero(np.diff(group, append=-1))]
        cuts = [self._cuts(run, lasts) for run in self._runs]
        for index in range(len(lasts)):
            parts = [
                pl.scan_ipc(run).slice(cut[index], cut[index + 1] - cut[index]).collect()
                for run, cut in zip(self._runs, cuts, strict=True)
                if cut[index + 1] > cut[index]
            ]
            yield pl.concat(parts, rechunk=True).sort("user_id", maintain_order=True)

    @staticmethod
    def _cuts(run: pathlib.Path, lasts: np.ndarray) -> list[int]:
        """Rows of a run at which the groups of users begin, and its length."""
        users = pl.scan_ipc(run).select("user_id").collect()["user_id"].to_numpy()
        return [0, *np.searchsorted(users, lasts, "right").tolist()]

    def _flush(self) -> None:
        if not self._waiting:
            return
        frame = pl.concat(self._waiting).sort("user_id", maintain_order=True)
        self._waiting, self._waiting_rows = [], 0
        for tally in self._tallies.values():
            tally.add(frame)
        self._runs.append(self.folder / f"{len(self._runs)}.arrow")
        # Not packed, so that a slice costs no more than its own bytes.
        frame.write_ipc(self._runs[-1], compression="uncompressed")


class _Tally:
    """How often each id occurs; memory in proportion to the ids, whatever the rows."""

    def __init__(self, column: str):
        self.column, self._parts = column, []

    def add(self, frame: pl.DataFrame) -> None:
        self._parts.append(frame.group_by(self.column).len())
        # Merging only when the new outgrow the old keeps the work linear.
        if sum(part.height for part in self._parts[1:]) > self._parts[0].height:
            self.total()

    def total(self) -> pl.DataFrame:
        if len(self._parts) > 1:
            merged = pl.concat(self._parts).group_by(self.column).agg(pl.col("len").sum())
            self._parts = [merged]
        return self._parts[0]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What becomes of a user's actions when they are written.

    Attributes:
      tie: column of the spool that orders actions of equal `time_s`; it is not written. The order
        of adding settles the rest.
      tie_name: what dataset.json calls it.
      max_user_actions: only the latest so many of a user are kept; 0 keeps all.
      min_user_actions: users with fewer are dropped, as by `schema.drop_short_users`.
    """

    tie: str
    tie_name: str
    max_user_actions: int = 0
    min_user_actions: int = 0


@contextlib.contextmanager
def scratch_beside(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder on the same disk as `folder`; a full or read-only disk is an InputError.

    Raises:
      InputError: the disk is full, or cannot be written.
    """
    folder = pathlib.Path(folder).resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{folder.name}.spool."
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as scratch:
            yield pathlib.Path(scratch)
    except OSError as error:
        raise InputError(
            f"--out {folder}: cannot be written ({error.strerror or error}); free some space or "
            "choose another folder"
        ) from error


def write_streamed(
    folder: pathlib.Path,
    name: str,
    spool: Spool,
    items: pl.DataFrame,
    users: pl.DataFrame,
    *,
    meta: dict[str, Any],
    counts: dict[str, int],
    split: str,
    rules: Rules,
    overwrite: bool = False,
    report: Report = lambda *_: None,
) -> None:
    """Write the data set of the spool's actions, whole or not at all.

    Of actions that are equal in every column one is kept.

    Args:
      folder: as for `schema.save_dataset`.
      name, meta, split: as for `schema.build_dataset`.
      spool: with `time_s` and `rules.tie`.
      items: one row for every item of the spool, and any further items.
      users: one row for every user of the spool and no other.
      counts: goes to dataset.json as `preparation`; to it are added `out_of_time_order` (actions
        earlier than the one of the same user read before), `duplicates_dropped`,
        `users_over_limit` and `actions_over_limit_dropped`.

    Raises:
      InputError: `folder` is not free, a duplicate item or user, nobody has
        `rules.min_user_actions`, or the log cannot be split.
    """
    check_target(folder, overwrite)
    if split not in SPLITS:
        raise InputError(f"--split {split}: unknown; choose one of {', '.join(SPLITS)}")
    tables = {"items": items.sort("item_id"), "users": users.sort("user_id")}
    for table, column in (("items", "item_id"), ("users", "user_id")):
        ids = tables[table][column]
        refuse_rows(ids.is_duplicated(), ids, table, "is a duplicate", column)
    schema = dict(spool.schema)
    del schema[rules.tie]
    first = {"user_id": pl.Int64, "item_id": pl.Int64, "position": pl.Int32}
    schema = {**first, **{key: dtype for key, dtype in schema.items() if key not in first}}
    kept: list[pl.DataFrame] = []

    def batches(with_columns, predicate, n_rows, batch_size) -> Iterator[pl.DataFrame]:
        done = 0
        for group in spool.groups():
            done += group.height
            group = _arranged(group, rules, counts).select(list(schema))
            kept.append(group.group_by("user_id", maintain_order=True).len())
            report("writing", done, spool.rows, done)
            yield group

    with atomic_folder(pathlib.Path(folder).resolve()) as new:
        log = new / "interactions.parquet"
        register_io_source(batches, schema=schema).sink_parquet(log)
        lengths = pl.concat(kept)["len"].to_numpy().astype(np.int64)
        kept_ids = pl.concat(kept)["user_id"]
        if not lengths.size:
            longest = spool.users["len"].max()
            raise InputError(
                f"--min-user-actions {rules.min_user_actions}: no user of {name} has as many "
                f"actions (the longest has {longest}, duplicates included); give a smaller number"
            )
        meta = {**meta, "order": f"time_s, then {rules.tie_name}, then source order"}
        meta |= {"split": split}
        if rules.min_user_actions > 0:
            dropped = users.height - lengths.size
            meta |= {"min_user_actions": rules.min_user_actions, "users_dropped": dropped}
        tables["users"] = tables["users"].filter(pl.col("user_id").is_in(kept_ids.implode()))
        _check_split(name, split, log, tables["users"], lengths)
        for table, frame in tables.items():
            frame.write_parquet(new / f"{table}.parquet")
        schemas = {
            **{table: frame.schema for table, frame in tables.items()},
            "interactions": schema,
        }
        report("checking", 0, 1, int(lengths.sum()))
        description = {
            **meta,
            "preparation": dict(counts),
            "format": FORMAT,
            "name": name,
            "counts": {
                "users": len(lengths),
                "items": items.height,
                "interactions": int(lengths.sum()),
                "actions_per_user_min": int(lengths.min()),
                "actions_per_user_median": float(np.median(lengths)),
                "actions_per_user_max": int(lengths.max()),
            },
            "columns": {
                table: {column: UNITS.get(column, str(d)) for column, d in schemas[table].items()}
                for table in TABLES
            },
            "fingerprint": _fingerprint(split, tables, log),
        }
        text = json.dumps(description, indent=2, ensure_ascii=False)
        (new / "dataset.json").write_text(text + "\n", encoding="utf-8")


def _arranged(group: pl.DataFrame, rules: Rules, counts: dict[str, int]) -> pl.DataFrame:
    """Whole users, sorted by user: their actions in order, without what is dropped, numbered."""
    same = pl.col("user_id") == pl.col("user_id").shift(1)
    step, tie_step = pl.col("time_s").diff(), pl.col(rules.tie).cast(pl.Int64).diff()
    earlier = same & ((step < 0) | ((step == 0) & (tie_step < 0)))
    counts["out_of_time_order"] += group.select(earlier.sum()).item()
    keys = ["user_id", "time_s", rules.tie]
    group = group.sort(keys, maintain_order=True)

    # Equal rows have equal keys, so only runs of equal keys need to be compared in full.
    twin = pl.all_horizontal(pl.col(key) == pl.col(key).shift(1) for key in keys).fill_null(False)
    repeats = group.select(twin.alias("twin"))["twin"]
    in_run = repeats | repeats.shift(-1, fill_value=False)
    if in_run.any():
        keep = ~in_run
        suspects = group.filter(in_run)
        keep = keep.scatter(
            in_run.arg_true(), suspects.select(pl.struct(pl.all())).to_series().is_first_distinct()
        )
        counts["duplicates_dropped"] += int((~keep).sum())
        group = group.filter(keep)

    length = pl.len().over("user_id")
    if rules.max_user_actions > 0:
        from_end = length - pl.int_range(pl.len()).over("user_id")
        late = group.select((from_end <= rules.max_user_actions).alias("late"))["late"]
        if not late.all():
            over = group.filter(~late)
            counts["users_over_limit"] += over["user_id"].n_unique()
            counts["actions_over_limit_dropped"] += over.height
            group = group.filter(late)
    if rules.min_user_actions > 0:
        group = group.filter(length >= rules.min_user_actions)
    return group.with_columns(
        pl.int_range(pl.len(), dtype=pl.Int32).over("user_id").alias("position")
    )


def _check_split(
    name: str, split: str, log: pathlib.Path, users: pl.DataFrame, lengths: np.ndarray
) -> None:
    """What `splits.make_split` would refuse, from numbers a user and a distinct second."""
    if split == "leave-one-out":
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        leave_one_out(
            types.SimpleNamespace(name=name, users=users, num_users=len(lengths), offsets=offsets)
        )
        return
    scan = pl.scan_parquet(log)
    moments = scan.group_by("time_s").len().collect(engine="streaming").sort("time_s")
    until, total = np.cumsum(moments["len"].to_numpy()), int(lengths.sum())
    # As in splits.by_time: the times at 80 and 90 per cent of the sorted log.
    places = [int(total * (1 - 0.1 - 0.1)), int(total * (1 - 0.1))]
    valid_from, test_from = moments["time_s"].to_numpy()[np.searchsorted(until, places, "right")]
    before = scan.group_by("user_id").agg(
        (pl.col("time_s") < int(valid_from)).sum().alias("train"),
        (pl.col("time_s") < int(test_from)).sum().alias("valid"),
        pl.len().alias("all"),
    )
    ends = before.collect(engine="streaming")
    parts = {
        "training actions": (ends["train"] > 0).any(),
        "validation targets": (ends["train"].clip(1) < ends["valid"]).any(),
        "test targets": (ends["valid"].clip(1) < ends["all"]).any(),
    }
    for part, present in parts.items():
        if not present:
            raise InputError(
                f"{name}: a split by time leaves no {part} (too many actions share a time, or "
                "the log is too short); use --split leave-one-out"
            )


def _fingerprint(split: str, tables: dict[str, pl.DataFrame], log: pathlib.Path) -> str:
    """`Dataset.fingerprint` of the tables and the Parquet log, a stretch of a column at a time."""
    digest = hashlib.sha256(split.encode())
    for table, frame in tables.items():
        for column in sorted(frame.columns):
            digest.update(f"{table}.{column}".encode())
            _digest(digest, frame.lazy().select(column), frame.height, lambda values: values)
    scan = pl.scan_parquet(log)
    rows = scan.select(pl.len()).collect().item()
    ids = {f"{kind}_row": f"{kind}_id" for kind in ("user", "item")}
    columns = set(scan.collect_schema()) - set(ids.values()) | set(ids)
    for column in sorted(columns):
        digest.update(f"interactions.{column}".encode())
        if column not in ids:
            _digest(digest, scan.select(column), rows, lambda values: values)
            continue
        known = tables[f"{column.removesuffix('_row')}s"][ids[column]].to_numpy()
        _digest(digest, scan.select(ids[column]), rows, lambda v, known=known: _rows(known, v))
    return digest.hexdigest()[:16]


def _rows(known: np.ndarray, ids: pl.Series) -> pl.Series:
    """int32 rows of `ids` in the sorted `known`."""
    rows = np.searchsorted(known, ids.to_numpy()).astype(np.int32)
    if rows.max(initial=0) >= len(known) or (known[rows] != ids.to_numpy()).any():
        raise ValueError(f"{ids.name}: the log has ids that the table lacks")
    return pl.Series(rows)


def _digest(digest, column: pl.LazyFrame, rows: int, change: Callable) -> None:
    """Feed a column as `Dataset.fingerprint` does at once."""
    (dtype,) = column.collect_schema().dtypes()
    nulls = column.select(pl.all().null_count()).collect(engine="streaming").item()
    numeric = dtype.is_numeric()
    if not numeric:
        digest.update(b"[")
    for start in range(0, rows, STRETCH):
        values = change(column.slice(start, STRETCH).collect().to_series())
        if numeric:
            array = values.to_numpy()
            if nulls:  # one null turns the whole column to floats, not only its stretch
                array = array.astype(pl.Series([0, None], dtype=dtype).to_numpy().dtype)
            digest.update(np.ascontiguousarray(array).tobytes())
        else:
            text = json.dumps(values.to_list(), default=str)[1:-1]
            digest.update((", " if start and text else "").encode() + text.encode())
    if not numeric:
        digest.update(b"]")
