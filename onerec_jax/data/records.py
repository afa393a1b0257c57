"""Per-user arrays on disk, for worker processes: an ArrayRecord file of lives, one of snapshots.

`actions.array_record` holds one record a user, its actions in order, and `lifelong.array_record`
one record a snapshot, its clusters; both as packed rows of fixed width (`rows.json` has the
columns). What is small, items and offsets, lies beside them as .npy files, which all workers share
through the page cache. A worker reads the lives of a batch's users and gathers from them exactly as
from the whole log in memory.

Bound: a life of 100,000 actions with eight labels is a record of 2.2 MB.
"""

import dataclasses
import functools
import json
import pathlib
import tempfile

import numpy as np

from onerec_jax.config import ModelConfig
from onerec_jax.data.batches import BatchBuilder
from onerec_jax.data.features import ActionLog, ItemFeatures, LifelongLog
from onerec_jax.files import write_text
from onerec_jax.inputs import Batch

ACTIONS, LIFELONG, ROWS = "actions.array_record", "lifelong.array_record", "rows.json"
ITEMS = ("sid", "tags", "author", "duration")
OPTIONS = "group_size:1,uncompressed"  # random access by single records


def _row_type(columns: dict[str, np.ndarray | None]) -> np.dtype:
    """Packed row of the columns that are there."""
    return np.dtype([(name, x.dtype, x.shape[1:]) for name, x in columns.items() if x is not None])


def _write(path, columns, offsets) -> list:
    """Writes rows `offsets[i]` to `offsets[i + 1]` as record i; returns the row type as JSON."""
    from array_record.python.array_record_module import ArrayRecordWriter

    dtype = _row_type(columns)
    writer = ArrayRecordWriter(str(path), OPTIONS)
    for start, end in zip(offsets[:-1], offsets[1:], strict=True):
        rows = np.empty(end - start, dtype)
        for name in dtype.names:
            rows[name] = columns[name][start:end]
        writer.write(rows.tobytes())
    writer.close()
    return [[name, dtype[name].base.str, dtype[name].shape] for name in dtype.names]


def write_records(
    folder: pathlib.Path, log: ActionLog, items: ItemFeatures, lives: LifelongLog | None
) -> None:
    """Writes the folder that `RecordBatches` reads; it appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new = pathlib.Path(scratch, "new")
        new.mkdir()
        types = {ACTIONS: _write(new / ACTIONS, _action_columns(log), log.offsets)}
        if lives is not None:
            types[LIFELONG] = _write(new / LIFELONG, _cluster_columns(lives), lives.offsets)
            np.save(new / "covered.npy", lives.covered)
            np.save(new / "cluster_offsets.npy", lives.offsets)
        np.save(new / "static.npy", log.static)
        for name in ITEMS:
            if (values := getattr(items, name)) is not None:
                np.save(new / f"item_{name}.npy", values)
        write_text(new / ROWS, json.dumps(types))
        new.rename(folder)


def _action_columns(log: ActionLog) -> dict[str, np.ndarray | None]:
    names = ("item", "positive", "time_s", "playtime", "label")
    return {name: getattr(log, name) for name in names}


def _cluster_columns(lives: LifelongLog) -> dict[str, np.ndarray | None]:
    names = ("representative", "time_s", "playtime", "duration", "count")
    return {name: getattr(lives, name) for name in names}


@dataclasses.dataclass(frozen=True)
class RecordBatches:
    """Builds batches from a folder of `write_records`, in any process; pickles as its path."""

    folder: pathlib.Path
    cfg: ModelConfig

    @functools.cached_property
    def _types(self) -> dict[str, np.dtype]:
        stored = json.loads((self.folder / ROWS).read_text())
        return {
            file: np.dtype([(name, kind, tuple(shape)) for name, kind, shape in columns])
            for file, columns in stored.items()
        }

    @functools.cache  # noqa: B019 (lives as long as the worker)
    def _array(self, name: str) -> np.ndarray | None:
        path = self.folder / f"{name}.npy"
        return np.load(path, mmap_mode="r") if path.exists() else None

    @functools.cache  # noqa: B019
    def _reader(self, file: str):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(str(self.folder / file))

    def _rows(self, file: str, numbers) -> tuple[np.ndarray, np.ndarray]:
        """Rows of several records, one after the other, and their offsets."""
        dtype = self._types[file]
        records = self._reader(file).__getitems__(list(map(int, numbers))) if len(numbers) else []
        lengths = [len(record) // dtype.itemsize for record in records]
        return np.frombuffer(b"".join(records), dtype), np.concatenate([[0], np.cumsum(lengths)])

    def __call__(self, user, position, snapshot, **options) -> Batch:
        """Like `BatchBuilder`, of users at positions.

        Args:
          snapshot: int `[B]`, of each user at that position, -1 for none (`LifelongLog.find`).
          options: as of `BatchBuilder`.
        """
        rows, offsets = self._rows(ACTIONS, user)
        log = ActionLog(
            offsets=offsets.astype(np.int64),
            static=self._array("static")[user],
            **{
                name: rows[name] if name in rows.dtype.names else None
                for name in ("item", "positive", "time_s", "playtime", "label")
            },
        )
        items = ItemFeatures(**{name: self._array(f"item_{name}") for name in ITEMS})
        lives = self._lives(snapshot) if LIFELONG in self._types else None
        builder = BatchBuilder(log, items, self.cfg, lives)
        return builder(np.arange(len(user)), position, **options)

    def _lives(self, snapshot) -> LifelongLog:
        """The snapshots of a batch; user b of it has snapshot b."""
        known = np.maximum(snapshot, 0)
        covered = self._array("covered")
        covered = covered[known] if len(covered) else np.zeros(len(known), np.int32)
        stored = self._array("cluster_offsets")
        if len(stored) > 1:
            clusters = np.where(snapshot >= 0, stored[known + 1] - stored[known], 0)
        else:
            clusters = np.zeros(len(known), np.int64)
        rows, _ = self._rows(LIFELONG, snapshot[clusters > 0])
        names = rows.dtype.names
        return LifelongLog(
            find=lambda user, position: np.where(snapshot < 0, -1, user),
            covered=covered,
            offsets=np.concatenate([[0], np.cumsum(clusters)]),
            representative=rows["representative"],
            time_s=rows["time_s"] if "time_s" in names else None,
            playtime=rows["playtime"] if "playtime" in names else None,
            duration=rows["duration"] if "duration" in names else None,
            count=rows["count"],
        )
