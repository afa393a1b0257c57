"""Recall by Swing against loops."""

import helpers
import numpy as np
import pytest
import scipy.sparse as sp

from onerec_jax.data.features import positive_actions
from onerec_jax.data.splits import make_split, train_mask
from onerec_jax.evaluation.cascade import SwingRecall, unlisted
from onerec_jax.inputs import PositiveRule
from onerec_jax.tokenizer.pairs import PairConfig, swing

ITEMS = 30


@pytest.fixture(scope="module")
def recall():
    """Quarters as scores, so that sums tie and are exact."""
    rng = np.random.default_rng(0)
    score = rng.integers(1, 4, (ITEMS, ITEMS)) * (rng.random((ITEMS, ITEMS)) < 0.2) / 4
    np.fill_diagonal(score, 0)
    popular = rng.permutation(ITEMS).astype(np.int32)
    return SwingRecall(sp.csr_array(score.astype(np.float32)), popular)


def slow(recall, liked, seen, n):
    score = recall.neighbours.toarray()
    total = {item: sum(score[i, item] for i in set(liked)) for item in range(ITEMS)}
    near = [i for i in total if total[i] > 0 and i not in seen]
    near = sorted(near, key=lambda item: (-total[item], item))[:n]
    rest = [i for i in recall.popular.tolist() if i not in near and i not in seen]
    found = (near + rest)[:n]
    return found + [-1] * (n - len(found))


@pytest.mark.parametrize("n", [3, 12, 40])
def test_recall_by_loops(recall, n):
    rng = np.random.default_rng(1)
    liked = [rng.integers(0, ITEMS, size) for size in (6, 1, 0, 3)]
    seen = [rng.integers(0, ITEMS, size) for size in (10, 0, 4, 25)]
    found = recall(liked, seen, n)
    wanted = [slow(recall, a.tolist(), b.tolist(), n) for a, b in zip(liked, seen, strict=True)]
    np.testing.assert_array_equal(found, wanted)


def test_a_neighbour_is_a_multiply_add(recall):
    liked = [np.array([4, 9, 4]), np.array([], int)]
    entries = (recall.neighbours.toarray() > 0).sum(1)
    np.testing.assert_array_equal(recall.flops(liked), [2 * (entries[4] + entries[9]), 0])


def test_only_positive_training_actions_count():
    dataset = helpers.full_dataset(users=60, items=12)
    split, rule = make_split(dataset), PositiveRule()
    found = SwingRecall.fit(dataset, split, rule, np.arange(12), neighbours=3)
    keep = train_mask(dataset, split) & positive_actions(dataset, rule)
    user = dataset.interactions["user_row"].to_numpy()[keep]
    pairs = swing(user, dataset.item_rows[keep], 12, PairConfig(top_k=3))
    assert len(pairs) > 20
    score = np.zeros((12, 12), np.float32)
    score[pairs.first, pairs.second] = pairs.score
    np.testing.assert_array_equal(found.neighbours.toarray(), score)


def test_unlisted():
    popular = np.array([5, 1, 4, 0])
    assert unlisted(popular, np.array([1, 9, -1]), 2).tolist() == [5, 4]
    assert unlisted(popular, np.array([1]), 9).tolist() == [5, 4, 0]
    assert unlisted(popular, np.array([]), 0).tolist() == []
