"""Second opinions on candidates, and how diverse a list is."""

import helpers
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.generation.selection import (
    Popularity,
    VectorSimilarity,
    candidates,
    diversity,
    select,
    spread,
)


def test_candidates_are_all_items_of_all_beams():
    rng = np.random.default_rng(0)
    ids = helpers.random_ids(40, codebook_size=3)
    offsets, items = ids.items_by_leaf(rng.permutation(40))
    leaf = np.stack([rng.permutation(len(ids.leaf_sids))[:5] for _ in range(6)])
    leaf[1, 2:], leaf[3] = -1, -1
    lists = candidates(leaf, offsets, items)
    for row, leaves in zip(lists, leaf, strict=True):
        expected = [i for x in leaves if x >= 0 for i in items[offsets[x] : offsets[x + 1]]]
        assert row[row >= 0].tolist() == expected
    assert lists.shape[1] == (lists >= 0).sum(1).max()
    assert candidates(np.full((2, 3), -1), offsets, items).tolist() == [[-1], [-1]]


def test_selection_against_a_loop():
    rng = np.random.default_rng(1)
    count = rng.integers(0, 4, 50)  # many ties
    lists = np.stack([rng.permutation(50)[:12] for _ in range(8)]).astype(np.int32)
    lists[rng.random(lists.shape) < 0.3] = -1
    lists[0] = -1
    seen = [rng.choice(50, 10) for _ in range(8)]
    for n in (1, 4, 20):
        found = select(lists, range(8), Popularity(count), n, seen=seen)
        for user in range(8):
            kept = [i for i in lists[user].tolist() if i >= 0 and i not in seen[user]]
            best = sorted(kept, key=lambda i: -count[i])[:n]
            assert found[user].tolist() == best + [-1] * (n - len(best))


def test_a_scorer_may_say_minus_infinity_and_not_nan():
    lists = np.array([[-1, 2, 1]])

    def score(users, items):
        return np.where(items == 2, -np.inf, 0.0)

    assert select(lists, [None], score, 3).tolist() == [[1, 2, -1]]
    with pytest.raises(InputError, match="NaN"):
        select(lists, [None], lambda users, items: items * np.nan, 3)


def test_similarity_by_hand():
    """Items along the axes and between; a history's length and vectors' lengths do not count."""
    vectors = np.array([[2.0, 0.0], [0.0, 9.0], [1.0, 1.0], [0.0, 0.0]])
    score = VectorSimilarity(vectors)
    lists = np.array([[0, 1, 2, 3], [0, 1, 2, -1], [1, 0, 2, 3]], np.int32)
    found = score([[0, 0, 0], [0, 1], []], lists)
    half = 0.5**0.5
    np.testing.assert_allclose(found[0], [1, 0, half, 0], atol=1e-7)
    np.testing.assert_allclose(found[1, :3], [half, half, 1], atol=1e-7)
    np.testing.assert_allclose(found[2], 0)
    assert select(lists, [[0, 0, 0], [0, 1], []], score, 2).tolist() == [[0, 2], [2, 0], [1, 0]]


def test_diversity_by_hand():
    sids = np.array([[0, 1, 1], [0, 1, 2], [0, 2, 0], [3, 1, 1]])
    lists = np.array([[0, 1, 2, 3], [1, 1, -1, -1], [-1, -1, -1, -1]])
    np.testing.assert_array_equal(diversity(lists, sids), [[2, 3, 4], [1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize("at_most", [1, 2, 5])
def test_spread_against_a_loop(at_most):
    rng = np.random.default_rng(2)
    sids = rng.integers(0, 4, (50, 3))
    lists = np.stack([rng.permutation(50)[:15] for _ in range(20)]).astype(np.int32)
    lists[rng.random(lists.shape) < 0.3] = -1
    lists[0] = -1
    for n in (1, 6, 20):
        found = spread(lists, sids, n, at_most)
        for row, items in zip(found, lists, strict=True):
            taken, left = [], []
            for item in items[items >= 0]:
                code = sids[item, 0]
                many = sum(sids[other, 0] == code for other in taken) >= at_most
                (left if many else taken).append(item)
            expected = (taken + left)[:n]
            assert row.tolist() == expected + [-1] * (n - len(expected))
