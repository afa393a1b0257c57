"""SASRec: what attention may see, the loss against NumPy, learning, and the stop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.evaluation.baselines import evaluate_baseline
from onerec_jax.evaluation.ranking import ranking_metrics
from onerec_jax.evaluation.sasrec import (
    SASRec,
    SASRecConfig,
    default_config,
    fit_sasrec,
    full_softmax_loss,
    make_score_fn,
    pack,
    training_windows,
)

ITEMS = 10
TINY = SASRecConfig(
    d_model=8, layers=1, max_length=6, batch_size=4, dropout=0.0, learning_rate=1e-2, max_epochs=2
)


@pytest.fixture(scope="module")
def tiny():
    model = SASRec(TINY, ITEMS)
    blank = jnp.zeros((1, TINY.max_length), jnp.int32)
    return model, model.init(jax.random.key(0), blank, blank)["params"]


def encode(tiny, items, segments):
    model, params = tiny
    return np.asarray(model.apply({"params": params}, np.array([items]), np.array([segments]))[0])


def test_a_window_sees_its_past_and_nothing_else(tiny):
    base = encode(tiny, [1, 2, 3, 4, 5, 0], [1, 1, 1, 2, 2, 0])
    future = encode(tiny, [1, 2, 9, 4, 5, 0], [1, 1, 1, 2, 2, 0])
    np.testing.assert_array_equal(base[[0, 1, 3, 4]], future[[0, 1, 3, 4]])
    assert np.abs(base[2] - future[2]).max() > 1e-3
    padding = encode(tiny, [1, 2, 3, 4, 5, 9], [1, 1, 1, 2, 2, 0])
    np.testing.assert_array_equal(base[:5], padding[:5])
    past = encode(tiny, [9, 2, 3, 4, 5, 0], [1, 1, 1, 2, 2, 0])
    assert np.abs(base[:3] - past[:3]).max(axis=1).min() > 1e-3


def test_packing_changes_no_score(tiny):
    """Scores of packed histories equal those of each history alone in a row."""
    model, params = tiny
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, ITEMS, n).astype(np.int32) for n in (3, 0, 2, 8, 1, 6, 4)]
    scores = np.asarray(make_score_fn(model, params)(histories))
    for history, row in zip(histories, scores, strict=True):
        kept = history[-TINY.max_length :].tolist()
        if not kept:
            np.testing.assert_array_equal(row, 0)
            continue
        free = [0] * (TINY.max_length - len(kept))
        hidden = encode(tiny, kept + free, [1] * len(kept) + free)[len(kept) - 1]
        np.testing.assert_allclose(row, hidden @ params["item"]["embedding"].T, atol=1e-5)


def test_windows_cover_every_training_action_once():
    offsets = np.array([0, 9, 10, 12, 19], np.int64)
    train_end = np.array([8, 1, 0, 4], np.int32)
    starts, lengths = training_windows(offsets, train_end, 3)
    actions, places, segments, num_rows = pack(starts, lengths, 3)
    np.testing.assert_array_equal(np.sort(actions), [0, 1, 2, 3, 4, 5, 6, 12, 13, 14])
    assert sorted(zip(starts, lengths, strict=True)) == [(0, 1), (1, 3), (4, 3), (12, 3)]
    assert len(set(places.tolist())) == len(places)
    for window in np.unique(segments):
        inside = places[segments == window]
        np.testing.assert_array_equal(np.diff(inside), 1)
        assert inside[0] // 3 == inside[-1] // 3 < num_rows


@pytest.mark.parametrize("part_size", [2, 128])
def test_loss_and_gradient_equal_numpy(part_size):
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))
    targets, weights = np.array([0, 3, 1, 1, 2]), np.array([1.0, 1, 0, 1, 1])
    logits = hidden @ table.T
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -(weights * np.log(probabilities[np.arange(5), targets])).sum() / weights.sum()
    error = (probabilities - np.eye(4)[targets]) * weights[:, None] / weights.sum()

    def loss_fn(hidden, table):
        return full_softmax_loss(hidden, table, targets, weights, part_size)

    loss, grads = jax.value_and_grad(loss_fn, argnums=(0, 1))(
        jnp.asarray(hidden, jnp.float32), jnp.asarray(table, jnp.float32)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(grads[0], error @ table, atol=1e-6)
    np.testing.assert_allclose(grads[1], error.T @ hidden, atol=1e-6)


def cycles(users=30, length=9):
    """Users who walk the circle of items from random starts: the next item is certain."""
    first = np.random.default_rng(0).integers(0, ITEMS, users)
    rows = (first[:, None] + np.arange(length)) % ITEMS
    offsets = np.arange(users + 1, dtype=np.int64) * length
    at = np.full(users, length, np.int32)
    return offsets, rows.reshape(-1).astype(np.int32), at - 2, at - 2, at - 1


def fit_cycles(**changes):
    offsets, rows, train_end, valid_at, _ = cycles()
    config = dataclasses.replace(TINY, **changes)
    return fit_sasrec(offsets, rows, train_end, valid_at, ITEMS, config)


def test_learns_a_cycle_and_stops_by_patience():
    offsets, rows, _, _, test_at = cycles()
    result = fit_cycles(max_epochs=60, patience=5, dropout=0.1)
    order = np.arange(ITEMS, dtype=np.int32)
    ranks = evaluate_baseline(result.score, offsets, rows, test_at, order)
    assert ranking_metrics(ranks, (1,))["recall@1"].mean() == 1
    assert result.stopped_by == "patience"
    assert result.epochs == result.best_epoch + 5
    assert not result.still_rising


def test_same_seed_same_model():
    first, again = fit_cycles(dropout=0.1), fit_cycles(dropout=0.1)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert first.history[-1]["loss"] == again.history[-1]["loss"]
    assert first.stopped_by == "max_epochs"


def test_a_spent_time_budget_still_gives_one_epoch():
    seen = []
    offsets, rows, train_end, valid_at, _ = cycles()
    config = dataclasses.replace(TINY, time_budget_s=0.0)
    result = fit_sasrec(offsets, rows, train_end, valid_at, ITEMS, config, on_epoch=seen.append)
    assert (result.epochs, result.best_epoch, result.stopped_by) == (1, 1, "time_budget")
    assert result.still_rising
    assert seen == result.history


def test_long_users_get_less_dropout():
    assert default_config(np.array([3, 9])) == SASRecConfig()
    long = default_config(np.array([40, 90]), seed=7)
    assert long == SASRecConfig(dropout=0.2, d_model=64, seed=7)


def test_nothing_to_learn_from_is_refused():
    offsets, rows, train_end, valid_at, _ = cycles()
    with pytest.raises(ValueError, match="two training actions"):
        fit_sasrec(offsets, rows, np.ones_like(train_end), valid_at, ITEMS, TINY)
    with pytest.raises(ValueError, match="validation target"):
        fit_sasrec(offsets, rows, train_end, np.full_like(valid_at, -1), ITEMS, TINY)
