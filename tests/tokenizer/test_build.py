"""From a data set to its table: fitted on training items only, refusing what does not fit."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from onerec_jax.data.schema import build_dataset
from onerec_jax.data.splits import item_popularity, make_split
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.build import TokenizerConfig, load_vectors, tokenize

ITEMS = 24
CFG = TokenizerConfig(codebook_size=4, iterations=5, text_dim=4)


def dataset_of(texts=None):
    """Eight users of four actions: items 0 to 15 are trained on, 16 to 19 only tested, 20+ unseen.

    Every user's last two actions are validation and test.
    """
    rows = [
        (user, item) for user in range(8) for item in (2 * user, 2 * user + 1, 3, 16 + user % 4)
    ]
    items = pl.DataFrame({"item_id": list(range(ITEMS))})
    if texts is not None:
        items = items.with_columns(pl.Series("text", texts))
    frame = pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")
    meta = {"origin": "a test", "licence": "none"}
    return build_dataset("toy", items, None, frame, meta=meta, split="leave-one-out")


def texts():
    rng = np.random.default_rng(0)
    words = ["war", "love", "space", "dog", "sea", "film", "red", "blue"]
    return [" ".join(rng.choice(words, 4)) for _ in range(ITEMS)]


def test_the_data_set_is_as_described():
    popularity = item_popularity(dataset_of(), make_split(dataset_of()))
    np.testing.assert_array_equal(popularity > 0, np.arange(ITEMS) < 16)


def test_table_and_manifest():
    dataset = dataset_of(texts())
    ids = tokenize(dataset, CFG)
    assert ids.sids.shape == (ITEMS, 3)
    assert ids.sids.dtype == np.int32
    assert ids.sids.min() >= 0
    assert ids.sids.max() < 4
    assert ids.codebooks.shape == (3, 4, 4)
    assert ids.manifest["dataset_fingerprint"] == dataset.fingerprint
    assert ids.manifest["fitted_items"] == 16
    assert ids.manifest["items"] == ITEMS
    assert ids.manifest["settings"]["codebook_size"] == 4
    report = ids.manifest["quality"]
    assert report["distinct_ids"] == len(np.unique(ids.sids, axis=0))
    assert report["distinct_ids"] >= report["before_spreading"]["distinct_ids"]
    assert tokenize(dataset, CFG).fingerprint == ids.fingerprint


def test_text_of_a_test_item_does_not_move_the_others():
    """Codebooks and codes of all other items stay; with spreading, those it may not outrank."""
    plain, changed = texts(), texts()
    changed[17] = "zebra zebra war war war"
    keep = dataclasses.replace(CFG, collisions="keep")
    before, after = tokenize(dataset_of(plain), keep), tokenize(dataset_of(changed), keep)
    np.testing.assert_array_equal(before.codebooks, after.codebooks)
    others = np.arange(ITEMS) != 17
    np.testing.assert_array_equal(before.sids[others], after.sids[others])
    assert (before.sids[17] != after.sids[17]).any()
    # Training items choose first, so that an item without training actions cannot displace them.
    before, after = tokenize(dataset_of(plain), CFG), tokenize(dataset_of(changed), CFG)
    np.testing.assert_array_equal(before.sids[:16, :-1], after.sids[:16, :-1])


def test_text_of_a_training_item_does_move_the_codebooks():
    """The counterpart: the test above would pass for codebooks that read no text."""
    changed = texts()
    changed[3] = "war war war"
    before, after = tokenize(dataset_of(texts()), CFG), tokenize(dataset_of(changed), CFG)
    assert not np.array_equal(before.codebooks, after.codebooks)


def save(tmp_path, vectors):
    path = tmp_path / "vectors.npy"
    np.save(path, vectors)
    return path


def test_given_vectors_are_used_in_row_order(tmp_path):
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((ITEMS, 6)).astype(np.float32)
    vectors[20] = vectors[5]  # never seen, but the same vector as a training item
    keep = dataclasses.replace(CFG, collisions="keep")
    ids = tokenize(dataset_of(), keep, save(tmp_path, vectors))
    np.testing.assert_array_equal(ids.sids[20], ids.sids[5])
    assert "before_spreading" not in ids.manifest["quality"]
    spread = tokenize(dataset_of(), CFG, save(tmp_path, vectors))
    assert (spread.sids[20] != spread.sids[5]).any()
    np.testing.assert_array_equal(spread.sids[:, :-1], ids.sids[:, :-1])
    np.testing.assert_array_equal(spread.codebooks, ids.codebooks)
    # The most popular item of every prefix chooses first and so keeps its nearest code.
    popularity = item_popularity(dataset_of(), make_split(dataset_of()))
    for prefix in np.unique(ids.sids[:, :-1], axis=0):
        rows = np.flatnonzero((ids.sids[:, :-1] == prefix).all(1))
        first = rows[np.argmax(popularity[rows])]
        assert spread.sids[first, -1] == ids.sids[first, -1]


def test_default_size_never_exceeds_the_training_items():
    ids = tokenize(dataset_of(texts()), dataclasses.replace(CFG, codebook_size=0))
    assert ids.codebook_size == 16


def refused(*args, match):
    with pytest.raises(InputError, match=match) as caught:
        tokenize(*args)
    assert "\n" not in str(caught.value)


def test_codebook_larger_than_the_catalogue():
    cfg = dataclasses.replace(CFG, codebook_size=17)
    refused(dataset_of(texts()), cfg, match=r"--tokenizer.codebook-size 17 .* 16 training items")


def test_neither_text_nor_vectors():
    refused(dataset_of(), CFG, match="'text'.*--vectors")


def bad_vectors():
    finite = np.ones((ITEMS, 2))
    nan, infinite = finite.copy(), finite.copy()
    nan[7, 1], infinite[9, 0] = np.nan, 1e300
    return {
        "rows": (np.ones((ITEMS - 1, 2)), r"shape \(23, 2\).*24 items"),
        "flat": (np.ones(ITEMS), r"shape \(24,\)"),
        "nan": (nan, "row 7 is not finite"),
        "too large": (infinite, "row 9 is not finite"),
        "objects": (np.array([[None]] * ITEMS), "cannot be read"),
        "words": (np.array([["a", "b"]] * ITEMS), "--vectors"),
    }


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("kind", bad_vectors())
def test_bad_vectors(tmp_path, kind):
    vectors, match = bad_vectors()[kind]
    refused(dataset_of(), CFG, save(tmp_path, vectors), match=match)


@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "no npy", "npz", "folder"])
def test_unreadable_vectors(tmp_path, kind):
    path = save(tmp_path, np.ones((ITEMS, 2)))
    if kind == "missing":
        path.unlink()
    elif kind == "npz":
        np.savez(path.with_suffix(".npz"), np.ones((ITEMS, 2)))
        path = path.with_suffix(".npz")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        content = path.read_bytes()
        path.write_bytes({"empty": b"", "cut": content[:200], "no npy": b"1,2\n3,4\n"}[kind])
    with pytest.raises(InputError, match="--vectors .*vectors.np"):
        load_vectors(path, ITEMS)
