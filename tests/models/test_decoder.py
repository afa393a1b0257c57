"""The decoder: one position at a time equals all at once, and no code sees a later one."""

import functools

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.models.decoder import BeamCache, Decoder

CFG = helpers.tiny_config()
B, W, S, T = 3, 4, 3, 6
LENGTHS = np.array([6, 0, 2], np.int32)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def variables_of(cfg):
    return helpers.random_variables(
        Decoder(cfg, jnp.float32), draw(B, 1, S, 16), draw(B, T, 16), LENGTHS
    )


def run(x, z, lengths=LENGTHS, cfg=CFG):
    """Hidden states of one target a user, `[B, S, D]`."""
    return run_targets(x[:, None], z, lengths, cfg)[:, 0]


def run_targets(x, z, lengths=LENGTHS, cfg=CFG):
    return np.asarray(_apply(cfg)(variables_of(cfg), x, z, lengths))


@functools.cache
def _apply(cfg):
    return helpers.quick_jit(Decoder(cfg, jnp.float32).apply)


@pytest.mark.parametrize("experts", [8, 0])
def test_steps_with_a_cache_equal_teacher_forcing(experts):
    """Every beam of every user, after a change of beams between the steps."""
    cfg = helpers.tiny_config(num_experts=experts)
    decoder, variables = Decoder(cfg, jnp.float32), variables_of(cfg)
    z = draw(B, T, 16, seed=1)
    x = draw(B, W, S, 16, seed=2)  # inputs of each beam, position by position
    parents = np.array([[3, 0, 0, 2], [1, 1, 2, 3], [0, 3, 2, 1]], np.int32)

    @helpers.quick_jit
    def search(variables, x, z, lengths):
        def apply(method, *args):
            return decoder.apply(variables, *args, method=method)

        cross, cache = apply("cross_cache", z, lengths), BeamCache()
        outputs = []
        for t in range(S):
            if t == 2:  # the survivors take over their parents' caches
                cache = cache.take(parents)
            h, cache = apply("step", x[:, :, t], cross, cache)
            outputs.append(h)
        return jnp.stack(outputs, axis=2)

    stepped = np.asarray(search(variables, x, z, LENGTHS))
    for w in range(W):
        history = np.concatenate([x[np.arange(B), parents[:, w], :2], x[:, w, 2:]], axis=1)
        before, after = run(x[:, w], z, cfg=cfg), run(history, z, cfg=cfg)
        np.testing.assert_allclose(stepped[:, w, :2], before[:, :2], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stepped[:, w, 2], after[:, 2], rtol=1e-4, atol=1e-5)


def test_no_position_sees_a_later_one():
    x, z = draw(B, S, 16), draw(B, T, 16, seed=1)
    h = run(x, z)
    for t in range(S):
        changed = x.copy()
        changed[:, t:] += 1
        other = run(changed, z)
        np.testing.assert_array_equal(h[:, :t], other[:, :t])
        assert (np.abs(h[:, t:] - other[:, t:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("experts", [8, 0])
def test_targets_of_a_user_do_not_see_each_other(experts):
    """Several targets on one encoder pass give what each gives alone."""
    cfg = helpers.tiny_config(num_experts=experts)
    x, z = draw(B, 4, S, 16), draw(B, T, 16, seed=1)
    together = run_targets(x, z, cfg=cfg)
    for target in range(4):
        alone = run(x[:, target], z, cfg=cfg)
        np.testing.assert_allclose(together[:, target], alone, rtol=1e-4, atol=1e-5)


def test_only_valid_tokens_of_the_user_are_read():
    x, z = draw(B, S, 16), draw(B, T, 16, seed=1)
    h = run(x, z)
    past = np.arange(T) >= LENGTHS[:, None]
    np.testing.assert_array_equal(h, run(x, np.where(past[..., None], 7, z)))
    changed = z.copy()
    changed[:, 1] += 1  # valid for users 0 and 2
    moved = np.abs(h - run(x, changed)).max((1, 2)) > 1e-4
    np.testing.assert_array_equal(moved, [True, False, True])
    chex.assert_tree_all_finite(h)  # user 1 has no token at all


def test_cache_take_against_a_loop():
    k, v = draw(1, 2, B, W, 2, 8), draw(1, 2, B, W, 2, 8, seed=1)
    parents = np.array([[0, 0, 3], [2, 1, 0], [3, 3, 3]], np.int32)
    shared = jnp.asarray(k[:, :, :, :1])  # BOS
    taken = BeamCache((shared, jnp.asarray(k)), (shared, jnp.asarray(v))).take(parents)
    for old, (first, new) in ((k, taken.k), (v, taken.v)):
        np.testing.assert_array_equal(first, shared)
        chex.assert_shape(new, (1, 2, B, 3, 2, 8))
        for b, w in np.ndindex(B, 3):
            np.testing.assert_array_equal(new[:, :, b, w], old[:, :, b, parents[b, w]])


def test_sizes_of_the_caches():
    """Keys and values of the user once, those of a code once a beam."""
    decoder = Decoder(CFG, jnp.bfloat16)

    def two_steps(variables, z, lengths):
        def apply(method, *args):
            return decoder.apply(variables, *args, method=method)

        cross = apply("cross_cache", z, lengths)
        _, cache = apply("step", jnp.zeros((B, 1, 16)), cross, BeamCache())
        _, cache = apply("step", jnp.zeros((B, W, 16)), cross, cache)
        return cross, cache

    cross, cache = jax.eval_shape(two_steps, variables_of(CFG), draw(B, T, 16), LENGTHS)
    chex.assert_shape([cross.k, cross.v], (2, 1, B, T, 2, 8))
    chex.assert_shape(cache.k + cache.v, [(2, 1, B, 1, 2, 8), (2, 1, B, W, 2, 8)] * 2)
    chex.assert_type(cache.k + cache.v, jnp.bfloat16)
