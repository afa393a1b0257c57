"""One number from several heads."""

import numpy as np

from onerec_jax.rewards.session import Scale, scalar_reward


def test_by_hand():
    scale = Scale.of([[0.2, 0.5, 0.1], [0.4, 0.5, 0.3]])
    np.testing.assert_allclose(scale.mean, [0.3, 0.5, 0.2])
    np.testing.assert_allclose(scale.deviation, [0.1, 0, 0.1])
    rate = np.array([[0.4, 0.9, 0.2], [0.3, 0.1, np.nan]])
    # The second head is the same of all sessions: whatever it says elsewhere tells nothing.
    found = scalar_reward(rate, scale, np.array([1.0, 5.0, 2.0]))
    np.testing.assert_allclose(found, [1.0, np.nan], atol=1e-6)
    np.testing.assert_allclose(scalar_reward(rate[:, :1], Scale.of([[0.0], [2.0]]), [3.0])[0], -1.8)
