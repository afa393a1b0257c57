"""Batches against a loop over one example at a time, and what must never be in them."""

import dataclasses

import chex
import helpers
import jax
import numpy as np
import polars as pl
import pytest

from onerec_jax.data.batches import BatchBuilder, log_from_histories, padded_batches
from onerec_jax.data.compress import compress
from onerec_jax.data.examples import train_examples
from onerec_jax.data.features import (
    action_log,
    build_feature_spec,
    item_features,
    lifelong_log,
    log_bucket,
    uncompressed,
)
from onerec_jax.data.lifelong import LifelongConfig
from onerec_jax.data.splits import make_split
from onerec_jax.inputs import PositiveRule

CFG = helpers.tiny_config()
PATHWAYS = ("short", "positive", "lifelong")


def builder_of(dataset, spec=None):
    ids = helpers.random_ids(dataset.num_items)
    spec = spec or build_feature_spec(dataset, make_split(dataset), ids, PositiveRule())
    return BatchBuilder(
        action_log(dataset, spec),
        item_features(dataset, make_split(dataset), ids, spec),
        CFG,
    ), spec


def every_position(log):
    """All (user, position), one past the end of each user included."""
    lengths = np.diff(log.offsets)
    user = np.repeat(np.arange(len(lengths)), lengths + 1)
    return user, np.concatenate([np.arange(n + 1) for n in lengths])


def one_example(builder, user, position, request):
    """The history of one example, newest first, as lists of the features of its actions."""
    log, items = builder.log, builder.items
    start, end = int(log.offsets[user]), int(log.offsets[user + 1])
    rows = list(range(start, end))
    if request is None:
        request = log.time_s[rows[position] if position < len(rows) else rows[-1]]
    past = rows[:position][::-1]
    chosen = {
        "short": past[: CFG.short_length],
        "positive": [row for row in past if row in log.positive_rows][: CFG.positive_length],
        "lifelong": past[: CFG.lifelong_length],
    }
    pathways = {}
    for name, rows_of in chosen.items():
        item = [log.item[row] for row in rows_of]
        pathways[name] = {
            "sid": [items.sid[i] for i in item],
            "item": item,
            "tags": [items.tags[i] for i in item],
            "author": [items.author[i] for i in item],
            "age": [int(log_bucket(request - log.time_s[row])) for row in rows_of],
            "playtime": [log.playtime[row] for row in rows_of],
            "duration": [items.duration[i] for i in item],
            "label": [log.label[row] for row in rows_of],
        }
    target = items.sid[log.item[rows[position]]] if position < len(rows) else 0
    return pathways, target


@pytest.mark.parametrize("request_time", [None, 1_200_000])
def test_batches_against_one_example_at_a_time(request_time):
    builder, _ = builder_of(helpers.full_dataset())
    user, position = every_position(builder.log)
    times = None if request_time is None else np.full(len(user), request_time)
    batch = builder(user, position, times)
    for row in range(len(user)):
        pathways, target = one_example(builder, user[row], position[row], request_time)
        np.testing.assert_array_equal(batch.target[row, 0], target)
        np.testing.assert_array_equal(batch.static[row], builder.log.static[user[row]])
        for name, features in pathways.items():
            pathway = getattr(batch, name)
            length = len(features["item"])
            assert pathway.length[row] == length
            for feature, values in features.items():
                actual = getattr(pathway, feature)[row]
                assert actual[length:].sum() == 0  # padding is zero
                if length:
                    np.testing.assert_array_equal(actual[:length], values, err_msg=feature)
    lengths = [getattr(batch, name).length.max() for name in PATHWAYS]
    assert lengths == [CFG.short_length, CFG.positive_length, CFG.lifelong_length]  # all fill up
    for leaf in jax.tree.leaves(batch):
        assert leaf.dtype in (np.int32, np.uint8)


def test_no_positive_action_at_all():
    builder, _ = builder_of(helpers.full_dataset())
    log = dataclasses.replace(builder.log, positive_rows=np.zeros(0, np.int64))
    batch = BatchBuilder(log, builder.items, CFG)(*every_position(log))
    assert batch.positive.length.sum() == 0
    assert batch.positive.item.sum() == 0


@pytest.mark.parametrize("column", ["item", "rating", "playtime_s", "like", "click", "later times"])
def test_no_leak(column):
    """Nothing of the target or of any later action reaches a history.

    The one thing that may is the time of the target: it is when the recommendation is asked for,
    and the ages of the history count from it.
    """
    dataset = helpers.full_dataset(users=12)
    builder, spec = builder_of(dataset)
    split = make_split(dataset)
    user, position = np.arange(dataset.num_users), split.valid_at
    hidden = dataset.column("position") >= np.repeat(position, np.diff(dataset.offsets))
    frame, rng = dataset.interactions, np.random.default_rng(0)
    if column == "item":
        rows = np.where(hidden, (dataset.item_rows + 1) % dataset.num_items, dataset.item_rows)
        frame = frame.with_columns(pl.Series("item_row", rows, dtype=pl.Int32))
    elif column == "later times":
        later = hidden & (
            dataset.column("position") > np.repeat(position, np.diff(dataset.offsets))
        )
        times = dataset.column("time_s") + later * 10**6
        frame = frame.with_columns(pl.Series("time_s", times))
    else:
        old = frame[column]
        drawn = rng.choice([1, 5] if column == "rating" else [0, 1], len(hidden))
        new = pl.Series(column, drawn).cast(old.dtype)
        frame = frame.with_columns(old.zip_with(pl.Series(~hidden), new))
    changed = dataclasses.replace(dataset, interactions=frame)
    other_builder, _ = builder_of(changed, spec)
    before, after = builder(user, position), other_builder(user, position)
    before, after = (x.replace(target=0, target_count=0) for x in (before, after))
    chex.assert_trees_all_equal(before, after)
    # The change is a change: at the end of the log it is history and must show.
    end = np.diff(dataset.offsets)
    now, then = builder(user, end), other_builder(user, end)
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(then), strict=True)
    )


def test_the_time_of_the_request_enters_ages_only():
    builder, _ = builder_of(helpers.full_dataset())
    user, position = every_position(builder.log)
    early = builder(user, position, np.full(len(user), 1_100_000))
    late = builder(user, position, np.full(len(user), 2_000_000))
    for name in PATHWAYS:
        a, b = getattr(early, name), getattr(late, name)
        assert (a.age != b.age).any()
        chex.assert_trees_all_equal(a.replace(age=0), b.replace(age=0))


def test_equal_times_keep_the_order_of_the_data_set():
    dataset = helpers.full_dataset(users=3)
    same = dataset.interactions.with_columns(pl.lit(7, pl.Int64).alias("time_s"))
    builder, _ = builder_of(dataclasses.replace(dataset, interactions=same))
    for user in range(3):
        items = dataset.item_rows[dataset.offsets[user] : dataset.offsets[user + 1]]
        batch = builder(np.array([user]), np.array([3]))
        assert batch.short.item[0, :3].tolist() == items[:3][::-1].tolist()


def small():
    builder, _ = builder_of(helpers.full_dataset())
    return builder, train_examples(make_split(helpers.full_dataset()))


def test_padded_batches_serve_every_example_once():
    builder, examples = small()
    n = len(examples)
    whole, parts = builder(examples.user, examples.position), []
    for batch, real in padded_batches(builder, examples, 8):
        assert batch.target.shape[0] == 8
        parts.append(jax.tree.map(lambda x, real=real: x[:real], batch))
        filling = jax.tree.map(lambda x, real=real: x[real:], batch)  # the first row again
        first = jax.tree.map(lambda x, real=real: np.repeat(x[:1], 8 - real, axis=0), batch)
        chex.assert_trees_all_equal(filling, first)
    assert n % 8
    chex.assert_trees_all_equal(jax.tree.map(lambda *x: np.concatenate(x), *parts), whole)


def test_bare_histories():
    spec = helpers.full_spec(num_items=12)
    builder, _ = builder_of(helpers.full_dataset())
    log = log_from_histories([[3, 1, 2], [], [5]], spec)
    batch = BatchBuilder(log, builder.items, CFG)(np.arange(3), np.array([3, 0, 1]))
    np.testing.assert_array_equal(batch.short.length, [3, 0, 1])
    np.testing.assert_array_equal(batch.positive.length, [3, 0, 1])  # what the caller named
    assert batch.short.item.tolist() == [[2, 1, 3, 0], [0] * 4, [5, 0, 0, 0]]
    assert batch.short.age.tolist() == [[1, 1, 1, 0], [0] * 4, [1, 0, 0, 0]]  # done just now
    for unknown in (batch.short.playtime, batch.short.label, batch.static):
        assert unknown.sum() == 0
    np.testing.assert_array_equal(batch.target, 0)
    bare = log_from_histories([[1]], helpers.bare_spec())
    assert (bare.time_s, bare.playtime, bare.label) == (None, None, None)


def test_a_single_user_without_history():
    """A newcomer asks before the first action: every pathway is empty."""
    builder, _ = builder_of(helpers.full_dataset())
    log = log_from_histories([[]], helpers.full_spec(num_items=12))
    batch = BatchBuilder(log, builder.items, CFG)(np.array([0]), np.array([0]))
    assert [getattr(batch, name).length.tolist() for name in PATHWAYS] == [[0], [0], [0]]


# ------------------------------------------------------------------------------ compressed lives


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """A log with long lives, its snapshots, and a builder that uses them."""
    dataset = helpers.full_dataset(users=9)
    vectors = np.random.default_rng(0).standard_normal((dataset.num_items, 4)).astype(np.float32)
    config = LifelongConfig(max_clusters=5, chunk_actions=2, growth=0)
    snapshots = compress(dataset, vectors, config, tmp_path_factory.mktemp("lives") / "l")
    builder, spec = builder_of(dataset)
    spec = dataclasses.replace(spec, clustered=True)
    builder = BatchBuilder(builder.log, builder.items, CFG, lifelong_log(snapshots, spec))
    return dataset, snapshots, builder


def test_lifelong_pathway_against_the_snapshots(lives):
    dataset, snapshots, builder = lives
    log, items = builder.log, builder.items
    user, position = every_position(log)
    request = np.full(len(user), 2_000_000)
    batch = builder(user, position, request).lifelong
    kinds = set()
    for row, snapshot in enumerate(snapshots.find(user, position)):
        first = log.offsets[user[row]]
        expected = []  # (log row, time, playtime, duration, members), newest first
        if snapshot >= 0:
            assert snapshots.covered[snapshot] <= position[row]
            clusters = range(*snapshots.cluster_offsets[snapshot : snapshot + 2])
            kinds.add(len(clusters) > 0)
            for c in clusters:
                expected.append(
                    (
                        first + snapshots.representative[c],
                        snapshots.time_s[c],
                        int(log_bucket(snapshots.playtime_s[c], 4)),
                        int(log_bucket(snapshots.duration_s[c], 4)),
                        int(log_bucket(snapshots.count[c])),
                    )
                )
            if not clusters:
                for at in range(first + snapshots.covered[snapshot] - 1, first - 1, -1):
                    duration = items.duration[log.item[at]]
                    expected.append((at, log.time_s[at], log.playtime[at], duration, 3))
        expected = expected[: CFG.lifelong_length]
        assert batch.length[row] == len(expected)
        for slot, (at, time_s, playtime, duration, count) in enumerate(expected):
            assert batch.item[row, slot] == log.item[at]
            assert batch.label[row, slot].tolist() == log.label[at].tolist()
            assert batch.age[row, slot] == log_bucket(2_000_000 - time_s)
            assert batch.playtime[row, slot] == playtime
            assert batch.duration[row, slot] == duration
            assert batch.count[row, slot] == count
        for name in ("item", "age", "playtime", "duration", "count", "label"):
            assert getattr(batch, name)[row, len(expected) :].sum() == 0
    assert kinds == {True, False}
    lengths = builder.lifelong_lengths(helpers.examples_of(user, position))
    np.testing.assert_array_equal(lengths, batch.length)


def test_compressed_lives_do_not_see_the_future(lives, tmp_path):
    """Whatever happens from a position on, clusters before it included, stays out of its batch."""
    dataset, snapshots, builder = lives
    position = np.diff(dataset.offsets) // 2
    user = np.arange(dataset.num_users)
    hidden = dataset.column("position") >= np.repeat(position, np.diff(dataset.offsets))
    rows = np.where(hidden, (dataset.item_rows + 5) % dataset.num_items, dataset.item_rows)
    frame = dataset.interactions.with_columns(
        pl.Series("item_row", rows, dtype=pl.Int32),
        pl.Series("time_s", dataset.column("time_s") + 10**6 * hidden),
    )
    changed = dataclasses.replace(dataset, interactions=frame)
    vectors = np.random.default_rng(0).standard_normal((dataset.num_items, 4)).astype(np.float32)
    config = LifelongConfig(max_clusters=5, chunk_actions=2, growth=0)
    other = compress(changed, vectors, config, tmp_path / "l")
    other_builder, spec = builder_of(changed)
    spec = dataclasses.replace(spec, clustered=True)
    other_builder = BatchBuilder(other_builder.log, builder.items, CFG, lifelong_log(other, spec))
    request = np.full(dataset.num_users, 3_000_000)
    before, after = builder(user, position, request), other_builder(user, position, request)
    assert before.lifelong.length.max() > 0
    chex.assert_trees_all_equal(before.replace(target=0), after.replace(target=0))


def test_histories_by_hand_for_a_model_of_compressed_lives(lives):
    _, _, builder = lives
    log = log_from_histories([[3, 1, 2], [], [5]], helpers.full_spec(num_items=12))
    batch = BatchBuilder(log, builder.items, CFG, uncompressed(log))(
        np.arange(3), np.array([3, 0, 1])
    )
    assert batch.lifelong.item[:, :3].tolist() == [[2, 1, 3], [0] * 3, [5, 0, 0]]
    assert batch.lifelong.count[:, :3].tolist() == [[3, 3, 3], [0] * 3, [3, 0, 0]]


def test_fewer_slots_for_short_lives(lives):
    _, _, builder = lives
    user, position = every_position(builder.log)
    short = builder.lifelong_lengths(helpers.examples_of(user, position)) <= 2
    whole = builder(user[short], position[short])
    cut = builder(user[short], position[short], lifelong_slots=2)
    expected = jax.tree.map(lambda x: x if x.ndim == 1 else x[:, :2], whole.lifelong)
    chex.assert_trees_all_equal(cut, whole.replace(lifelong=expected))
    none = builder(user[:1], position[:1], lifelong_slots=0)
    assert none.lifelong.item.shape == (1, 0)


# --------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("positive", [False, True])
def test_several_targets_against_a_loop(positive):
    builder, _ = builder_of(helpers.full_dataset(users=9))
    log = builder.log
    lengths = np.diff(log.offsets)
    end = np.maximum(lengths - 2, 1)
    pairs = [
        (u, p)
        for u in range(9)
        for p in range(1, end[u])
        if not positive or log.offsets[u] + p in log.positive_rows
    ]
    user, position = np.array(pairs).T
    batch = builder(user, position, targets=3, target_end=end[user], positive_targets=positive)
    counts = set()
    for row, (u, p) in enumerate(pairs):
        rows = [
            log.offsets[u] + q
            for q in range(p, end[u])
            if q == p or not positive or log.offsets[u] + q in log.positive_rows
        ][:3]
        assert batch.target_count[row] == len(rows)
        counts.add(len(rows))
        filled = [rows[i % len(rows)] for i in range(3)]  # slots beyond repeat the real ones
        np.testing.assert_array_equal(batch.target[row], builder.items.sid[log.item[filled]])
    assert counts == {1, 2, 3}
    one = builder(user, position)  # the history is that of the first target
    for name in PATHWAYS:
        chex.assert_trees_all_equal(getattr(one, name), getattr(batch, name))
