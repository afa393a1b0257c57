"""Labels, parts and blocks of exposures; batches that hold nothing of the future."""

import dataclasses

import helpers
import jax
import numpy as np
import polars as pl
import pytest

from onerec_jax.data.exposures import (
    BLOCK,
    ExposureStream,
    LabelRule,
    RewardBatchBuilder,
    check_labels,
    exposure_parts,
    has_exposures,
    make_blocks,
    objective_labels,
    padded_blocks,
    share_of,
)
from onerec_jax.data.features import action_log, build_feature_spec, item_features
from onerec_jax.data.splits import make_split
from onerec_jax.errors import InputError
from onerec_jax.inputs import PositiveRule
from onerec_jax.models.reward import RewardConfig

CFG = RewardConfig(history_length=5)


def dataset(**columns):
    """The helpers' data set with other columns: a value replaces or adds one, None drops it."""
    data = helpers.full_dataset(users=6, split="time")
    rows = data.interactions.drop([name for name, x in columns.items() if x is None])
    added = {name: x for name, x in columns.items() if x is not None}
    return dataclasses.replace(data, interactions=rows.with_columns(**added))


def some(data, values, dtype):
    """A column that begins with these values and goes on with zeros."""
    n = data.interactions.height
    return pl.Series(list(values) + [0] * (n - len(values)), dtype=dtype)


# ----------------------------------------------------------------------------------------- labels


def test_labels_by_hand():
    data = dataset()
    data = dataset(
        long_view=some(data, [1, 0, None], pl.Int8),
        rating=some(data, [4.0, 3.9, None], pl.Float32),
        like=None,
        playtime_s=some(data, [6.9, 7.0, None, 7.0, 2.0], pl.Float32),
    )
    duration = np.full(data.num_items, 60.0)
    duration[data.item_rows[3]], duration[data.item_rows[4]] = np.nan, 2.0
    data = dataclasses.replace(
        data, items=data.items.with_columns(duration_s=pl.Series(duration, nan_to_null=True))
    )
    labels = objective_labels(data, LabelRule())
    assert list(labels) == ["ctr", "lvtr", "vtr", "ltr"]
    np.testing.assert_array_equal(labels["lvtr"][:3], [1, 0, -1])
    np.testing.assert_array_equal(labels["ltr"][:3], [1, 0, -1])  # from the rating
    np.testing.assert_array_equal(labels["ctr"], data.column("click"))
    limit = np.fmin(duration[data.item_rows[:5]], 7)
    played = [6.9, 7.0, np.nan, 7.0, 2.0]
    expected = [-1 if p != p else int(p >= most) for p, most in zip(played, limit, strict=True)]
    np.testing.assert_array_equal(labels["vtr"][:5], expected)
    assert set(objective_labels(data, LabelRule(), ("ltr", "ctr"))) == {"ctr", "ltr"}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (("ctr", "swt"), "--objectives swt: choose among ctr"),
        (("cmtr",), "--objectives cmtr: .* no column comment; it has ctr, vtr, ltr"),
    ],
)
def test_objectives_that_are_not_there(named, message):
    with pytest.raises(InputError, match=message):
        objective_labels(dataset(), LabelRule(), named)


def test_a_log_without_feedback():
    bare = dataset(click=None, like=None, rating=None, playtime_s=None)
    with pytest.raises(InputError, match="says nothing of how its actions went"):
        objective_labels(bare, LabelRule())
    assert not has_exposures(bare)
    assert not has_exposures(dataset(click=None, playtime_s=None))  # ratings are chosen
    assert has_exposures(dataset())


def test_equal_labels():
    labels = {"ctr": np.array([1, 0, 1]), "ltr": np.array([0, 0, 1]), "wtr": np.array([-1, -1, 1])}
    kept, left_out = check_labels(labels, np.array([0, 1]))
    assert list(kept) == ["ctr"]
    assert left_out == ["ltr", "wtr"]
    for name, found in (("ltr", "are 0"), ("wtr", "are unknown")):
        with pytest.raises(InputError, match=f"--objectives {name}: all its training.*{found}"):
            check_labels(labels, np.array([0, 1]), (name,))
    with pytest.raises(InputError, match="all training labels are equal"):
        check_labels(labels, np.array([2]))


# --------------------------------------------------------------------------------- parts and blocks


@pytest.mark.parametrize("timed", [True, False])
def test_parts_are_in_time_order(timed):
    data = dataset() if timed else dataset(time_s=None)
    if not timed:
        data = dataclasses.replace(data, meta={**data.meta, "split": "leave-one-out"})
    split = make_split(data)
    parts = exposure_parts(data, split, 0.2, 0.2)
    (start, train), (valid, between), (test, end) = parts.train, parts.valid, parts.test
    assert (start == 0).all()
    assert (train <= valid).all()
    assert (train <= split.train_end).all()  # what the policy is tested on is not trained on
    assert (valid <= between).all()
    np.testing.assert_array_equal(between, test)
    np.testing.assert_array_equal(end, np.diff(data.offsets))
    if timed:
        times = [
            data.column("time_s")[make_blocks(*bounds).rows(data.offsets)]
            for bounds in (parts.train, parts.valid, parts.test)
        ]
        assert times[0].max() < times[1].min()
        assert times[1].max() < times[2].min()


def test_a_part_without_exposures():
    data = dataset()
    same = dataclasses.replace(data, interactions=data.interactions.with_columns(time_s=7))
    with pytest.raises(InputError, match="leaves no exposure for 'train'"):
        exposure_parts(same, make_split(data), 0.1, 0.1)


def test_blocks_cover_every_exposure_once():
    start, end = np.array([0, 3, 5, 9]), np.array([40, 3, 6, 25])
    blocks = make_blocks(start, end)
    offsets = np.array([0, 50, 60, 70, 100])
    rows = blocks.rows(offsets)
    expected = [offsets[u] + p for u in range(4) for p in range(start[u], end[u])]
    np.testing.assert_array_equal(np.sort(rows), expected)
    assert blocks.count.max() == BLOCK
    assert blocks.count.min() >= 1
    assert rows[0] == blocks.end[0] - 1  # the newest first


def test_reward_model_and_judge_share_no_exposure():
    blocks = make_blocks(np.zeros(300, int), np.full(300, 100))
    ours, judges = (share_of(blocks, who, 0.25) for who in ("reward", "judge"))
    rows = [set(x.rows(np.arange(301) * 100)) for x in (ours, judges)]
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) == 30_000
    assert 0.2 < len(rows[1]) / 30_000 < 0.3
    assert len(share_of(blocks, "all", 0.25)) == len(blocks)


# ---------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def made():
    """A data set, its labels and a builder of batches."""
    data = dataset()
    ids, split = helpers.random_ids(data.num_items), make_split(data)
    spec = build_feature_spec(data, split, ids, PositiveRule())
    known = np.arange(data.num_items) != 3
    items = item_features(data, split, ids, spec)
    builder = RewardBatchBuilder(action_log(data, spec), items, CFG, known)
    labels = objective_labels(data, LabelRule())
    return data, builder, np.stack(list(labels.values()), 1)


def test_every_exposure_sees_what_lies_before_it(made):
    """A block's batch, item by item, against candidates asked for at the same positions."""
    data, builder, labels = made
    blocks = make_blocks(np.zeros(6, int), np.diff(data.offsets))
    batch = builder.exposures(blocks, labels)
    for b, m in np.ndindex(len(blocks), BLOCK):
        user, end, count = blocks.user[b], blocks.end[b], blocks.count[b]
        if m >= count:
            assert (batch.label[b, m] == -1).all()
            continue
        position = end - 1 - m
        row = data.offsets[user] + position
        np.testing.assert_array_equal(batch.label[b, m], labels[row])
        one = builder.candidates([user], [position], data.item_rows[row][None, None])
        for field in ("sid", "item", "tags", "author", "duration"):
            mine, other = (getattr(x.target, field) for x in (batch, one))
            np.testing.assert_array_equal(mine[b, m], other[0, 0])
        first = batch.hidden[b, m]
        seen = slice(first, min(first + CFG.history_length, batch.history.length[b]))
        length = one.history.length[0]
        assert length == min(position, CFG.history_length) == seen.stop - seen.start
        for mine, other in zip(
            jax.tree.leaves(batch.history.replace(length=None)),
            jax.tree.leaves(one.history.replace(length=None)),
            strict=True,
        ):
            np.testing.assert_array_equal(mine[b, seen], other[0, :length])
        gaps = batch.seconds[b, seen] - batch.since[b, m]
        np.testing.assert_array_equal(gaps, one.seconds[0, :length])
        earlier = data.column("time_s")[row - length : row][::-1]
        np.testing.assert_array_equal(gaps, data.column("time_s")[row] - earlier)


def test_items_that_training_never_showed_have_no_number(made):
    data, builder, _ = made
    batch = builder.candidates([0, 1], [2, 2], np.array([[3, 4], [0, 3]]))
    np.testing.assert_array_equal(batch.target.item, [[0, 5], [1, 0]])
    shown = data.item_rows[data.offsets[0] : data.offsets[0] + 2][::-1]
    np.testing.assert_array_equal(batch.history.item[0, :2], np.where(shown == 3, 0, shown + 1))


def test_request_time(made):
    data, builder, _ = made
    last = int(np.diff(data.offsets)[0])
    now = builder.candidates([0], [last], np.array([[1]]))
    assert now.seconds[0, 0] == 0  # nothing comes after: as of the last action
    later = builder.candidates([0], [last], np.array([[1]]), data.column("time_s")[[last - 1]] + 60)
    np.testing.assert_array_equal(later.seconds[0, :3], now.seconds[0, :3] + 60)


def test_the_stream_repeats_itself_from_any_step(made):
    data, builder, labels = made
    blocks = make_blocks(np.zeros(6, int), np.diff(data.offsets))
    stream = ExposureStream(builder, blocks, labels, 2, seed=3)
    whole, rest = stream(), stream(2)
    batches = [next(whole) for _ in range(5)]
    for k in range(2, 5):
        jax.tree.map(np.testing.assert_array_equal, next(rest), batches[k])
    other = next(ExposureStream(builder, blocks, labels, 2, seed=4)())
    assert any(
        (x != y).any() for x, y in zip(*map(jax.tree.leaves, (other, batches[0])), strict=True)
    )


def test_padded_blocks(made):
    data, builder, labels = made
    blocks = make_blocks(np.zeros(6, int), np.diff(data.offsets))[:5]
    found = list(padded_blocks(builder, blocks, labels, 2))
    assert [real for _, real in found] == [2, 2, 1]
    assert {len(batch.static) for batch, _ in found} == {2}
