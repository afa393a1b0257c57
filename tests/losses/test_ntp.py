"""Next-token prediction against loops and numbers computed by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax.losses.ntp import ntp_loss

B, S, V = 4, 3, 5


def inputs():
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((B, S, V)).astype(np.float32)
    return logits, rng.integers(0, V, (B, S)).astype(np.int32)


def loops(logits, target):
    """Loss `[B, S]` and the gradient of its sum, in float64."""
    loss, gradient = np.zeros((B, S)), np.zeros((B, S, V))
    for b, s in np.ndindex(B, S):
        weights = [np.exp(float(x)) for x in logits[b, s]]
        loss[b, s] = -np.log(weights[target[b, s]] / sum(weights))
        for v in range(V):
            gradient[b, s, v] = weights[v] / sum(weights) - (v == target[b, s])
    return loss, gradient


class NtpTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_value_and_gradient_against_loops(self):
        logits, target = inputs()
        loss, gradient = loops(logits, target)
        actual = self.variant(ntp_loss)(logits, target)
        chex.assert_shape(actual, (B, S))
        np.testing.assert_allclose(actual, loss, rtol=1e-5)
        actual = self.variant(jax.grad(lambda x: ntp_loss(x, target).sum()))(logits)
        np.testing.assert_allclose(actual, gradient, rtol=1e-4, atol=1e-6)

    def test_by_hand(self):
        logits = jnp.log(jnp.array([[[1.0, 2.0, 1.0], [1.0, 1.0, 8.0]]]))
        loss = ntp_loss(logits, jnp.array([[1, 0]]))
        np.testing.assert_allclose(loss, [[np.log(2), np.log(10)]], rtol=1e-6)

    def test_numerical_gradients(self):
        logits, target = inputs()
        chex.assert_numerical_grads(
            lambda x: ntp_loss(x, target), (jnp.asarray(logits),), order=1, atol=0.02, rtol=0.02
        )

    def test_uniform_logits_cost_log_v(self):
        _, target = inputs()
        np.testing.assert_allclose(ntp_loss(jnp.full((B, S, V), 7.0), target), np.log(V), rtol=1e-6)

    def test_large_and_16_bit_logits_stay_finite_and_float32(self):
        loss = ntp_loss(jnp.array([[[1e4, -1e4]]], jnp.bfloat16), jnp.array([[1]]))
        chex.assert_type(loss, jnp.float32)
        np.testing.assert_allclose(loss, 2e4, rtol=1e-2)
