"""Batches against a loop over one example at a time, and what must never be in them."""

import dataclasses

import chex
import helpers
import jax
import numpy as np
import polars as pl
import pytest

from onerec_jax.data.features import action_log, build_feature_spec, item_features, log_bucket
from onerec_jax.data.pipeline import (
    BatchBuilder,
    Examples,
    log_from_histories,
    padded_batches,
    target_examples,
    train_examples,
    train_pipeline,
)
from onerec_jax.data.splits import make_split
from onerec_jax.errors import InputError
from onerec_jax.inputs import PositiveRule

CFG = helpers.tiny_config()
PATHWAYS = ("short", "positive", "lifelong")


def builder_of(dataset, spec=None):
    ids = helpers.random_ids(dataset.num_items)
    spec = spec or build_feature_spec(dataset, make_split(dataset), ids, PositiveRule())
    return BatchBuilder(
        action_log(dataset, make_split(dataset), spec),
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
        "positive": [row for row in past if log.positive[row]][: CFG.positive_length],
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
        np.testing.assert_array_equal(batch.target[row], target)
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
    nothing = np.zeros_like(builder.log.positive)
    log = dataclasses.replace(builder.log, positive=nothing)
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
    chex.assert_trees_all_equal(before.replace(target=0), after.replace(target=0))
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


@pytest.mark.parametrize("kind", ["leave-one-out", "time"])
def test_examples_cover_what_the_split_says(kind):
    dataset = helpers.full_dataset(users=25, split=kind)
    split = make_split(dataset)
    examples = train_examples(split)
    expected = [
        (user, position)
        for user in range(dataset.num_users)
        for position in range(1, split.train_end[user])
    ]
    actual = list(zip(examples.user.tolist(), examples.position.tolist(), strict=True))
    assert actual == expected
    assert len(examples) == len(expected)
    for at in (split.valid_at, split.test_at):
        targets = target_examples(at)
        assert targets.user.tolist() == [u for u in range(dataset.num_users) if at[u] >= 0]
        assert targets.position.tolist() == [p for p in at.tolist() if p >= 0]
        for array in (targets.user, targets.position, examples.user, examples.position):
            assert array.dtype == np.int32


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


class Recorder:
    """Stands in for a BatchBuilder: a batch is the pairs it was asked for."""

    def __call__(self, user, position):
        return np.stack([user, position], axis=1)


def pairs(iterator, count):
    return [tuple(pair) for _ in range(count) for pair in next(iterator).tolist()]


def stream(examples, batch_size=5, seed=0):
    return train_pipeline(Recorder(), examples, batch_size=batch_size, seed=seed)


EXAMPLES = Examples(np.arange(23, dtype=np.int32) // 4, np.arange(23, dtype=np.int32) % 4 + 1)
ALL_PAIRS = list(zip(EXAMPLES.user.tolist(), EXAMPLES.position.tolist(), strict=True))


def test_every_epoch_is_a_permutation_of_its_own():
    seen = pairs(stream(EXAMPLES), 23)  # five epochs of 23, in batches of 5
    epochs = [seen[start : start + 23] for start in range(0, 115, 23)]
    for epoch in epochs:
        assert sorted(epoch) == ALL_PAIRS
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert ALL_PAIRS not in epochs


def test_order_is_a_function_of_the_seed():
    first = pairs(stream(EXAMPLES), 9)
    assert first == pairs(stream(EXAMPLES), 9)
    assert first != pairs(stream(EXAMPLES, seed=1), 9)


@pytest.mark.parametrize("steps", [0, 3, 7])
def test_resumes_from_its_state(steps):
    iterator = stream(EXAMPLES)
    pairs(iterator, steps)
    state = iterator.get_state()
    rest = pairs(iterator, 6)
    resumed = stream(EXAMPLES)
    resumed.set_state(state)
    assert pairs(resumed, 6) == rest


def test_pipeline_yields_the_batches_of_the_builder():
    builder, examples = small()
    batch = next(train_pipeline(builder, examples, batch_size=6, seed=0))
    index = next(train_pipeline(Recorder(), examples, batch_size=6, seed=0))
    chex.assert_trees_all_equal(batch, builder(index[:, 0], index[:, 1]))


def test_batch_larger_than_the_data_set():
    with pytest.raises(InputError, match="--train.batch-size 24 .* 23 training examples"):
        stream(EXAMPLES, batch_size=24)
    assert len(next(stream(EXAMPLES, batch_size=23))) == 23


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
