"""Ranks, metrics and intervals against slow, obvious twins."""

import numpy as np
import pytest

from onerec_jax.evaluation.ranking import (
    NOT_RANKED,
    coverage,
    paired_difference,
    rank_of_target_in_list,
    ranking_metrics,
    summarize,
    target_ranks,
    tie_order,
)


def sorted_rank(scores, target, popularity, excluded):
    """The rule as one sort: score descending, popularity descending, item row ascending."""
    candidates = [i for i in range(len(scores)) if not excluded[i]]
    candidates.sort(key=lambda i: (-scores[i], -popularity[i], i))
    return candidates.index(target) if target in candidates else NOT_RANKED


def test_tie_order_is_popularity_then_row():
    np.testing.assert_array_equal(tie_order(np.array([3, 7, 3, 0, 7])), [2, 0, 3, 4, 1])


@pytest.mark.parametrize("exclude", [False, True])
def test_target_ranks_equal_a_sort_with_ties(exclude):
    rng = np.random.default_rng(0)
    users, items = 60, 11
    scores = rng.integers(0, 3, (users, items)).astype(np.float32)  # ties everywhere
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    popularity = rng.integers(0, 4, items)
    targets = rng.integers(0, items, users)
    excluded = rng.random(scores.shape) < (0.3 if exclude else 0)
    expected = [sorted_rank(scores[u], targets[u], popularity, excluded[u]) for u in range(users)]
    ranks = target_ranks(scores, targets, tie_order(popularity), excluded if exclude else None)
    assert ranks.dtype == np.int32
    np.testing.assert_array_equal(ranks, expected)
    assert (NOT_RANKED in expected) == exclude


def test_nan_scores_never_help():
    scores = np.array([[np.nan, np.nan, np.nan], [np.nan, 0.0, 1.0]], np.float32)
    ranks = target_ranks(scores, np.array([0, 1]), np.arange(3, dtype=np.int32))
    np.testing.assert_array_equal(ranks, [NOT_RANKED, 1])


def test_rank_in_list_ignores_padding_and_takes_the_first_place():
    lists = np.array([[4, 2, -1], [2, 2, 4], [-1, -1, -1]])
    np.testing.assert_array_equal(
        rank_of_target_in_list(lists, np.array([2, 2, 0])), [1, 0, NOT_RANKED]
    )
    np.testing.assert_array_equal(
        rank_of_target_in_list(lists, np.array([-1] * 3)), [NOT_RANKED] * 3
    )


def test_metrics_by_hand():
    metrics = ranking_metrics(np.array([0, 2, 5, NOT_RANKED], np.int32), cutoffs=(1, 5))
    assert list(metrics) == ["recall@1", "ndcg@1", "recall@5", "ndcg@5"]
    np.testing.assert_array_equal(metrics["recall@1"], [1, 0, 0, 0])
    np.testing.assert_array_equal(metrics["recall@5"], [1, 1, 0, 0])
    np.testing.assert_allclose(metrics["ndcg@5"], [1, 0.5, 0, 0])


def test_bootstrap_interval_of_a_share_is_the_normal_one():
    users, share = 1000, 0.3
    hits = (np.arange(users) < share * users).astype(float)
    summary = summarize({"recall@10": hits, "one": np.ones(users)}, seed=0, resamples=4000)
    half = 1.96 * np.sqrt(share * (1 - share) / users)
    assert summary["recall@10"] == pytest.approx(share)
    assert summary["recall@10_ci95"] == pytest.approx([share - half, share + half], abs=2e-3)
    assert summary["one_ci95"] == [1.0, 1.0]
    assert summary == summarize({"recall@10": hits, "one": np.ones(users)}, 0, resamples=4000)


def test_pairing_removes_what_two_models_share():
    rng = np.random.default_rng(0)
    shared = rng.random(500)
    result = paired_difference(shared + 0.01, shared, seed=0, resamples=200)
    assert result["difference"] == pytest.approx(0.01)
    assert result["ci95"] == pytest.approx([0.01, 0.01])


def test_empty_or_unpaired_users_are_refused():
    with pytest.raises(ValueError, match="0 users"):
        summarize({"recall@5": np.empty(0)}, seed=0)
    with pytest.raises(ValueError, match="same users"):
        paired_difference(np.zeros(2), np.zeros(3), seed=0)


def test_coverage_counts_items_within_the_cutoff():
    assert coverage(np.array([[0, 1, 2], [1, 3, -1]]), num_items=8, cutoff=2) == 3 / 8
    assert coverage(np.array([[-1, -1]]), num_items=8) == 0
