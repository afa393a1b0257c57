"""Several generated lists of each user: mean and best, and what a world expects of each."""

import numpy as np

from onerec_jax.data.examples import Examples
from onerec_jax.data.sources.world import read_world
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.data.world.response import World, satisfaction
from onerec_jax.evaluation import session_lists

NAN = np.nan


def test_mean_and_best_of_the_lists_there_are():
    mean, best = session_lists.mean_and_max(
        np.array([[1.0, 3.0, NAN], [-2.0, -4.0, -3.0], [NAN] * 3])
    )
    np.testing.assert_allclose(mean, [2, -3, NAN])
    np.testing.assert_allclose(best, [3, -2, NAN])


def test_every_list_is_asked_about_at_its_users_request(monkeypatch):
    asked = []

    def expected(dataset, test, lists):
        asked.append((test.user.tolist(), test.position.tolist(), lists.tolist()))
        return {name: np.arange(4.0) for name in (*session_lists.EXPECTED, "hate")}

    monkeypatch.setattr(session_lists, "expected_of_lists", expected)
    items = np.array([[[1, 2], [3, -1]], [[5, 6], [7, 8]]])
    test = Examples(np.array([4, 9]), np.array([10, 11]))
    found = session_lists.expected_of_sessions(None, test, items)
    assert asked == [([4, 4, 9, 9], [10, 10, 11, 11], [[1, 2], [3, -1], [5, 6], [7, 8]])]
    assert tuple(found) == session_lists.EXPECTED
    np.testing.assert_array_equal(found["like"], [[0, NAN], [2, 3]])  # a list short of an item


def test_a_list_is_shown_in_order_until_the_user_leaves():
    """Item by item, a place further each, as far as the user is still there."""
    dataset = read_world(WorldConfig(users=5, items=100, actions=12))
    world = World.from_meta(dataset.meta)
    test = Examples(np.array([1, 4], np.int32), np.array([3, 2], np.int32))
    items = np.array([[[3, 9, 20], [20, 9, 3]], [[7, 8, -1], [0, 29, 5]]])
    found = session_lists.expected_in_order(dataset, test, items)
    assert tuple(found) == session_lists.EXPECTED
    for user, position, lists, u in zip(test.user, test.position, items, range(2), strict=True):
        row = dataset.offsets[user] + position
        session, slot, time_s = (dataset.column(c)[row] for c in ("session", "slot", "time_s"))
        for w, shown in enumerate(lists):
            if -1 in shown:
                assert all(np.isnan(x[u, w]) for x in found.values())
                continue
            there, total = 1.0, dict.fromkeys(session_lists.EXPECTED, 0.0)
            for step, item in enumerate(shown):
                answer = world.expected(user, item, session, slot + step, time_s)
                values = answer._asdict() | {"satisfaction": satisfaction(answer)}
                for name in total:
                    total[name] += there * values[name][0]
                there *= 1 - answer.leave[0]
            for name, value in total.items():
                np.testing.assert_allclose(found[name][u, w], value, rtol=1e-6)
    assert found["watch_s"][0, 0] != found["watch_s"][0, 1]  # the order counts
