"""Losses of the preference score against loops and by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax.losses.reward import cross_entropies, reward_loss

B, M, OBJECTIVES, N = 3, 4, 2, 3


def inputs():
    rng = np.random.default_rng(0)
    tower = 2 * rng.standard_normal((B, M, OBJECTIVES)).astype(np.float32)
    p = 2 * rng.standard_normal((B, M, N)).astype(np.float32)
    return tower, p, rng.integers(-1, 2, (B, M, OBJECTIVES)), np.array([[1, 1], [4, 1], [0.5, 2]])


def loops(logit, label):
    """Mean cross-entropy of each objective, in float64."""
    found = []
    for o in range(OBJECTIVES):
        terms = []
        for b, m in np.ndindex(B, M):
            probability = 1 / (1 + np.exp(-float(logit[b, m, o])))
            if label[b, m, o] >= 0:
                terms.append(-np.log(probability if label[b, m, o] else 1 - probability))
        found.append(np.mean(terms))
    return np.array(found)


def test_against_loops():
    tower, p, label, weight = inputs()
    loss, towers, fused = jax.jit(reward_loss)(tower, p, label, weight)
    np.testing.assert_allclose(towers, loops(tower, label), rtol=1e-5)
    expected = []
    for n in range(N):
        same = loops(np.repeat(p[..., n, None], OBJECTIVES, -1), label)  # one p against every label
        expected.append((weight[n] * same).sum() / weight[n].sum())
    np.testing.assert_allclose(fused, expected, rtol=1e-5)
    np.testing.assert_allclose(loss, loops(tower, label).sum() + np.mean(expected), rtol=1e-5)
    _, _, scaled = reward_loss(tower, p, label, 10 * weight)
    np.testing.assert_allclose(fused, scaled, rtol=1e-6)  # only ratios matter


def test_the_best_p_is_the_weighted_rate():
    """Labels 1 and 0 with weights 3 and 1: p = 3/4 has no slope."""
    label = jnp.array([[[1, 0]]])

    def fused(p):
        return reward_loss(jnp.zeros((1, 1, 2)), p, label, jnp.array([[3.0, 1.0]]))[2].sum()

    slope = jax.grad(fused)(jnp.full((1, 1, 1), np.log(3.0)))
    np.testing.assert_allclose(slope, 0, atol=1e-7)
    assert float(jax.grad(fused)(jnp.zeros((1, 1, 1)))[0, 0, 0]) == -0.25


def test_unknown_labels_and_extremes():
    tower, _, label, _ = inputs()
    other = np.where(label < 0, 1e30, tower).astype(np.float32)
    np.testing.assert_array_equal(cross_entropies(tower, label), cross_entropies(other, label))
    slope = jax.grad(lambda x: cross_entropies(x, label).sum())(tower)
    np.testing.assert_array_equal(np.asarray(slope)[label < 0], 0)
    assert (cross_entropies(tower, np.full_like(label, -1)) == 0).all()
    np.testing.assert_allclose(
        cross_entropies(jnp.full((1, 1, 1), 200.0), jnp.zeros((1, 1, 1), int)), 200
    )
