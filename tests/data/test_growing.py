"""Features of a growing log against those of the whole log, made anew."""

import dataclasses

import helpers
import numpy as np
import polars as pl
import pytest

from onerec_jax.data.batches import BatchBuilder
from onerec_jax.data.features import action_log, build_feature_spec, item_features
from onerec_jax.data.sources.world import read_world
from onerec_jax.data.splits import make_split
from onerec_jax.data.world.constants import DAY_S, WorldConfig
from onerec_jax.data.world.growing import GrowingActions
from onerec_jax.data.world.loop import Log, Loop
from onerec_jax.data.world.policy import LoggingPolicy
from onerec_jax.data.world.response import World
from onerec_jax.inputs import PositiveRule

USERS, ITEMS = 12, 100


@pytest.fixture(scope="module")
def started():
    """A world, its data set, and features of both."""
    dataset = read_world(WorldConfig(users=USERS, items=ITEMS, actions=15))
    split, ids = make_split(dataset), helpers.random_ids(ITEMS)
    spec = build_feature_spec(dataset, split, ids, PositiveRule())
    return World.from_meta(dataset.meta), dataset, spec, item_features(dataset, split, ids, spec)


def anew(log, dataset, spec):
    """The whole log as a data set, encoded."""
    table = log.table()
    names = {"user": "user_row", "item": "item_row"}
    frame = pl.DataFrame({names.get(name, name): values for name, values in table.items()})
    return action_log(dataclasses.replace(dataset, interactions=frame), spec)


def assert_same(actions, whole, log):
    user = np.repeat(np.arange(USERS), log.length)
    position = np.arange(len(user)) - whole.offsets[user]
    row = actions.offsets[user] + position
    for name in ("item", "time_s", "playtime", "label"):
        np.testing.assert_array_equal(getattr(actions, name)[row], getattr(whole, name))
        assert getattr(actions, name).dtype == getattr(whole, name).dtype
    np.testing.assert_array_equal(actions.positive_rows, row[whole.positive_rows])
    np.testing.assert_array_equal(actions.static, whole.static)


def test_grows_as_the_log_does(started):
    world, dataset, spec, items = started
    log = Log.from_dataset(dataset, 20)
    actions = GrowingActions(dataset, spec)
    assert_same(actions(log), action_log(dataset, spec), log)
    loop, cfg = Loop(world, LoggingPolicy(world), log=log), helpers.tiny_config(lifelong_length=6)
    for days in (1, 4):
        before = log.length.copy()
        loop.run(float(loop.clock_s.min() + days * DAY_S))
        assert (log.length > before).any()
        assert (log.length == before).any() or days > 1
        found, whole = actions(log), anew(log, dataset, spec)
        assert_same(found, whole, log)
        asked = (np.arange(USERS), log.length, loop.clock_s)
        ours, theirs = (BatchBuilder(x, items, cfg)(*asked) for x in (found, whole))
        for name in ("short", "positive", "lifelong"):
            for field, value in vars(getattr(theirs, name)).items():
                np.testing.assert_array_equal(getattr(getattr(ours, name), field), value)


def test_another_log_begins_anew(started):
    _, dataset, spec, _ = started
    actions = GrowingActions(dataset, spec)
    actions(Log.from_dataset(dataset, 3))
    log = Log.from_dataset(dataset, 50)
    assert_same(actions(log), action_log(dataset, spec), log)
