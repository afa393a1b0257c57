"""Lists that were shown: where they lie, and what became of them."""

import dataclasses

import helpers
import numpy as np
import polars as pl
import pytest

from onerec_jax.data.exposures import RewardBatchBuilder
from onerec_jax.data.features import action_log, build_feature_spec, item_features
from onerec_jax.data.session_windows import (
    Lists,
    ListStream,
    SessionLabelRule,
    Windows,
    check_windows,
    make_windows,
    padded_lists,
    watch_seconds,
    window_labels,
)
from onerec_jax.data.sessions import session_of_action
from onerec_jax.data.splits import make_split
from onerec_jax.errors import InputError
from onerec_jax.inputs import PositiveRule
from onerec_jax.models.session_reward import SessionRewardConfig


@pytest.fixture(scope="module")
def data():
    return helpers.full_dataset(users=9)  # sessions by the gaps between actions


def test_against_a_loop(data):
    rng = np.random.default_rng(0)
    session, length = session_of_action(data), np.diff(data.offsets)
    start = rng.integers(0, 3, data.num_users)
    end = np.maximum(length - rng.integers(0, 3, data.num_users), 0)
    expected = []
    for user in range(data.num_users):
        held, number = [], None
        for position in range(start[user], end[user]):
            row = data.offsets[user] + position
            if session[row] != number:
                held, number = [], session[row]
            held.append(position)
            if len(held) == 2:
                expected.append((user, held[0]))
                held = []
    found = make_windows(data, start, end, 2)
    assert list(zip(found.user, found.position, strict=True)) == expected
    assert len(expected) > 5
    rows = found.rows(data.offsets)
    assert (np.diff(rows) == 1).all()
    assert (session[rows[:, 0]] == session[rows[:, 1]]).all()
    assert (data.interactions["user_row"].to_numpy()[rows] == found.user[:, None]).all()


def columns(data, **values):
    """The data set with other columns at its first four actions."""
    frame = data.interactions
    for name, new in values.items():
        old = frame[name].to_list() if name in frame.columns else [0] * frame.height
        frame = frame.with_columns(pl.Series(name, [*new, *old[4:]], dtype=pl.Float32))
    return dataclasses.replace(data, interactions=frame)


def test_labels_by_hand(data):
    """Two lists of the first user; what is unknown of an item leaves open what it could change."""
    some = columns(
        data,
        playtime_s=[8.0, None, 3.0, 30.0],
        follow=[0, 1, 0, 0],
        like=[0, None, None, 1],
    )
    catalogue = some.items.with_columns(pl.lit(50.0).cast(pl.Float32).alias("duration_s"))
    some = dataclasses.replace(some, items=catalogue)
    two = Windows(np.zeros(2, np.int32), np.array([0, 2], np.int32), 2)
    assert two.rows(some.offsets).tolist() == [[0, 1], [2, 3]]
    found = window_labels(some, two, SessionLabelRule(), 33.0)
    assert {name: x.tolist() for name, x in found.items()} == {
        "swt": [-1, 1],  # 8 s and more; 33 s
        "vtr": [1, 1],  # one of two effective views is half of them
        "wtr": [1, 0],
        "ltr": [-1, 1],
    }
    strict = SessionLabelRule(view_share=0.6)
    assert window_labels(some, two, strict, 33.0, ["vtr"])["vtr"].tolist() == [-1, 0]
    assert window_labels(some, two, strict, 8.0, ["swt"])["swt"].tolist() == [1, 1]
    assert watch_seconds(some, two, SessionLabelRule()) == (8 + 33) / 2
    assert watch_seconds(some, two, SessionLabelRule(watch_s=12.0)) == 12


def test_heads_that_the_data_has(data):
    one = Windows(np.zeros(1, np.int32), np.zeros(1, np.int32), 2)
    rule = SessionLabelRule()
    assert list(window_labels(data, one, rule, 1.0)) == ["swt", "vtr", "ltr"]
    bare = dataclasses.replace(data, interactions=data.interactions.drop("playtime_s", "like"))
    assert list(window_labels(bare, one, rule, None)) == ["ltr"]  # by ratings
    assert watch_seconds(bare, one, rule) is None
    bare = dataclasses.replace(bare, interactions=bare.interactions.drop("rating"))
    with pytest.raises(InputError, match="a session reward cannot be learned"):
        window_labels(bare, one, rule, None)
    with pytest.raises(InputError, match="--heads wtr: data set 'toy' has no follow"):
        window_labels(data, one, rule, 1.0, ["wtr"])
    with pytest.raises(InputError, match="--heads ctr: choose among swt, vtr, wtr, ltr"):
        window_labels(data, one, rule, 1.0, ["ctr"])


def test_flags_that_fit_nothing(data):
    with pytest.raises(InputError, match="--labels.view-share 0"):
        SessionLabelRule(view_share=0.0)
    with pytest.raises(InputError, match="--labels.watch-s -1"):
        SessionLabelRule(watch_s=-1.0)
    length = np.diff(data.offsets)
    none = make_windows(data, np.zeros_like(length), length, 99)
    with pytest.raises(InputError, match=r"--items 99: no session .* 'train' \(the longest"):
        check_windows(data, {"train": none})


@pytest.fixture(scope="module")
def lists(data):
    """A builder and labelled lists, among them some without a history."""
    cfg = SessionRewardConfig(history_length=70)
    ids, split = helpers.random_ids(data.num_items), make_split(data)
    spec = build_feature_spec(data, split, ids, PositiveRule())
    items = item_features(data, split, ids, spec)
    known = np.ones(data.num_items, bool)
    builder = RewardBatchBuilder(action_log(data, spec), items, cfg, known)
    length = np.diff(data.offsets)
    windows = make_windows(data, np.zeros_like(length), length, 2)
    rng = np.random.default_rng(0)
    label = rng.integers(-1, 2, (len(windows), 3)).astype(np.int8)
    of_items = rng.integers(-1, 2, (len(data.item_rows), 2)).astype(np.int8)
    return builder, Lists(windows, label, of_items)


def test_batches_hold_what_came_before(data, lists):
    builder, lists = lists
    batch = lists.batch(builder)
    windows, rows = lists.windows, lists.windows.rows(data.offsets)
    np.testing.assert_array_equal(batch.history.length, windows.position)
    np.testing.assert_array_equal(batch.target.sid, builder.items.sid[data.item_rows[rows]])
    np.testing.assert_array_equal(batch.session_label[:, 0], lists.label_no)
    np.testing.assert_array_equal(batch.label, lists.item_label[rows])
    time_s = data.column("time_s")
    for i in range(len(lists)):
        for place in range(windows.position[i]):
            before = rows[i, 0] - 1 - place
            assert batch.seconds[i, place] == time_s[rows[i, 0]] - time_s[before]
            assert batch.history.item[i, place] == 1 + data.item_rows[before]
    parts = list(padded_lists(builder, lists, 4))
    assert sum(real for _, real in parts) == len(lists)
    whole = np.concatenate([part.target.sid[:real] for part, real in parts])
    np.testing.assert_array_equal(whole, batch.target.sid)


def test_a_stream_goes_on_where_it_is_asked_to(lists):
    builder, lists = lists
    stream = ListStream(builder, lists, 3, seed=5)
    batches = stream()
    passed = [next(batches) for _ in range(6)]
    late = next(stream(4))
    np.testing.assert_array_equal(late.target.sid, passed[4].target.sid)
    np.testing.assert_array_equal(late.session_label, passed[4].session_label)
    assert any((x.target.sid != passed[0].target.sid).any() for x in passed[1:])
