"""The caption loss against loops and numbers computed by hand."""

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax.losses.caption import caption_loss

B, S, V = 4, 3, 5
LENGTH = np.array([3, 0, 1, 2], np.int32)


def inputs():
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((B, S, V)).astype(np.float32)
    return logits, rng.integers(0, V, (B, S)).astype(np.int32)


def test_value_and_gradient_against_loops():
    logits, target = inputs()
    expected, gradient = np.zeros(B), np.zeros((B, S, V))
    for b in range(B):
        for s in range(LENGTH[b]):
            weights = np.exp(logits[b, s].astype(float))
            expected[b] -= np.log(weights[target[b, s]] / weights.sum())
            gradient[b, s] = (b + 1) * (weights / weights.sum() - np.eye(V)[target[b, s]])
    total, count = helpers.quick_jit(caption_loss)(logits, target, LENGTH)
    chex.assert_type([total, count], [jnp.float32, jnp.int32])
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_array_equal(count, LENGTH)
    weight = np.arange(1, B + 1)
    grad = jax.grad(lambda x: caption_loss(x, target, LENGTH)[0] @ weight)(logits)
    np.testing.assert_allclose(grad, gradient, rtol=1e-4, atol=1e-5)


def test_by_hand():
    logits = jnp.log(jnp.array([[[1.0, 2.0, 1.0], [1.0, 1.0, 8.0]]]))
    total, count = caption_loss(logits, jnp.array([[1, 0]]), jnp.array([2]))
    np.testing.assert_allclose(total, [np.log(2) + np.log(10)], rtol=1e-6)
    assert count.tolist() == [2]


def test_what_stands_past_the_length_is_not_read():
    logits, target = inputs()
    bad_logits, bad_target = logits.copy(), target.copy()
    past = np.arange(S) >= LENGTH[:, None]
    bad_logits[past], bad_target[past] = np.inf, -7

    def total(logits, target):
        return caption_loss(logits, target, LENGTH)[0].sum()

    value, grad = jax.value_and_grad(total)(logits, target)
    bad_value, bad_grad = jax.value_and_grad(total)(bad_logits, bad_target)
    assert value == bad_value
    np.testing.assert_array_equal(grad, bad_grad)
    assert not bad_grad[past].any()


def test_a_length_beyond_the_slots_counts_the_slots():
    logits, target = inputs()
    total, count = caption_loss(logits, target, np.full(B, 99, np.int32))
    whole, _ = caption_loss(logits, target, np.full(B, S, np.int32))
    np.testing.assert_array_equal(total, whole)
    np.testing.assert_array_equal(count, S)


def test_large_and_16_bit_logits_stay_finite_and_float32():
    total, _ = caption_loss(
        jnp.array([[[1e4, -1e4]]], jnp.bfloat16), jnp.array([[1]]), jnp.array([1])
    )
    chex.assert_type(total, jnp.float32)
    np.testing.assert_allclose(total, 2e4, rtol=1e-2)
