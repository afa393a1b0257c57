"""Attention by lengths, norm and feed-forward against slow twins."""

import dataclasses

import chex
import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from onerec_jax.models.layers import FeedForward, Projections, attention, cpu_product, rms_norm
from onerec_jax.models.onerec import OneRec

B, S, T, H, K = 4, 3, 5, 2, 4
LENGTHS = np.array([5, 0, 1, 3], np.int32)


def qkv(keys=T):
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((B, n, H, K), np.float32) for n in (S, keys, keys))


def masked_softmax_attention(q, k, v, mask_bst):
    """Softmax over the keys that the mask names, written out; zeros where it names none."""
    score = jnp.einsum("bshk,bthk->bhst", q, k) / np.sqrt(q.shape[-1])
    weight = jnp.exp(score) * jnp.asarray(mask_bst)[:, None]
    weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-9)
    return jnp.einsum("bhst,bthk->bshk", weight, v)


def value_and_gradients(f, q, k, v):
    """Value and gradients of an uneven sum, so that no error cancels."""
    weight = np.random.default_rng(1).standard_normal(q.shape, np.float32)

    def loss(q, k, v):
        y = f(q, k, v)
        return (y * weight).sum(), y

    (_, y), grads = helpers.quick_jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return y, grads


class AttentionTest(chex.TestCase):
    @parameterized.parameters("lengths", "causal", "all")
    def test_value_and_gradients(self, kind):
        q, k, v = qkv(S if kind == "causal" else T)
        keys = k.shape[1]
        if kind == "lengths":
            options = {"key_length_b": jnp.asarray(LENGTHS)}
            mask = np.broadcast_to((np.arange(keys) < LENGTHS[:, None])[:, None], (B, S, keys))
        else:
            options = {"causal": kind == "causal"}
            mask = np.tril(np.ones((S, keys))) if kind == "causal" else np.ones((S, keys))
            mask = np.broadcast_to(mask.astype(bool), (B, S, keys))
        actual = value_and_gradients(lambda *x: attention(*x, **options), q, k, v)
        expected = value_and_gradients(lambda *x: masked_softmax_attention(*x, mask), q, k, v)
        chex.assert_tree_all_finite(actual)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)

    def test_no_key_gives_zeros(self):
        q, k, v = qkv()
        y, grads = value_and_gradients(
            lambda *x: attention(*x, key_length_b=jnp.zeros(B, jnp.int32)), q, k, v
        )
        chex.assert_trees_all_equal(y, jnp.zeros_like(y))
        chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))

    def test_content_past_the_length_is_not_read(self):
        q, k, v = qkv()
        past = (np.arange(T) >= LENGTHS[:, None])[..., None, None]
        run = helpers.quick_jit(lambda q, k, v: attention(q, k, v, key_length_b=LENGTHS))
        clean, other = run(q, k, v), run(q, np.where(past, 7, k), np.where(past, -7, v))
        chex.assert_trees_all_equal(clean, other)

    def test_auto_is_xla_without_a_gpu_and_keeps_the_type(self):
        q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv())
        auto, xla = helpers.quick_jit(
            lambda *x: (attention(*x, implementation="auto"), attention(*x))
        )(q, k, v)
        chex.assert_trees_all_equal(auto, xla, strict=True)
        chex.assert_type(auto, jnp.bfloat16)


def test_rms_norm_by_hand():
    x = jnp.array([[3.0, -4.0], [0.0, 0.0]])
    y, variables = rms_norm(dtype=jnp.float32, name=None).init_with_output(jax.random.key(0), x)
    chex.assert_trees_all_close(y, x / jnp.sqrt(12.5), atol=1e-4)
    chex.assert_shape(variables["params"]["scale"].value, (2,))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_stay_float32_whatever_the_compute_type(dtype):
    x = jnp.ones((2, 3, 8), dtype)
    y, variables = jax.eval_shape(FeedForward(6, dtype).init_with_output, jax.random.key(0), x)
    chex.assert_type(y, dtype)
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_feed_forward_is_two_matrices_and_an_activation(activation):
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    y, variables = helpers.quick_jit(FeedForward(6, jnp.float32, activation).init_with_output)(
        jax.random.key(0), x
    )
    w_in = variables["params"]["w_in"]["kernel"].value
    w_out = variables["params"]["w_out"]["kernel"].value
    h = np.asarray(x @ w_in, np.float64)
    gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    hidden = gelu if activation == "gelu" else np.maximum(h, 0)
    chex.assert_trees_all_close(np.asarray(y, np.float64), hidden @ np.asarray(w_out), atol=1e-5)


def test_activation_reaches_every_dense_feed_forward():
    """Encoder, QFormer and decoder; the parameters are the same ones."""
    spec = helpers.bare_spec()
    cfg = helpers.tiny_config(num_experts=0)
    batch = helpers.random_batch(cfg, spec, 1)
    text, shapes = {}, {}
    for name in ("gelu", "relu"):
        model = OneRec(dataclasses.replace(cfg, activation=name), spec)
        shapes[name] = jax.eval_shape(model.init, jax.random.key(0), batch)
        variables = nn.unbox(shapes[name])
        text[name] = str(jax.make_jaxpr(model.apply)(variables, batch))
    chex.assert_trees_all_equal(shapes["gelu"], shapes["relu"])
    assert ("tanh" in text["gelu"], "tanh" in text["relu"]) == (True, False)


def test_projections_split_and_join_heads():
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    maps = Projections(8, 2, jnp.float32)

    def both(maps, x):
        q = maps.q(x)
        return q, maps.o(q + 0 * (maps.k(x) + maps.v(x)))

    variables = helpers.random_variables(maps, x, method=both)
    kernels = {name: layer["kernel"] for name, layer in variables["params"].items()}
    chex.assert_shape([kernels[name] for name in "qkv"], (8, 2, 4))
    chex.assert_shape(kernels["o"], (2, 4, 8))
    q, y = helpers.quick_jit(lambda v, x: maps.apply(v, x, method=both))(variables, x)
    expected = np.einsum("btd,dhk->bthk", x, kernels["q"])
    chex.assert_trees_all_close(np.asarray(q), expected, atol=1e-5)
    expected = np.einsum("bthk,hkd->btd", expected, kernels["o"])
    chex.assert_trees_all_close(np.asarray(y), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "w", "axes"),
    [
        ((2, 3, 8), (8, 4), 1),
        ((2, 3, 4), (4, 8), 1),
        ((5, 8), (8, 2, 2), 1),
        ((2, 3, 2, 4), (2, 4, 5), 2),
    ],
    ids=["narrower", "wider", "heads", "joined"],
)
def test_the_product_for_cpus_and_its_gradients(x, w, axes):
    """As `jnp.tensordot` and its own gradients, to the types and the last digit but one."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (x, w))
    y, back = jax.vjp(lambda x, w: cpu_product(x, w, axes), x, w)
    expected, expected_back = jax.vjp(lambda x, w: jnp.tensordot(x, w, axes), x, w)
    gradient = jnp.asarray(rng.standard_normal(y.shape), jnp.float32)
    actual = y, *back(gradient)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, (expected, x, w))
    chex.assert_trees_all_close(actual, (expected, *expected_back(gradient)), rtol=1e-5, atol=1e-6)
