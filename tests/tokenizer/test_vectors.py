"""Item vectors from files: joined to the right item, and refused where they do not fit."""

import numpy as np
import polars as pl
import pytest

from onerec_jax.errors import InputError
from onerec_jax.tokenizer import vectors as module
from onerec_jax.tokenizer.vectors import (
    ItemTokens,
    check_vectors,
    distinct_rows,
    fingerprint,
    load_tokens,
    load_vectors,
)

IDS = pl.Series("item_id", [10, 20, 30, 40])
NAMES = pl.Series("item_id", ["a", "b", "c", "déjà"])
X = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """One or two rows a block, so that block edges are met."""
    monkeypatch.setattr(module, "BLOCK_VALUES", 6)


def refused(call, *args, match, **kwargs):
    with pytest.raises(InputError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def tokens(dtype=np.float16, items=4, width=3, dim=2):
    rng = np.random.default_rng(0)
    lengths = np.array([3, 0, 1, 2], np.int32)[:items]
    return ItemTokens(rng.standard_normal((items, width, dim)).astype(dtype), lengths)


# ---- ItemTokens


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_pooled_is_the_unit_mean_of_valid_tokens(dtype):
    given = tokens(dtype)
    given.values[3, 2] = np.nan  # behind the last valid token
    pooled = given.pooled()
    assert pooled.dtype == np.float32
    for item, length in enumerate(given.lengths):
        mean = given.values[item, :length].astype(np.float64).sum(0) / max(length, 1)
        expected = mean / np.linalg.norm(mean) if length else np.zeros(2)
        np.testing.assert_allclose(pooled[item], expected, atol=1e-6)


def test_from_vectors_is_one_token_an_item():
    x = X.copy()
    x[2] = 0
    given = ItemTokens.from_vectors(x)
    np.testing.assert_array_equal(given.lengths, [1, 1, 0, 1])
    assert given.lengths.dtype == np.int32
    np.testing.assert_array_equal(given.values[:, 0], x)
    known = x[[0, 1, 3]]
    expected = known / np.linalg.norm(known, axis=1, keepdims=True)
    np.testing.assert_allclose(given.pooled()[[0, 1, 3]], expected, rtol=1e-6)
    np.testing.assert_array_equal(given.pooled()[2], 0)


@pytest.mark.parametrize(
    ("dtype", "kept"), [(np.float16, np.float16), (np.float64, np.float32), (np.int64, np.float32)]
)
def test_from_vectors_type(dtype, kept):
    assert ItemTokens.from_vectors(X.astype(dtype)).values.dtype == kept


@pytest.mark.parametrize("ids", [None, IDS, NAMES])
def test_tokens_round_trip(tmp_path, ids):
    path = tmp_path / "deep" / "tokens.npz"
    given = tokens()
    given.save(path, ids)
    back = ItemTokens.load(path, IDS if ids is None else ids)
    assert back.values.dtype == np.float16
    assert back.lengths.dtype == np.int32
    np.testing.assert_array_equal(back.values, given.values)
    np.testing.assert_array_equal(back.lengths, given.lengths)
    assert back.fingerprint == given.fingerprint
    assert [entry.name for entry in path.parent.iterdir()] == ["tokens.npz"]


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tokens.npz"
    tokens().save(path)
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(KeyboardInterrupt):
        tokens().save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokens.npz"]


def test_tokens_are_joined_by_id(tmp_path):
    given = tokens()
    order = [2, 0, 3, 1]
    shuffled = ItemTokens(given.values[order], given.lengths[order])
    shuffled.save(tmp_path / "tokens.npz", NAMES[order])
    back = load_tokens(tmp_path / "tokens.npz", NAMES)
    np.testing.assert_array_equal(back.values, given.values)
    np.testing.assert_array_equal(back.lengths, given.lengths)


def test_tokens_of_float64_become_float32(tmp_path):
    given = tokens(np.float64)
    np.savez(tmp_path / "tokens.npz", values=given.values, lengths=given.lengths.astype(np.uint8))
    back = load_tokens(tmp_path / "tokens.npz", IDS)
    np.testing.assert_array_equal(back.values, given.values.astype(np.float32))
    assert back.lengths.dtype == np.int32


def bad_tokens():
    good = {"values": tokens().values, "lengths": tokens().lengths}
    nan = good["values"].copy()
    nan[2, 0, 1] = np.nan  # valid; item 30
    huge = np.full((4, 3, 2), 1e300)
    return {
        "no lengths": ({"values": good["values"]}, "lacks 'lengths'"),
        "flat": ({**good, "values": good["values"][:, 0]}, r"'values' is float16 \(4, 2\)"),
        "ints": ({**good, "values": good["values"].astype(int)}, "'values' is int64"),
        "no tokens": ({**good, "values": good["values"][:, :0]}, r"'values' is .*\(4, 0, 2\)"),
        "lengths": ({**good, "lengths": good["lengths"][:3]}, r"'lengths' is int32 \(3,\)"),
        "real lengths": ({**good, "lengths": np.ones(4)}, "'lengths' is float64"),
        "long": ({**good, "lengths": np.array([3, 0, 4, 9])}, "row 2 of 'lengths' is 4"),
        "negative": ({**good, "lengths": np.array([3, -1, 1, 2])}, "row 1 of 'lengths' is -1"),
        "rows": ({k: v[:3] for k, v in good.items()}, "holds 3 items, but the data set has 4"),
        "nan": ({**good, "values": nan}, "valid token of item 30 is not finite"),
        "infinite": ({**good, "values": huge}, "valid token of item 10 is not finite"),
        "missing id": (
            {**{k: v[:3] for k, v in good.items()}, "item_ids": np.array([10, 30, 40])},
            r"lacks item 20 \(1 of 4",
        ),
        "unknown id": (
            {
                "values": np.ones((5, 1, 1)),
                "lengths": np.ones(5, int),
                "item_ids": [10, 20, 99, 30, 40],
            },
            "row 3, column item_ids: 99 is no item",
        ),
        "double id": ({**good, "item_ids": [10, 20, 30, 20]}, "row 4, column item_ids: 20 comes"),
        "string ids": ({**good, "item_ids": list("abcd")}, "holds String, but .* Int64"),
        "few ids": ({**good, "item_ids": [10, 20]}, r"'item_ids' has shape \(2,\): give 4"),
        "pickled ids": ({**good, "item_ids": np.array(["a", 1, 2, 3], object)}, "cannot be read"),
    }


@pytest.mark.parametrize("kind", bad_tokens())
def test_bad_tokens(tmp_path, kind):
    arrays, match = bad_tokens()[kind]
    path = tmp_path / "tokens.npz"
    np.savez(path, **arrays)
    refused(load_tokens, path, IDS, match=f"tokens.npz.*{match}")


@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "damaged", "npy", "text", "folder"])
def test_unreadable_tokens(tmp_path, kind):
    path = tmp_path / "tokens.npz"
    tokens(items=4, width=3, dim=100).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    if kind in ("missing", "folder"):
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "npy":
        with open(path, "wb") as file:
            np.save(file, X)
    elif kind != "missing":
        half = path.read_bytes()[:900]
        path.write_bytes({"empty": b"", "cut": half, "damaged": content, "text": b"1,2\n"}[kind])
    refused(load_tokens, path, IDS, match="tokens.npz: cannot be read")


# ---- load_vectors: .npy


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8])
@pytest.mark.parametrize("order", "CF")
def test_npy_in_row_order(tmp_path, dtype, order):
    np.save(tmp_path / "x.npy", np.asarray(X, dtype, order=order))
    vectors = load_vectors(tmp_path / "x.npy", IDS)
    assert vectors.dtype == np.float32
    assert not isinstance(vectors, np.memmap)
    np.testing.assert_array_equal(vectors, X)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_npy_as_memory_map(tmp_path, dtype):
    x = X.astype(dtype)
    x[3, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    vectors = load_vectors(tmp_path / "x.npy", IDS, mmap=True)
    assert isinstance(vectors, np.memmap)
    assert vectors.dtype == dtype
    np.testing.assert_array_equal(vectors, x)
    refused(check_vectors, vectors, "--vectors x.npy", match="--vectors x.npy: row 3 is not finite")
    refused(load_vectors, tmp_path / "x.npy", IDS, match="--vectors .*x.npy: row 3 is not finite")


def test_memory_map_of_another_type(tmp_path):
    np.save(tmp_path / "x.npy", X.astype(np.float64))
    refused(load_vectors, tmp_path / "x.npy", IDS, mmap=True, match="float64.*write float16 or")


def test_npy_of_other_shape(tmp_path):
    for x, shape in ((X[:3], r"\(3, 3\)"), (X[:, 0], r"\(4,\)"), (X[:, :0], r"\(4, 0\)")):
        np.save(tmp_path / "x.npy", x)
        for mmap in (False, True):
            match = f"shape {shape}, but the data set has 4 items"
            refused(load_vectors, tmp_path / "x.npy", IDS, mmap=mmap, match=match)


# ---- load_vectors: .parquet


def write(tmp_path, frame):
    path = tmp_path / "x.parquet"
    frame.write_parquet(path)
    return path


@pytest.mark.parametrize("ids", [IDS, NAMES])
@pytest.mark.parametrize(
    "dtype",
    [
        pl.List(pl.Float32),
        pl.List(pl.Float64),
        pl.List(pl.Int16),
        pl.Array(pl.Float32, 3),
        pl.Array(pl.Float64, 3),
    ],
)
def test_parquet_is_joined_by_id(tmp_path, ids, dtype):
    stranger = pl.Series("item_id", [9]).cast(ids.dtype)
    order = pl.concat([ids[[2, 0]], stranger, ids[[3, 1]]])
    rows = [X[2], X[0], [7, 7, 7], X[3], X[1]]
    vectors = pl.Series("embedding", [[float(v) for v in row] for row in rows]).cast(dtype)
    loaded = load_vectors(write(tmp_path, pl.DataFrame([order, vectors])), ids)
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, X)


def test_parquet_takes_the_column_vector_among_others(tmp_path):
    ids = IDS.cast(pl.Int32)
    frame = pl.DataFrame({"text": list("abcd"), "vector": X.tolist(), "item_id": ids})
    np.testing.assert_array_equal(load_vectors(write(tmp_path, frame), IDS), X)


def bad_parquet():
    rows = X.tolist()

    def frame(ids=(10, 20, 30, 40), vector=rows, dtype=None):
        return pl.DataFrame({"item_id": ids, "vector": pl.Series(vector, dtype=dtype)})

    nan = [rows[0], [1.0, float("nan"), 2.0], *rows[2:]]
    return {
        "no id": (frame().rename({"item_id": "id"}), "columns id, vector: give 'item_id'"),
        "no vector": (frame().select("item_id"), "columns item_id: give"),
        "two others": (
            frame().rename({"vector": "a"}).with_columns(b="a"),
            "columns item_id, a, b: give",
        ),
        "no list": (frame(vector=[1.0, 2, 3, 4]), "column vector: holds Float64"),
        "words": (frame(vector=[["a"]] * 4), r"column vector: holds List\(String\)"),
        "matrices": (frame(vector=[[[1.0]]] * 4), "column vector: holds List"),
        "string ids": (frame(ids=list("abcd")), "column item_id: holds String, but .* Int64"),
        "real ids": (frame(ids=[1.0, 2.0, 3.0, 4.0]), "column item_id: holds Float64"),
        "empty id": (frame(ids=[10, None, 30, 40]), "row 2, column item_id: an empty value"),
        "double id": (frame(ids=[10, 20, 30, 10]), "row 4, column item_id: 10 comes twice"),
        "missing id": (frame(ids=[10, 20, 31, 41]), r"lacks item 30 \(2 of 4 items"),
        "short": (
            frame(vector=[*rows[:2], [1.0], rows[3]]),
            r"row 3, column vector: a vector of 1 numbers, others have 3",
        ),
        "null": (frame(vector=[*rows[:3], None]), "row 4, column vector: no vector"),
        "empty": (frame(vector=[[]] * 4, dtype=pl.List(pl.Float32)), "row 1, .* no vector"),
        "all null": (frame(vector=[None] * 4, dtype=pl.List(pl.Float32)), "row 1, .* no vector"),
        "nan": (frame(vector=nan), "row 2, column vector: is not finite"),
        "hole": (frame(vector=[*rows[:3], [1.0, None, 2.0]]), "row 4, column vector: is not fin"),
        "huge": (frame(vector=[*rows[:3], [1.0, 1e300, 2.0]]), "row 4, column vector: is not fin"),
        "int hole": (frame(vector=[[1, 2]] * 3 + [[1, None]]), "row 4, column vector: is not fin"),
    }


@pytest.mark.parametrize("kind", bad_parquet())
def test_bad_parquet(tmp_path, kind):
    frame, match = bad_parquet()[kind]
    path = write(tmp_path, frame)
    refused(load_vectors, path, IDS, match=f"--vectors .*x.parquet.*{match}")


def test_bad_rows_are_counted_in_the_file(tmp_path):
    """Row numbers are those of the file, not of the data set."""
    vectors = [[1.0, 2.0], [1.0, 2.0], [1.0, float("inf")], [1.0, 2.0]]
    frame = pl.DataFrame({"item_id": [40, 30, 10, 20], "vector": vectors})
    refused(load_vectors, write(tmp_path, frame), IDS, match="row 3, column vector: is not finite")


@pytest.mark.parametrize("kind", ["missing", "empty", "no parquet", "folder"])
def test_unreadable_parquet(tmp_path, kind):
    path = tmp_path / "x.parquet"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"empty": b"", "no parquet": b"1,2\n3,4\n"}[kind])
    refused(load_vectors, path, IDS, match="--vectors .*x.parquet: cannot be read")


# ---- checks and hashes


def test_check_vectors():
    check_vectors(X, "x")
    check_vectors(X[:1], "x")  # one item is as good as its catalogue
    last = np.ones((5, 3), np.float32)
    last[4, 2] = 2
    check_vectors(last, "x")
    refused(check_vectors, np.ones((5, 3)), "--text m", match="--text m: all 5 rows are equal")
    for bad in (np.nan, np.inf, -np.inf):
        last[3, 0] = bad
        refused(check_vectors, last, "x", match="x: row 3 is not finite")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_distinct_rows(dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(-1, 2, (200, 3)).astype(dtype)
    x[x == 0] *= rng.choice([-1, 1], (x == 0).sum())  # 0 and -0 are equal
    assert distinct_rows(x) == len(np.unique(x, axis=0))
    assert distinct_rows(x.T.copy().T) == len(np.unique(x, axis=0))
    assert distinct_rows(x[:0]) == 0


def test_fingerprint_sees_values_shape_and_type(tmp_path):
    first = fingerprint(X)
    assert len(first) == 16
    assert int(first, 16) >= 0
    changed = X.copy()
    changed[3, 2] += 1
    others = [changed, X.reshape(2, 6), X.astype(np.float16), X[:3], X.view(np.int32)]
    assert len({first, *map(fingerprint, others)}) == 6
    np.save(tmp_path / "x.npy", X)
    for same in (np.load(tmp_path / "x.npy", mmap_mode="r"), np.asfortranarray(X), X.astype(">f4")):
        assert fingerprint(same) == first
