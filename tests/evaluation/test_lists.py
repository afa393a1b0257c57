"""What a platform expects of lists, and means before and after."""

import numpy as np

from onerec_jax.data.examples import target_examples
from onerec_jax.data.sources.world import read_world
from onerec_jax.data.splits import make_split
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.data.world.response import World, satisfaction
from onerec_jax.evaluation.lists import (
    EXPECTED,
    before_and_after,
    expected_of_lists,
    mean_of_lists,
)


def test_answer_to_lists():
    """Each user is asked where its test action was; places without an item do not count."""
    dataset = read_world(WorldConfig(users=12, items=120, actions=12), split="leave-one-out")
    test = target_examples(make_split(dataset).test_at)
    rng = np.random.default_rng(0)
    lists = rng.integers(120, size=(len(test), 4))
    lists[0, 2:], lists[1] = -1, -1
    found = expected_of_lists(dataset, test, lists)
    world = World.from_meta(dataset.meta)
    for i in (0, 5):
        row = dataset.offsets[test.user[i]] + test.position[i]
        shown = lists[i][lists[i] >= 0]
        where = (dataset.column(name)[row] for name in ("session", "slot", "time_s"))
        answer = world.expected(int(test.user[i]), shown, *where)
        np.testing.assert_allclose(found["watch_s"][i], answer.watch_s.mean(), rtol=1e-6)
        np.testing.assert_allclose(found["satisfaction"][i], satisfaction(answer).mean(), rtol=1e-6)
    assert np.isnan(found["like"][1])
    assert tuple(found) == EXPECTED


def test_means_of_lists():
    scores = np.array([[1.0, 2.0, np.nan], [np.nan] * 3])
    np.testing.assert_array_equal(mean_of_lists(scores), [1.5, np.nan])


def test_only_users_with_both_values_count():
    before = {"p": np.array([1.0, np.nan, 3.0, 5.0])}
    after = {"p": np.array([2.0, 9.0, np.nan, 6.0])}
    (row,) = before_and_after(before, after, seed=0, resamples=20).values()
    assert row == {"before": 3.0, "after": 4.0, "difference": 1.0, "ci95": [1.0, 1.0]}
