"""Streamed data sets equal those made in memory; blocks of CSV hold what the file holds."""

import collections
import gzip
import json

import numpy as np
import polars as pl
import pytest

from onerec_jax.data.csv_blocks import CsvFile
from onerec_jax.data.schema import (
    build_dataset,
    drop_short_users,
    load_dataset,
    save_dataset,
)
from onerec_jax.data.splits import by_time, make_split
from onerec_jax.data.stream import Rules, Spool, scratch_beside, write_streamed
from onerec_jax.errors import InputError

META = {"source": "test", "origin": "a test", "licence": "none"}


def log(rows=500, users=20, items=30, seed=0):
    """Actions in no order, with nulls in some columns, many equal times and no equal rows."""
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame(
        {
            "user_id": rng.integers(-3, users - 3, rows),
            "item_id": 10 * rng.integers(0, items, rows),
            "time_s": rng.integers(1000, 1100, rows),
            "tie": rng.integers(0, 3, rows).astype(np.int16),
            "click": pl.Series(rng.integers(0, 2, rows), dtype=pl.Int8),
            "like": pl.Series(rng.integers(0, 2, rows), dtype=pl.Int8),
            "playtime_s": pl.Series(rng.random(rows), dtype=pl.Float32),
        }
    )
    nothing = pl.Series(rng.random(rows) < 0.01)
    return frame.with_columns(
        pl.when(~nothing).then(pl.col("like")).alias("like"),
        pl.when(~nothing).then(pl.col("playtime_s")).alias("playtime_s"),
    )


def tables(frame):
    """Items and users of a log with columns of all kinds."""
    items = pl.DataFrame({"item_id": frame["item_id"].unique().append(pl.Series([7, 5000]))})
    rows = items.height
    items = items.with_columns(
        pl.Series("tags", [["a", "ä"], [], None] * rows, dtype=pl.List(pl.String)).head(rows),
        pl.Series("upload_date", [None, "2022-04-10"] * rows).str.to_date().head(rows),
        pl.Series("author_id", [3, None] * rows).head(rows),
    )
    users = pl.DataFrame({"user_id": frame["user_id"].unique()})
    words = pl.Series("word", ['"quoted"', None] * users.height)
    return items, users.with_columns(words.head(users.height))


def stream(folder, frame, *, split="leave-one-out", block=37, memory=50, counts=None, **rules):
    items, users = tables(frame)
    with scratch_beside(folder) as scratch:
        spool = Spool(scratch, memory)
        for start in range(0, frame.height, block):
            spool.add(frame[start : start + block])
        write_streamed(
            folder,
            "toy",
            spool,
            items,
            users,
            meta=META,
            counts=collections.Counter() if counts is None else counts,
            split=split,
            rules=Rules("tie", "tie", **rules),
        )
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
    return json.loads((folder / "dataset.json").read_text())


def in_memory(frame, split="leave-one-out"):
    items, users = tables(frame)
    rest = frame.drop("tie")
    return build_dataset("toy", items, users, rest, meta=META, split=split, ties=frame["tie"])


@pytest.mark.parametrize("split", ["leave-one-out", "time"])
@pytest.mark.parametrize(("block", "memory"), [(37, 50), (1, 1), (1000, 10**6)])
def test_streamed_equals_in_memory(tmp_path, monkeypatch, split, block, memory):
    monkeypatch.setattr("onerec_jax.data.stream.STRETCH", 70)
    frame = log()
    about = stream(tmp_path / "a", frame, split=split, block=block, memory=memory)
    dataset = in_memory(frame, split)
    save_dataset(dataset, tmp_path / "b")
    counts = collections.Counter(about.pop("preparation"))
    assert counts == collections.Counter(out_of_time_order=disorder(frame))
    assert about == json.loads((tmp_path / "b" / "dataset.json").read_text())
    loaded = load_dataset(tmp_path / "a")
    assert loaded.interactions.equals(dataset.interactions)
    for table in ("items", "users", "interactions"):
        a, b = (pl.read_parquet(tmp_path / x / f"{table}.parquet") for x in "ab")
        assert a.equals(b)
        assert a.schema == b.schema


def disorder(frame):
    """Actions earlier than the one before of the same user, counted one by one."""
    last, count = {}, 0
    for user, time, tie in frame.select("user_id", "time_s", "tie").iter_rows():
        count += (time, tie) < last.get(user, (0, 0))
        last[user] = (time, tie)
    return count


def test_short_users_are_dropped_as_in_memory(tmp_path):
    frame = log()
    lengths = frame["user_id"].value_counts()["count"]
    minimum = int(lengths.median())
    assert lengths.min() < minimum
    about = stream(tmp_path / "a", frame, min_user_actions=minimum)
    save_dataset(drop_short_users(in_memory(frame), minimum), tmp_path / "b")
    del about["preparation"]
    assert about == json.loads((tmp_path / "b" / "dataset.json").read_text())
    load_dataset(tmp_path / "a")
    with pytest.raises(InputError, match="no user of toy has as many"):
        stream(tmp_path / "c", frame, min_user_actions=10**6)
    assert not (tmp_path / "c").exists()


def test_duplicates_and_long_users(tmp_path):
    frame = log()
    repeated = pl.concat([frame, frame[100:160], frame[140:150]])
    counts = collections.Counter()
    about = stream(tmp_path / "a", repeated, counts=counts)
    assert about["preparation"]["duplicates_dropped"] == counts["duplicates_dropped"] == 70
    assert about["fingerprint"] == in_memory(frame).fingerprint

    about = stream(tmp_path / "b", frame, counts=counts, max_user_actions=20)
    whole = in_memory(frame)
    lengths = np.diff(whole.offsets)
    late = whole.interactions.filter(
        pl.Series(whole.column("position") >= np.repeat(lengths - 20, lengths))
    )
    kept = load_dataset(tmp_path / "b").interactions
    assert kept.drop("position").equals(late.drop("position"))
    assert counts["users_over_limit"] == (lengths > 20).sum()
    assert counts["actions_over_limit_dropped"] == np.maximum(lengths - 20, 0).sum()


@pytest.mark.parametrize("split", ["leave-one-out", "time"])
def test_what_cannot_be_split_is_refused_as_in_memory(tmp_path, split):
    frame = log(rows=12).with_columns(pl.lit(5).alias("time_s")).unique()
    with pytest.raises(InputError) as memory:
        make_split(in_memory(frame, split))
    with pytest.raises(InputError) as streamed:
        stream(tmp_path / "a", frame, split=split)
    assert str(streamed.value) == str(memory.value)
    assert list(tmp_path.iterdir()) == []


def test_splits_by_time_agree_on_what_can_be_split(tmp_path):
    accepted = 0
    for seed in range(20):  # so short that some cannot
        frame = log(rows=8, users=3, seed=seed)
        try:
            by_time(in_memory(frame, "time"))
        except InputError as error:
            with pytest.raises(InputError) as streamed:
                stream(tmp_path / f"{seed}", frame, split="time")
            assert str(streamed.value) == str(error)  # noqa: PT017
        else:
            stream(tmp_path / f"{seed}", frame, split="time")
            accepted += 1
    assert 0 < accepted < 20


def test_errors_leave_nothing(tmp_path, monkeypatch):
    frame = log()
    items, users = tables(frame)
    doubled = pl.concat([items, items.filter(pl.col("item_id") == 7)])
    monkeypatch.setattr(f"{__name__}.tables", lambda frame: (doubled, users))
    with pytest.raises(InputError, match="item_id 7 is a duplicate"):
        stream(tmp_path / "a", frame)
    with pytest.raises(InputError, match="free some space"), scratch_beside(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


TYPES = {"a": pl.Int64, "w": pl.String, "b": pl.Int64, "x": pl.Float64}


def read(path, data, types=TYPES, size=2**20):
    """(rows of the file, counts that are not 0)."""
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    counts = collections.Counter()
    frames = list(CsvFile(path, counts).blocks(types, size))
    heights = [frame.height for _, frame in frames]
    assert [first for first, _ in frames] == (np.cumsum([1, *heights])[:-1]).tolist()
    rows = pl.concat(frame for _, frame in frames).rows() if frames else []
    return rows, {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("size", [1, 7, 2**20])
@pytest.mark.parametrize("name", ["f.csv", "f.csv.gz"])
def test_blocks_hold_the_rows_of_the_file(tmp_path, name, size):
    path = tmp_path / name
    rows = [(1, "u", 2, 0.5), (-3, None, None, None), (4, "v,w", 5, 1.0)]
    plain = b'a,w,b,x\n1,u,2,0.5\n-3,,,\n4,"v,w",5,1.0\n'
    assert read(path, plain, size=size) == (rows, {})
    assert read(path, plain[:-1], size=size) == (rows, {})
    crlf = b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n")
    assert read(path, crlf, size=size) == (rows, {"files_with_bom": 1, "files_with_crlf": 1})
    blank = plain.replace(b"-3", b"\n \n\n-3") + b"\n"
    assert read(path, blank, size=size) == (rows, {"blank_lines": 4})
    assert read(path, plain + b"9,z,1", size=size) == (rows, {"half_lines_dropped": 1})
    odd = plain.replace(b"1,u", b" 1,u").replace(b"5,1", b"5.0 ,1").replace(b"-3", b"-3.0")
    assert read(path, odd, size=size) == (rows, {"integers_written_otherwise": 3})
    columns = {"b": pl.Int64}
    assert read(path, plain, columns, size)[0] == [(2,), (None,), (5,)]
    assert read(path, b"a,w,b,x\n", size=size) == ([], {})


@pytest.mark.parametrize("size", [1, 2**20])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"1,u,x,2", "row 3, column b: 'x' is no integer"),
        (b"1,u,1.5,2", "row 3, column b: '1.5' is no integer"),
        (b"1,u,99999999999999999999,2", "row 3, column b: '99999999999999999999' is no integer"),
        (b"1,u,1,nan", None),
        (b"1,u,1,much", "row 3, column x: 'much' is no finite number"),
        (b"1,u,1", "row 3: has 3 fields, but the header 4"),
        (b"1,u,1,2,3", "row 3: has 5 fields, but the header 4"),
        (b'1,"u\n3",1,2', "row 3: has 2 fields"),
        (b"1,\xff,1,2", "not readable as CSV"),
    ],
)
def test_bad_rows_are_refused(tmp_path, row, message, size):
    data = b"a,w,b,x\n1,u,2,3\n1,u,2,3\n" + row + b"\n1,u,2,3\n"
    if message is None:
        assert len(read(tmp_path / "f.csv", data, size=size)[0]) == 4
        return
    with pytest.raises(InputError, match=r"f\.csv.*" + message.replace("(", r"\(")):
        read(tmp_path / "f.csv", data, size=size)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("f.csv", b"", "has no header"),
        ("f.csv", b"a,a\n1,2\n", "column a is there twice"),
        ("f.csv", b"a\xff\n1\n", "not readable as CSV"),
        ("f.csv", b"a,w,b,x\n" + b"1" * 3 * 2**20, "a line is over 1048576 bytes"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, data, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path / name, data)


def test_broken_or_missing_files_are_refused(tmp_path):
    packed = gzip.compress(b"a,b\n" + b"1,2\n" * 1000)
    for data in (packed[:-9], b"a,b\n1,2\n"):
        (tmp_path / "g.csv.gz").write_bytes(data)
        with pytest.raises(InputError, match="damaged or truncated gzip"):
            list(CsvFile(tmp_path / "g.csv.gz", collections.Counter()).blocks({"a": pl.Int64}))
    with pytest.raises(InputError, match="no such file"):
        CsvFile(tmp_path / "none.csv", collections.Counter())
