"""AUC, GAUC and calibration against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from onerec_jax.evaluation.classification import auc, auc_by_group, calibration, gauc


def draw(n=600, users=9, seed=0):
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 12, n) / 4  # many ties
    label = (rng.random(n) < 0.2 + 0.2 * score / 3).astype(np.int8)
    return rng.integers(0, users, n), label, score


def test_auc_against_scikit_learn():
    _, label, score = draw()
    assert auc(label, score) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert auc([0, 1, 1, 0], [0.1, 0.9, 0.4, 0.4]) == pytest.approx(3.5 / 4)
    assert auc([0, 1], [0.2, 0.7]) == 1
    assert np.isnan(auc([1, 1], [0.2, 0.7]))
    assert np.isnan(auc([], []))


def test_gauc_against_a_loop():
    user, label, score = draw()
    label[user == 3] = 1  # a user without a negative
    values, count = auc_by_group(user, label, score)
    total = weight = 0.0
    for u in range(9):
        mine = user == u
        assert count[u] == mine.sum()
        if u == 3:
            assert np.isnan(values[u])
            continue
        expected = roc_auc_score(label[mine], score[mine])
        assert values[u] == pytest.approx(expected, abs=1e-12)
        total, weight = total + mine.sum() * expected, weight + mine.sum()
    value, users = gauc(user, label, score)
    assert value == pytest.approx(total / weight, abs=1e-12)
    assert users == 8
    value, users = gauc(user, np.ones_like(label), score)
    assert np.isnan(value)
    assert users == 0


def test_calibration_by_hand():
    found = calibration([0, 0, 1, 1], [0.1, 0.3, 0.4, 0.8], bins=2)
    assert found["predicted"] == pytest.approx([0.2, 0.6])
    assert found["observed"] == [0, 1]
    assert found["count"] == [2, 2]
    assert found["error"] == pytest.approx(0.3)
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    assert calibration(rng.random(20_000) < p, p)["error"] < 0.02
    assert calibration(rng.random(20_000) < p, p**2)["error"] > 0.1
    nothing = calibration([], [])
    assert nothing["count"] == []
    assert np.isnan(nothing["error"])
