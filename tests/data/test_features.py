"""Vocabularies and arrays of features against loops over the tables."""

import dataclasses
import math
import zlib

import helpers
import numpy as np
import polars as pl
import pytest

from onerec_jax.data.features import (
    action_log,
    build_feature_spec,
    item_features,
    log_bucket,
    positive_actions,
)
from onerec_jax.data.splits import make_split, train_mask
from onerec_jax.errors import InputError
from onerec_jax.inputs import TIME_BUCKETS, FeatureConfig, PositiveRule, StaticFeature


def spec_of(dataset, ids=None, **config):
    """Without the user's id unless asked for."""
    ids = ids or helpers.random_ids(dataset.num_items)
    config = FeatureConfig(**{"user_id": False, **config})
    return build_feature_spec(dataset, make_split(dataset), ids, PositiveRule(), config)


def bucket(seconds, per_octave):
    if seconds is None or math.isnan(seconds):
        return 0
    return min(1 + math.floor(per_octave * math.log2(1 + max(seconds, 0))), TIME_BUCKETS - 1)


def test_log_bucket():
    seconds = [0, 0.4, 1, 3, 60, 86_400, 2**30, 2**60, -5, np.nan]
    assert log_bucket(seconds).tolist() == [bucket(s, 2) for s in seconds]
    assert log_bucket(seconds)[[0, 2, 3, -1]].tolist() == [1, 3, 5, 0]  # by hand
    assert log_bucket(seconds, 4).tolist() == [bucket(s, 4) for s in seconds]
    assert log_bucket(seconds).dtype == np.int32
    steps = log_bucket(np.arange(100_000))
    assert (np.diff(steps) >= 0).all()
    assert steps.max() < TIME_BUCKETS


def test_spec_of_a_full_data_set():
    dataset = helpers.full_dataset()
    spec = spec_of(dataset)
    assert (spec.num_items, spec.levels, spec.codebook_size) == (12, 3, 5)
    tags = dataset.items["tags"].to_list()
    assert spec.tags == tuple(sorted({tag for words in tags for tag in words}))
    assert spec.tags_per_item == max(map(len, tags))
    assert spec.num_authors == 4
    assert spec.has_time
    assert spec.has_playtime
    assert spec.has_duration
    assert spec.labels == ("click", "like", "rating=1", "rating=3.5", "rating=5")
    gender = StaticFeature("gender", "words", 2, ("f", "m"))
    assert spec.static == (gender, StaticFeature("age", "words", 3, ("20", "30", "40")))
    assert not spec.clustered
    ids = tuple(map(str, range(7)))
    assert spec_of(dataset, user_id=True).static[0] == StaticFeature("user_id", "words", 7, ids)


def test_spec_of_bare_sequences():
    dataset = helpers.full_dataset()
    bare = dataclasses.replace(
        dataset,
        items=dataset.items.select("item_id"),
        users=dataset.users.select("user_id"),
        interactions=dataset.interactions.select(
            "user_id", "item_id", "position", "user_row", "item_row"
        ),
    )
    spec = spec_of(bare)
    assert spec == helpers.bare_spec(num_items=12)
    log = action_log(bare, spec)
    assert (log.time_s, log.playtime, log.label) == (None, None, None)
    assert log.static.shape == (bare.num_users, 0)
    assert len(log.positive_rows) == len(log.item)  # a bare action is positive by itself
    features = item_features(bare, make_split(bare), helpers.random_ids(12), spec)
    assert (features.tags, features.author, features.duration) == (None, None, None)


def test_rating_values_come_from_the_training_part_only():
    dataset = helpers.full_dataset()
    training = train_mask(dataset, make_split(dataset))
    ratings = dataset.interactions["rating"].to_list()
    changed = [r if t else 2.0 for r, t in zip(ratings, training, strict=True)]
    series = pl.Series("rating", changed, dtype=pl.Float32)
    other = dataclasses.replace(dataset, interactions=dataset.interactions.with_columns(series))
    assert spec_of(other) == spec_of(dataset)
    label = action_log(other, spec_of(other)).label
    assert (label[~training][:, 2:] == 0).all()  # an unknown rating sets no bit


def test_fine_ratings_are_no_label():
    dataset = helpers.full_dataset(users=30)
    count = dataset.interactions.height
    fine = dataset.interactions.with_columns(
        pl.Series("rating", np.arange(count) / 7, dtype=pl.Float32)
    )
    spec = spec_of(dataclasses.replace(dataset, interactions=fine))
    assert spec.labels == ("click", "like")


def test_every_rating_value_finds_its_bit():
    """Also values that no short decimal stands for."""
    dataset = helpers.full_dataset()
    count = dataset.interactions.height
    thirds = pl.Series("rating", (np.arange(count) % 4) / 3, dtype=pl.Float32)
    dataset = dataclasses.replace(dataset, interactions=dataset.interactions.with_columns(thirds))
    spec = spec_of(dataset)
    label = action_log(dataset, spec).label
    bits = [i for i, name in enumerate(spec.labels) if name.startswith("rating=")]
    np.testing.assert_array_equal(label[:, bits].sum(1), 1)


def test_table_for_another_data_set():
    with pytest.raises(InputError, match="cover 13 items.*has 12.*experiments.tokenize"):
        spec_of(helpers.full_dataset(), helpers.random_ids(13))


def test_item_arrays_against_loops():
    dataset, ids = helpers.full_dataset(), helpers.random_ids(12)
    spec = spec_of(dataset, ids)
    features = item_features(dataset, make_split(dataset), ids, spec)
    np.testing.assert_array_equal(features.sid, ids.sids)
    assert features.tags.shape == (12, spec.tags_per_item)
    authors = sorted({a for a in dataset.items["author_id"].to_list() if a})
    for row, item in enumerate(dataset.items.iter_rows(named=True)):
        names = [spec.tags[index - 1] for index in features.tags[row] if index]
        assert sorted(names) == sorted(set(item["tags"]))
        assert (np.diff((features.tags[row] > 0).astype(int)) <= 0).all()  # padding behind
        author = item["author_id"]
        assert features.author[row] == (authors.index(author) + 1 if author else 0)
        assert features.duration[row] == bucket(item["duration_s"], 4)
    for array in (features.tags, features.author, features.duration):
        assert array.dtype == np.int32


def test_an_item_of_many_tags_keeps_the_most_frequent():
    dataset = helpers.full_dataset()
    tags = [[f"t{i}" for i in range(row, 12)] for row in range(12)]  # t11 is on every item
    items = dataset.items.with_columns(pl.Series("tags", tags))
    dataset, ids = dataclasses.replace(dataset, items=items), helpers.random_ids(12)
    spec = spec_of(dataset, ids)
    assert spec.tags_per_item == 8
    features = item_features(dataset, make_split(dataset), ids, spec)
    names = {spec.tags[index - 1] for index in features.tags[0]}
    assert names == {f"t{i}" for i in range(4, 12)}


def test_action_arrays_against_loops():
    dataset = helpers.full_dataset()
    spec = spec_of(dataset)
    log = action_log(dataset, spec)
    np.testing.assert_array_equal(log.offsets, dataset.offsets)
    np.testing.assert_array_equal(log.item, dataset.item_rows)
    for n, action in enumerate(dataset.interactions.iter_rows(named=True)):
        assert log.time_s[n] == action["time_s"]
        assert log.playtime[n] == bucket(action["playtime_s"], 4)
        expected = [
            (action["click"] or 0) > 0,
            (action["like"] or 0) > 0,
            *(action["rating"] == value for value in (1, 3.5, 5)),
        ]
        assert log.label[n].tolist() == expected
    for row, user in enumerate(dataset.users.iter_rows(named=True)):
        gender = ("f", "m").index(user["gender"]) + 1 if user["gender"] else 0
        assert log.static[row].tolist() == [gender, (20, 30, 40).index(user["age"]) + 1]


def test_positive_actions_against_loops():
    dataset = helpers.full_dataset(users=20)
    rule = PositiveRule(min_rating=4, min_watch_ratio=0.5, actions=("like", "follow"))
    durations = dataset.items["duration_s"].to_list()
    expected = []
    for action in dataset.interactions.iter_rows(named=True):
        duration, playtime = durations[action["item_row"]], action["playtime_s"]
        watched = bool(duration) and playtime is not None and playtime >= 0.5 * duration
        liked, rating = action["like"] == 1, action["rating"]
        expected.append(liked or watched or (rating is not None and rating >= 4))
    actual = positive_actions(dataset, rule)
    np.testing.assert_array_equal(actual, expected)
    assert 0 < actual.mean() < 1
    only = positive_actions(dataset, dataclasses.replace(rule, min_rating=9, min_watch_ratio=1e9))
    assert only.sum() == sum(v == 1 for v in dataset.interactions["like"].to_list())


def test_columns_of_many_values_are_bucketed_or_hashed():
    dataset = helpers.full_dataset(users=30)
    followers = [None, -3, *(7 * i**2 for i in range(28))]
    people = dataset.users.with_columns(
        pl.Series("followers", followers), pl.Series("town", [f"town {i}" for i in range(30)])
    )
    dataset = dataclasses.replace(dataset, users=people)
    spec = spec_of(dataset, max_words=9, hash_buckets=5, user_id=True)
    assert [(f.name, f.kind, f.size) for f in spec.static] == [
        ("user_id", "hash", 5),
        ("gender", "words", 2),
        ("age", "words", 3),
        ("followers", "log", TIME_BUCKETS - 1),
        ("town", "hash", 5),
    ]
    static = action_log(dataset, spec).static
    assert static[:, 3].tolist() == [bucket(value, 2) for value in followers]
    towns = [1 + zlib.crc32(f"town {i}".encode()) % 5 for i in range(30)]
    assert static[:, 4].tolist() == towns
    assert static[:, 0].min() >= 1
    assert spec == type(spec).from_json(spec.to_json())


def test_many_authors_are_hashed():
    dataset = helpers.full_dataset()
    spec = spec_of(dataset, hash_buckets=3)
    assert (spec.num_authors, spec.authors_hashed) == (3, True)
    features = item_features(dataset, make_split(dataset), helpers.random_ids(12), spec)
    for row, author in enumerate(dataset.items["author_id"].to_list()):
        assert features.author[row] == (1 + zlib.crc32(author.encode()) % 3 if author else 0)


def test_watched_share_is_of_the_duration_logged_with_the_action():
    """Else of the item's; where neither is known, nothing was watched in full."""
    dataset = helpers.full_dataset(users=20)
    rng = np.random.default_rng(0)
    logged = [None if i % 3 else float(x) for i, x in enumerate(rng.random(len(dataset.item_rows)))]
    frame = dataset.interactions.with_columns(pl.Series("duration_s", logged, dtype=pl.Float32))
    dataset = dataclasses.replace(dataset, interactions=frame)
    rule = PositiveRule(min_rating=9, min_watch_ratio=0.5, actions=())
    items = dataset.items["duration_s"].to_list()
    expected = []
    for action in frame.iter_rows(named=True):
        duration = action["duration_s"] or items[action["item_row"]]
        watched = action["playtime_s"] is not None and bool(duration)
        expected.append(watched and action["playtime_s"] >= 0.5 * duration)
    np.testing.assert_array_equal(positive_actions(dataset, rule), expected)


def test_profile_visits_are_a_label():
    dataset = helpers.full_dataset()
    frame = dataset.interactions.with_columns(pl.lit(1, pl.Int8).alias("profile_enter"))
    dataset = dataclasses.replace(dataset, interactions=frame)
    spec = spec_of(dataset)
    assert "profile_enter" in spec.labels
    assert action_log(dataset, spec).label[:, spec.labels.index("profile_enter")].all()
