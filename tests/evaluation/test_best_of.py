"""The best of N generated items, beside loops over users and places."""

import numpy as np
import pytest

from onerec_jax.data.examples import target_examples
from onerec_jax.data.sources.world import read_world
from onerec_jax.data.splits import make_split
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.evaluation.best_of import best_of, chosen_of, pass_at, response_to_items
from onerec_jax.evaluation.lists import expected_of_lists, mean_of_lists


@pytest.fixture(scope="module")
def asked():
    """A platform's log, its test requests, and lists with gaps at their ends."""
    dataset = read_world(WorldConfig(users=12, items=120, actions=12), split="leave-one-out")
    test = target_examples(make_split(dataset).test_at)
    lists = np.random.default_rng(0).integers(120, size=(len(test), 6))
    lists[0, 3:], lists[1] = -1, -1
    return dataset, test, lists


def test_response_to_items_is_that_of_lists(asked):
    dataset, test, lists = asked
    found, means = response_to_items(*asked), expected_of_lists(*asked)
    for name, values in found.items():
        np.testing.assert_allclose(mean_of_lists(values), means[name], rtol=1e-6)
        np.testing.assert_array_equal(np.isnan(values), lists < 0)


def test_best_and_chosen_against_loops():
    rng = np.random.default_rng(1)
    value, score = rng.random((2, 9, 7))
    for row in range(9):
        value[row, rng.integers(1, 8) :] = np.nan
    score[np.isnan(value)] = np.nan
    for n in (1, 4, 7, 9):
        for row in range(9):
            there = [i for i in range(min(n, 7)) if np.isfinite(value[row, i])]
            assert best_of(value, n)[row] == max(value[row, i] for i in there)
            chosen = max(there, key=lambda i, row=row: score[row, i])
            assert chosen_of(value, score, n)[row] == value[row, chosen]


def test_pass_at(asked):
    score = np.where(asked[2] >= 0, np.random.default_rng(2).random(asked[2].shape), np.nan)
    found = pass_at(*asked, score, (1, 3, 6))
    kinds = ("mean", "best", "chosen")
    assert set(found) == {
        f"{name} {kind}@{n}"
        for name in ("watch_s", "satisfaction")
        for kind in kinds
        for n in (1, 3, 6)
    }
    for values in found.values():
        assert np.isnan(values[1])  # a user without an item
        assert np.isfinite(np.delete(values, 1)).all()
    some = np.arange(len(asked[2])) != 1
    for name in ("watch_s", "satisfaction"):
        one = [found[f"{name} {kind}@1"][some] for kind in kinds]
        np.testing.assert_allclose(one, [one[0]] * 3)
        assert (found[f"{name} best@6"] >= found[f"{name} best@3"])[some].all()
        assert (found[f"{name} best@6"] >= found[f"{name} chosen@6"])[some].all()
        assert found[f"{name} best@6"][0] == found[f"{name} best@3"][0]  # a list of three
