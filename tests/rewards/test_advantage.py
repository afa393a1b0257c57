"""Group advantages against NumPy, and what they refuse."""

import jax
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.rewards.advantage import check_rewards, group_advantages

REWARDS = np.array(
    [
        [0.1, 0.4, 0.4, 0.7],
        [0.1, 0.1, 0.1, 0.1],  # nothing to prefer
        [0.9, np.nan, 0.3, np.nan],
        [0.2, np.nan, np.nan, np.nan],  # nothing to compare with
    ],
    np.float32,
)
VALID = ~np.isnan(REWARDS)


def test_by_hand():
    advantage, counts = jax.jit(group_advantages)(REWARDS, VALID)
    root = np.sqrt(2)
    expected = [[-root, 0, 0, root], [0] * 4, [1, 0, -1, 0], [0] * 4]
    np.testing.assert_allclose(advantage, expected, atol=1e-5)
    np.testing.assert_array_equal(counts, VALID & [[True], [False], [True], [False]])


def test_mean_0_and_deviation_1():
    rng = np.random.default_rng(0)
    reward = (0.999 + 1e-4 * rng.random((5, 128))).astype(np.float32)  # close to each other
    advantage, counts = group_advantages(reward)
    assert counts.all()
    np.testing.assert_allclose(np.mean(advantage, 1), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(advantage, 1), 1, rtol=1e-4)
    wide = reward.astype(float)
    expected = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    np.testing.assert_allclose(advantage, expected, atol=5e-3)


def test_rounding_is_no_preference():
    """Half a unit in the last place must not become an advantage of one."""
    reward = np.full((1, 64), 0.7, np.float32)
    reward[0, ::2] = np.nextafter(np.float32(0.7), np.float32(1))
    advantage, counts = group_advantages(reward)
    assert not counts.any()
    assert not advantage.any()


def test_a_group_of_one_is_refused():
    with pytest.raises(InputError, match="sample 2 or more"):
        group_advantages(np.ones((3, 1), np.float32))


def test_a_reward_that_is_no_number_is_named():
    items = np.array([[2, -1, 0]])
    check_rewards(np.array([[0.1, np.nan, 0.3]]), items, ["a", "b", "c"])  # no item, no reward
    with pytest.raises(InputError, match="reward of item c is nan") as error:
        check_rewards(np.array([[np.nan, np.nan, np.inf]]), items, ["a", "b", "c"])
    assert "2 of 3" in str(error.value)
