"""The QFormer: the one of the lifelong pathway, and padding, dropout and gradients of its own."""

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax.models.encoder import LifelongQFormer
from onerec_jax.models.qformer import QFormer

LENGTH = np.array([6, 0, 1, 3], np.int32)


def tokens(seed=0):
    return np.random.default_rng(seed).standard_normal((4, 6, 16)).astype(np.float32)


def qformer(**changes):
    return QFormer(**{"num_queries": 3, "blocks": 2, "num_heads": 2, "ff_dim": 24} | changes)


def test_lifelong_pathway_is_this_module_under_the_same_names():
    """Checkpoints of before the two became one: names, shapes and values."""
    cfg = helpers.tiny_config(lifelong_blocks=2, lifelong_queries=3)
    old, new = LifelongQFormer(cfg, jnp.float32), qformer(dtype=jnp.float32)
    variables = helpers.random_variables(old, tokens(), LENGTH)
    chex.assert_trees_all_equal(variables, helpers.random_variables(new, tokens(), LENGTH))
    names = {
        f"{part}_{i}" for part in ("attention", "norm_attention", "norm_ff", "ff") for i in range(2)
    }
    assert set(variables["params"]) == {"query", "norm_kv", *names}
    np.testing.assert_array_equal(
        helpers.quick_jit(old.apply)(variables, tokens(), LENGTH),
        helpers.quick_jit(new.apply)(variables, tokens(), LENGTH),
    )


def test_only_tokens_within_the_length_count():
    model = qformer(dtype=jnp.float32)
    variables = helpers.random_variables(model, tokens(), LENGTH)
    apply = helpers.quick_jit(model.apply)
    out = apply(variables, tokens(), LENGTH)
    chex.assert_shape(out, (4, 3, 16))
    chex.assert_tree_all_finite(out)
    past = (np.arange(6) >= LENGTH[:, None])[..., None]
    np.testing.assert_array_equal(
        out, apply(variables, np.where(past, tokens(1), tokens()), LENGTH)
    )
    # And each of those within does: the counterpart, which an idle module would fail.
    for row, length in enumerate(LENGTH):
        for slot in range(length):
            changed = tokens()
            changed[row, slot] = tokens(1)[row, slot]
            other = apply(variables, changed, LENGTH)
            assert np.abs(out - other)[row].max() > 1e-3
            np.testing.assert_array_equal(out[:row], other[:row])
    # The order of tokens does not: their encoder has seen to it.
    np.testing.assert_allclose(
        out[0], apply(variables, tokens()[:, ::-1], LENGTH)[0], rtol=1e-4, atol=1e-4
    )


def test_dropout_is_on_in_training_only():
    model = qformer(dtype=jnp.float32, dropout=0.5)
    variables = helpers.random_variables(model, tokens(), LENGTH)
    still = [model.apply(variables, tokens(), LENGTH) for _ in range(2)]
    np.testing.assert_array_equal(*still)
    loud = [
        model.apply(variables, tokens(), LENGTH, train=True, rngs={"dropout": jax.random.key(i)})
        for i in range(2)
    ]
    assert np.abs(loud[0] - loud[1]).max() > 1e-3


def test_bfloat16_keeps_float32_weights():
    model = qformer(dtype=jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens(), LENGTH)
    chex.assert_trees_all_equal_dtypes(
        variables, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), variables)
    )
    chex.assert_type(jax.eval_shape(model.apply, variables, tokens(), LENGTH), jnp.bfloat16)
