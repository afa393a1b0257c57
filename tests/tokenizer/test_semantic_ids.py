"""The table of semantic IDs in memory and on disk."""

import dataclasses
import itertools
import json
import shutil

import helpers
import numpy as np
import polars as pl
import pytest

from onerec_jax.errors import InputError
from onerec_jax.tokenizer.semantic_ids import FORMAT, SemanticIds, default_codebook_size, sid_keys

# ------------------------------------------------------------------------------------ int64 keys


def test_keys_order_as_ids_do():
    everything = list(itertools.product(range(4), repeat=3))
    keys = sid_keys(np.array(everything, np.int32), 4)
    assert keys.dtype == np.int64
    np.testing.assert_array_equal(keys, np.arange(64))  # lexicographic, and no two alike
    np.testing.assert_array_equal(
        sid_keys(np.array(everything).reshape(8, 8, 3), 4), keys.reshape(8, 8)
    )


@pytest.mark.parametrize(("levels", "size"), [(4, 8192), (62, 2), (1, 2**62), (900, 1)])
def test_the_largest_keys_that_fit(levels, size):
    largest = np.full((1, levels), size - 1)
    assert sid_keys(largest, size) == size**levels - 1


@pytest.mark.parametrize(("levels", "size"), [(5, 8192), (63, 2), (3, 2**21)])
def test_keys_that_do_not_fit_are_refused(levels, size):
    with pytest.raises(InputError, match=f"^{levels} levels of {size} codes"):
        sid_keys(np.zeros((1, levels), np.int32), size)


# --------------------------------------------------------------------------------------- on disk


def named_ids(item_ids=None, *, items=20, appended=False, seed=0) -> SemanticIds:
    """A table with everything in it."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 5, (items, 3)).astype(np.int32)
    sids = (codes + 1) % 5
    if appended:
        sids = np.concatenate([codes, rng.integers(0, 5, (items, 1))], axis=1).astype(np.int32)
    codebooks = rng.standard_normal((3, 5, 2)).astype(np.float32)
    return SemanticIds(sids, codebooks, {"dataset": "toy"}, codes, item_ids)


@pytest.mark.parametrize("kind", ["int", "string", "string from polars", "none"])
@pytest.mark.parametrize("appended", [False, True])
def test_round_trip(tmp_path, kind, appended):
    words = [f"wörd {i}" for i in range(20)]
    item_ids = {
        "int": np.arange(20) * 10**12,
        "string": np.array(words),
        "string from polars": pl.Series(words).to_numpy(),  # an array of objects
        "none": None,
    }[kind]
    ids = named_ids(item_ids, appended=appended)
    folder = tmp_path / "a" / "ids"
    ids.save(folder)
    loaded = SemanticIds.load(folder)
    np.testing.assert_array_equal(loaded.sids, ids.sids)
    np.testing.assert_array_equal(loaded.codes, ids.codes)
    np.testing.assert_array_equal(loaded.codebooks, ids.codebooks)
    assert loaded.sids.dtype == loaded.codes.dtype == np.int32
    assert loaded.fingerprint == ids.fingerprint
    assert (loaded.levels, loaded.codebook_size) == (3 + appended, 5)
    if item_ids is None:
        assert loaded.item_ids is None
    else:
        assert loaded.item_ids.tolist() == item_ids.tolist()
        assert loaded.item_ids.dtype.kind in "iU"
    extra = {"format", "fingerprint", "files"}
    assert set(loaded.manifest) == {"dataset"} | extra
    assert loaded.manifest["fingerprint"] == ids.fingerprint
    assert set(loaded.manifest["files"]) == {path.name for path in folder.glob("*.npy")}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["ids"]
    loaded.save(folder)  # what was read can be written again, over itself
    assert SemanticIds.load(folder).manifest == loaded.manifest
    named_ids(seed=1).save(folder)  # replaces the old one
    assert SemanticIds.load(folder).fingerprint != ids.fingerprint
    assert SemanticIds.load(folder).item_ids is None


FILES = ("sids.npy", "codebooks.npy", "codes.npy", "item_ids.npy", "semantic_ids.json")


def refused(folder) -> str:
    with pytest.raises(InputError, match="python -m experiments.tokenize") as caught:
        SemanticIds.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "a folder", "one bit", "swapped"])
def test_a_damaged_file(tmp_path, damage, name):
    """Nothing of a table is read unless all of it is as it was written."""
    named_ids(np.arange(20)).save(tmp_path / "ids")
    path = tmp_path / "ids" / name
    content = path.read_bytes()
    if damage in ("gone", "a folder"):
        path.unlink()
        if damage == "a folder":
            path.mkdir()
    elif damage == "swapped":
        named_ids(np.arange(20) + 1, seed=1).save(tmp_path / "other")
        shutil.copy(tmp_path / "other" / name, path)
    elif damage == "one bit":
        place = content.rindex(b"sids.npy") if name.endswith("json") else len(content) - 1
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        path.write_bytes(content[: 20 if damage == "cut" else 0])
    message = refused(tmp_path / "ids")
    if name.endswith(".npy") and damage != "swapped":
        assert f"{path}: is not the file that was written" in message


def test_no_table_at_all(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        refused(folder)
    (tmp_path / "file").write_text("no folder")
    refused(tmp_path / "file")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "onerec_jax semantic ids, version 1"},
        {"format": None},
        {"fingerprint": "0" * 16},
        {"files": None},
        {"files": []},
        {"files": {}},
    ],
    ids=str,
)
def test_a_manifest_that_says_something_else(tmp_path, change):
    named_ids().save(tmp_path / "ids")
    path = tmp_path / "ids" / "semantic_ids.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    message = refused(tmp_path / "ids")
    if "format" in change:
        assert FORMAT in message


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '"ids"', "{}", "{\n", "\xff"])
def test_a_manifest_that_is_none(tmp_path, text):
    named_ids().save(tmp_path / "ids")
    (tmp_path / "ids" / "semantic_ids.json").write_bytes(text.encode("latin1"))
    refused(tmp_path / "ids")


def test_the_table_of_the_first_version(tmp_path):
    """Its manifest had no format."""
    ids = named_ids()
    folder = tmp_path / "ids"
    folder.mkdir()
    np.save(folder / "sids.npy", ids.sids)
    np.save(folder / "codebooks.npy", ids.codebooks)
    (folder / "semantic_ids.json").write_text(json.dumps(ids.manifest))
    assert "format" in refused(folder)


def test_a_write_that_fails_leaves_the_old_table(tmp_path):
    ids = named_ids()
    ids.save(tmp_path / "ids")
    broken = dataclasses.replace(ids, manifest={"quality": object()})
    with pytest.raises(TypeError):
        broken.save(tmp_path / "ids")
    assert SemanticIds.load(tmp_path / "ids").fingerprint == ids.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["ids"]


# ------------------------------------------------------------------------------------- in memory


def test_sizes():
    ids = helpers.random_ids(20, levels=4, codebook_size=7)
    assert (ids.levels, ids.codebook_size) == (4, 7)


def test_fingerprint_changes_with_any_code_and_with_the_size():
    ids = helpers.random_ids(20)
    seen = {ids.fingerprint}
    for row, level in [(0, 0), (19, 2), (7, 1)]:
        sids = ids.sids.copy()
        sids[row, level] = (sids[row, level] + 1) % 5
        seen.add(dataclasses.replace(ids, sids=sids).fingerprint)
    seen.add(dataclasses.replace(ids, codebooks=np.zeros((3, 6, 2), np.float32)).fingerprint)
    assert len(seen) == 5
    assert dataclasses.replace(ids, sids=ids.sids.astype(np.int64)).fingerprint in seen


def test_leaves_are_the_distinct_ids_in_order():
    ids = helpers.random_ids(60, codebook_size=3)
    distinct = sorted({tuple(sid) for sid in ids.sids.tolist()})
    assert [tuple(sid) for sid in ids.leaf_sids.tolist()] == distinct
    assert ids.leaf_of_item.dtype == np.int32
    assert [distinct[leaf] for leaf in ids.leaf_of_item] == [tuple(s) for s in ids.sids.tolist()]


def test_find_against_a_dict():
    ids = helpers.random_ids(30, codebook_size=4)
    place = {tuple(sid): i for i, sid in enumerate(ids.leaf_sids.tolist())}
    everything = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), axis=-1)  # 3-D too
    found = ids.find(everything)
    assert found.shape == (4, 4, 4)
    assert found.dtype == np.int32
    for sid, leaf in zip(everything.reshape(-1, 3).tolist(), found.reshape(-1), strict=True):
        assert leaf == place.get(tuple(sid), -1)
    assert set(found.reshape(-1)) == {-1, *range(len(place))}


def test_find_refuses_what_is_no_code():
    ids = SemanticIds(
        np.array([[1, 0, 0], [0, 0, 3]], np.int32), np.zeros((3, 4, 1), np.float32), {}
    )
    strange = [[-1, -1, -1], [1, 0, -1], [0, 4, 0], [0, 0, 16], [0, 1, -1], [0, 0, 3], [1, 0, 0]]
    np.testing.assert_array_equal(ids.find(np.array(strange)), [-1, -1, -1, -1, -1, 0, 1])


def test_find_with_the_largest_published_codebook():
    ids = SemanticIds(
        np.array([[8191] * 4, [0] * 4], np.int32), np.zeros((4, 8192, 1), np.float32), {}
    )
    np.testing.assert_array_equal(ids.find(ids.sids), [1, 0])


def test_items_by_leaf_against_loops():
    rng = np.random.default_rng(2)
    ids, order = helpers.random_ids(50, codebook_size=3), rng.permutation(50)
    offsets, items = ids.items_by_leaf(order)
    assert items.dtype == np.int32
    assert (offsets[0], offsets[-1]) == (0, 50)
    for leaf, sid in enumerate(ids.leaf_sids.tolist()):
        holders = [row for row in range(50) if ids.sids[row].tolist() == sid]
        expected = sorted(holders, key=lambda row: order[row])
        assert items[offsets[leaf] : offsets[leaf + 1]].tolist() == expected


@pytest.mark.parametrize(
    ("items", "size"),
    [(1, 16), (257, 32), (9066, 128), (67_000_000, 8192), (10**10, 8192)],
)
def test_default_codebook_size(items, size):
    assert default_codebook_size(items) == size


def test_an_appended_code_counts_as_a_level():
    ids = named_ids(appended=True, items=60)
    assert (ids.levels, len(ids.codebooks)) == (4, 3)
    distinct = sorted({tuple(sid) for sid in ids.sids.tolist()})
    assert [tuple(sid) for sid in ids.leaf_sids.tolist()] == distinct
    np.testing.assert_array_equal(ids.find(ids.sids), ids.leaf_of_item)
    offsets, items = ids.items_by_leaf(np.arange(60))
    assert sorted(items) == list(range(60))
    assert len(offsets) == len(distinct) + 1
    longer = dataclasses.replace(ids, sids=ids.codes)
    assert longer.fingerprint != ids.fingerprint


def test_codes_and_item_ids_are_no_part_of_the_fingerprint():
    """A model trained on the IDs does not see them."""
    ids = named_ids(np.arange(20))
    same = dataclasses.replace(ids, codes=None, item_ids=None, manifest={})
    assert same.fingerprint == ids.fingerprint
