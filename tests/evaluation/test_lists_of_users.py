"""Several generated lists of each user: mean and best, and what a world expects of each."""

import numpy as np

from onerec_jax.data.examples import Examples
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
