"""The search over label weights, by hand."""

import numpy as np

from onerec_jax.rewards.weights import choose_weights, weight_candidates


def test_candidates():
    found = weight_candidates(["ctr", "ltr"], [1, 2], [0.5, 0.1], 4)
    assert list(found) == ["base", "by variance", "ctr x 4", "ltr x 4"]
    expected = [[1, 2], [4, 2 / 0.09], [4, 2], [1, 8]]
    np.testing.assert_allclose(np.stack(list(found.values())), expected)
    assert list(weight_candidates(["ctr", "ltr"], [1, 2], [0.5, 0.1], 1)) == ["base"]
    assert list(weight_candidates(["ctr"], [3], [0.5], 4)) == ["base"]  # only ratios matter


def test_no_auc_may_fall():
    base = [0.7, 0.6, np.nan]
    assert choose_weights([base, [0.9, 0.59, 0.9], [0.8, 0.6, 0.1]]) == 2
    assert choose_weights([base, [0.71, 0.61, 0.5], [0.72, 0.62, 0.5]]) == 2
    assert choose_weights([base, [0.9, 0.59, 0.9]]) == 0
    assert choose_weights([[0.7, 0.6], [0.7, 0.6]]) == 0  # no change for nothing
    assert choose_weights([[np.nan], [np.nan]]) == 0
