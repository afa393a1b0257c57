"""The table of semantic IDs in memory and on disk."""

import dataclasses

import helpers
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.tokenizer.semantic_ids import SemanticIds, default_codebook_size, quality


def test_round_trip(tmp_path):
    ids = helpers.random_ids(20)
    ids.save(tmp_path / "a" / "ids")
    loaded = SemanticIds.load(tmp_path / "a" / "ids")
    np.testing.assert_array_equal(loaded.sids, ids.sids)
    np.testing.assert_array_equal(loaded.codebooks, ids.codebooks)
    assert loaded.sids.dtype == np.int32
    assert loaded.manifest == ids.manifest
    assert loaded.fingerprint == ids.fingerprint
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["ids"]
    helpers.random_ids(20, seed=1).save(tmp_path / "a" / "ids")  # replaces the old one
    assert SemanticIds.load(tmp_path / "a" / "ids").fingerprint != ids.fingerprint


def test_a_missing_or_damaged_folder(tmp_path):
    def refused():
        with pytest.raises(InputError, match="experiments.tokenize") as caught:
            SemanticIds.load(tmp_path / "ids")
        assert str(tmp_path / "ids") in str(caught.value)

    refused()
    for damage in ("cut", "empty", "gone"):
        for name in ("sids.npy", "codebooks.npy", "semantic_ids.json"):
            helpers.random_ids(20).save(tmp_path / "ids")
            path = tmp_path / "ids" / name
            if damage == "gone":
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[: 20 if damage == "cut" else 0])
            refused()


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


def test_quality_by_hand():
    sids = np.array([[0, 1], [0, 1], [0, 2], [1, 1]])
    vectors, reconstruction = np.zeros((4, 2)), np.full((4, 2), 0.5)
    report = quality(sids, 4, vectors, reconstruction)
    assert report["reconstruction_loss"] == pytest.approx(0.25)
    assert report["utilisation"] == [0.5, 0.5]
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert report["entropy"] == pytest.approx([entropy, entropy])
    assert report["distinct_ids"] == 3
    assert report["collision_rate"] == pytest.approx(0.25)
    assert report["largest_collision"] == 2
