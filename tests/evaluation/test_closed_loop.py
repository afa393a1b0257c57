"""The closed loop of one policy on a small platform, and what is measured of it."""

import numpy as np
import pytest

from onerec_jax.data.sources.world import read_world
from onerec_jax.data.world.constants import DAY_S, WorldConfig
from onerec_jax.data.world.policy import LoggingPolicy
from onerec_jax.data.world.response import World
from onerec_jax.evaluation.closed_loop import METRICS, play, returns

USERS, ITEMS = 20, 100


@pytest.fixture(scope="module")
def platform():
    """A world and its log."""
    dataset = read_world(WorldConfig(users=USERS, items=ITEMS, actions=20))
    return World.from_meta(dataset.meta), dataset


def test_the_days_of_each_user_and_no_more(platform):
    world, dataset = platform
    asked, logging = [], LoggingPolicy(world)

    def watched(users, log, request):
        asked.extend(zip(users.tolist(), request.time_s.tolist(), strict=True))
        return logging(users, log, request)

    flagged = np.arange(ITEMS) % 2 * 1.0
    found = play(watched, world, dataset, days=3, room=30, flagged=flagged)
    assert set(found) == set(METRICS)
    assert 0 < found["views"].max() <= 30
    first = {user: at for user, at in reversed(asked)}
    late = [user for user, at in asked if at >= first[user] + 3 * DAY_S]
    assert len(late) == len(set(late))  # one request past the end closes a user's days
    again = play(LoggingPolicy(world), world, dataset, days=3, room=30, flagged=flagged)
    for name, values in found.items():
        np.testing.assert_array_equal(again[name], values)


def test_returns_by_loops(platform):
    world, _ = platform
    table = {"user": np.array([0, 0, 0, 2, 2]), "session": np.array([4, 4, 5, 5, 5])}
    table["long_view"] = np.array([1, 0, 1, 0, 1])
    table |= {name: np.zeros(5, int) for name in ("comment", "forward", "follow")}
    table |= {"like": np.array([1, 0, 0, 0, 0]), "hate": np.array([0, 0, 0, 1, 0])}
    found = returns(table, world)
    sessions = world.return_within_7_days(np.array([0, 0, 2]), np.array([1.0, 1.0, -1.0]))
    np.testing.assert_allclose(found[[0, 2]], [sessions[:2].mean(), sessions[2]])
    assert np.isnan(found[[1, *range(3, USERS)]]).all()
