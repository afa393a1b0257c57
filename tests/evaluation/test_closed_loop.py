"""The closed loop of one policy on a small platform, and what is measured of it."""

import numpy as np
import pytest

from onerec_jax.data.sources.world import read_world
from onerec_jax.data.world.constants import DAY_S, WorldConfig
from onerec_jax.data.world.loop import Log, Request
from onerec_jax.data.world.policy import LoggingPolicy
from onerec_jax.data.world.response import World
from onerec_jax.evaluation.closed_loop import (
    METRICS,
    Metered,
    app_stay,
    compare,
    mean_cost,
    play,
    returns,
    session_begins,
    variety,
)

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
    said = []
    again = play(
        Metered(LoggingPolicy(world), 40),  # which changes nothing
        world,
        dataset,
        days=3,
        room=30,
        flagged=flagged,
        say=lambda share, exposures: said.append((share, exposures)),
    )
    assert said[0] == (0, 0)
    assert said == sorted(said)
    assert 0.5 < said[-1][0] <= 1
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


def test_stay_by_loops():
    """Two sessions of one user and one of another; half a second of the last play counts too."""
    table = {
        "user": np.array([0, 0, 0, 3]),
        "session": np.array([7, 7, 8, 8]),
        "time_s": np.array([100, 112, 5000, 40]),
        "playtime_s": np.array([10.5, 3.5, 20.0, 0.5], np.float32),
    }
    found = app_stay(table, 5)
    np.testing.assert_array_equal(found, [(112 + 3.5 - 100) + 20, 0, 0, 0.5, 0])
    none = {name: values[:0] for name, values in table.items()}
    np.testing.assert_array_equal(app_stay(none, 5), np.zeros(5))


def test_variety_by_loops(platform):
    """Fives of each session in turn; what is left over, and whoever has no five, does not count."""
    world, dataset = platform
    table = Log.from_dataset(dataset, 0).table()
    topics, sessions = np.asarray(world.latents.items.topic), {}
    for user, session, item in zip(*(table[x] for x in ("user", "session", "item")), strict=True):
        sessions.setdefault((user, session), []).append(topics[item])
    counts = {user: [] for user in range(USERS)}
    for (user, _), shown in sessions.items():
        for first in range(0, len(shown) - 4, 5):
            counts[user].append(len(set(shown[first : first + 5])))
    expected = [np.mean(found) if found else np.nan for found in counts.values()]
    assert np.isfinite(expected).any()
    np.testing.assert_array_equal(variety(table, world), expected)


def test_stay_is_watch_time_and_swipes(platform):
    """What the docstring says of worlds: 1 to 2 s for each exposure but a session's last."""
    world, dataset = platform
    table = Log.from_dataset(dataset, 0).table()
    stay = app_stay(table, USERS)
    watch = np.bincount(table["user"], table["playtime_s"], USERS)
    swipes = np.bincount(table["user"], ~np.append(session_begins(table)[1:], True), USERS)
    assert (stay >= watch + swipes - 1e-3).all()
    assert (stay <= watch + 2 * swipes + 1e-3).all()


class Counting:
    """Shows item 0, and counts."""

    def __init__(self):
        self.flops, self.scored, self.asked = {"scoring": 0}, 0, []

    def __call__(self, users, log, request):
        assert len(users) == len(request.time_s)
        self.asked.append(len(users))
        self.flops["scoring"] += 10 * len(users)
        self.scored += 3 * len(users)
        return np.zeros((len(users), 1), np.int32)


def test_what_comes_before_the_clock_costs_nothing():
    policy = Counting()
    metered = Metered(policy, 6)
    for users in (4, 2):
        some = np.arange(users)
        metered(some, None, Request(some, some, some, 0))
    assert policy.asked == [6, 1, 4, 2]
    cost = metered.cost
    assert cost.pop("seconds") > 0
    assert cost == {"requests": 6, "scored": 3.0, "flops": {"scoring": 10.0}}
    free = Metered(lambda users, log, request: np.zeros((len(users), 1), int), 1)
    free(some, None, Request(some, some, some, 0))
    assert free.cost["flops"] is None


def test_mean_cost_is_over_requests():
    costs = [
        {"requests": n, "seconds": s, "scored": s, "flops": {"a": 10 * s}}
        for n, s in ((1, 1.0), (3, 5.0))
    ]
    assert mean_cost(costs) == {"requests": 4, "seconds": 4.0, "scored": 4.0, "flops": {"a": 40.0}}
    assert mean_cost([c | {"flops": None} for c in costs])["flops"] is None


def test_arms_of_seeds_and_of_one():
    """The base of one seed stands beside each; users without a value in either do not count."""
    rng = np.random.default_rng(0)
    base = {metric: rng.random(50) + 1 for metric in METRICS}
    gains = np.array([[0.5], [0.25]])
    arm = {metric: base[metric] + gains for metric in METRICS}
    arm["flagged"][0, :10] = np.nan
    arm["like"] = base["like"] + np.array([[0.5], [-0.25]])
    found = compare({"base": base, "arm": arm}, resamples=50)["arm"]
    row = found["watch_s"]
    assert row["by_seed"] == pytest.approx([0.5, 0.25])
    assert row["difference"] == pytest.approx(0.375)
    assert row["base"] == pytest.approx(base["watch_s"].mean())
    assert row["mean"] == pytest.approx(base["watch_s"].mean() + 0.375)
    assert row["agrees"]
    assert not found["like"]["agrees"]
    both = np.tile(base["flagged"], (2, 1))[np.isfinite(arm["flagged"])]
    assert found["flagged"]["base"] == pytest.approx(both.mean())
    assert found["flagged"]["mean"] == pytest.approx(np.nanmean(arm["flagged"]))
