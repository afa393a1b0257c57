"""Lists of items in one sequence: positions, masks and caches of session-wise generation."""

import dataclasses
import functools

import chex
import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.losses.ntp import list_log_probs
from onerec_jax.models.decoder import Decoder
from onerec_jax.models.onerec import OneRec

USERS, M, L, V = 3, 3, 3, 5
SPEC = helpers.bare_spec(codebook_size=V)
CFG = helpers.tiny_config(session_items=M, num_experts=4, pathways=("short",))
MODEL = OneRec(CFG, SPEC)
BATCH = helpers.random_batch(CFG, SPEC, USERS, targets=M)


@functools.cache
def variables():
    return helpers.random_variables(MODEL, BATCH)


@functools.cache
def forward():
    return helpers.quick_jit(MODEL.apply)


@functools.cache
def logits():
    """Float32 `[B, m, levels, V]`."""
    return np.asarray(forward()(variables(), BATCH))


def test_against_a_sequence_unrolled_by_hand():
    """BOS s11 s12 s13 BOS s21 ... s33, each with the embedding of its item's place; logits of the
    first code behind BOS, of the next behind each code, none behind the third."""
    params = variables()["params"]
    decoder = Decoder(CFG, jnp.float32)
    encode = helpers.quick_jit(functools.partial(MODEL.apply, method="encode"))
    z, length = encode(variables(), BATCH)
    expected = np.zeros((USERS, M, L, V), np.float32)
    x = []
    for item in range(M):
        x.append(np.tile(params["bos"] + params["place"][item], (USERS, 1)))
        for level in range(L):
            row = level * V + BATCH.target[:, item, level]
            x.append(params["sid_embedding"][row] + params["place"][item])
    assert len(x) == M * (L + 1)
    own = {"params": params["decoder"], "router": variables()["router"]["decoder"]}
    run = helpers.quick_jit(decoder.apply)
    h = np.asarray(run(own, np.stack(x, axis=1)[:, None], z, length))[:, 0]
    for item in range(M):
        for level in range(L):
            state = h[:, item * (L + 1) + level]
            scale = params[f"norm_{level}"]["scale"]
            state = state / np.sqrt((state**2).mean(-1, keepdims=True) + 1e-6) * scale
            expected[:, item, level] = state @ params["heads"][level]
    np.testing.assert_allclose(logits(), expected, rtol=1e-4, atol=1e-4)


def test_each_code_is_predicted_from_all_codes_before_it():
    """And from no other: one code is changed at a time."""
    for item, level in np.ndindex(M, L):
        target = BATCH.target.copy()
        target[:, item, level] = (target[:, item, level] + 1) % V
        other = np.asarray(forward()(variables(), BATCH.replace(target=target)))
        moved = np.abs(other - logits()).max((0, 3)).reshape(-1) > 1e-4
        np.testing.assert_array_equal(moved, np.arange(M * L) > item * L + level)


def test_several_lists_share_a_user():
    """Two lists, the second begun: each as it is alone."""
    other = helpers.random_batch(CFG, SPEC, USERS, seed=5, targets=M)
    both = np.concatenate([BATCH.target, other.target], axis=1)
    found = forward()(variables(), BATCH.replace(target=both))
    alone = forward()(variables(), BATCH.replace(target=other.target))
    np.testing.assert_allclose(found[:, :M], logits(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[:, M:], alone, rtol=1e-4, atol=1e-5)
    begun = forward()(variables(), BATCH.replace(target=BATCH.target[:, :1]))
    np.testing.assert_allclose(begun, logits()[:, :1], rtol=1e-4, atol=1e-5)
    logp = list_log_probs(found, both, M)
    chex.assert_shape(logp, (USERS, 2))
    every = np.float64(found) - np.log(np.exp(np.float64(found)).sum(-1, keepdims=True))
    picked = np.take_along_axis(every, both[..., None], axis=-1)
    np.testing.assert_allclose(logp[:, 0], picked[:, :M].sum((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(logp[:, 1], picked[:, M:].sum((1, 2, 3)), rtol=1e-5)


def test_targets_must_be_lists():
    batch = BATCH.replace(target=np.zeros((USERS, 4, L), np.int32))
    with pytest.raises(ValueError, match="4 targets are no lists of 3 items"):
        jax.eval_shape(MODEL.apply, variables(), batch)


def test_steps_with_a_cache_equal_teacher_forcing():
    """Beams that change places after every code, over a whole list."""
    rng, width = np.random.default_rng(0), 4
    codes = rng.integers(0, V, (M * L, USERS, width)).astype(np.int32)
    parents = rng.integers(0, width, (M * L, USERS, width))
    parents[0] = 0  # the first BOS is one row

    @helpers.quick_jit
    def search(variables, batch):
        cross, cache = MODEL.apply(variables, batch, method="start")
        code, outputs = jnp.zeros((USERS, 1), jnp.int32), []
        for i, (item, level) in enumerate(np.ndindex(M, L)):
            out, cache = MODEL.apply(
                variables, code, cross, cache, level, item, method="decode_step"
            )
            outputs.append(out)
            code, cache = codes[i], cache.take(parents[i])
        return outputs

    outputs = search(variables(), BATCH)
    history = np.zeros((USERS, width, 0), np.int32)
    for i in range(M * L):
        target = np.zeros((USERS, width, M * L), np.int32)
        target[..., :i] = history
        batch = BATCH.replace(target=target.reshape(USERS, width * M, L))
        expected = forward()(variables(), batch).reshape(USERS, width, M * L, V)[:, :, i]
        found = np.broadcast_to(outputs[i], expected.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        history = np.take_along_axis(history, parents[i][..., None], axis=1)
        history = np.concatenate([history, codes[i][..., None]], axis=-1)


def test_one_item_is_the_point_wise_model():
    """Parameters of a model of lists are those of the other, and the embedding of places."""

    def init(**changes):
        cfg = dataclasses.replace(CFG, decoder_layers=1, num_experts=0, **changes)
        run = helpers.quick_jit(OneRec(cfg, SPEC).init)
        return nn.unbox(run(jax.random.key(0), BATCH))["params"]

    point, lists = init(session_items=1), init()
    chex.assert_shape(lists.pop("place"), (M, CFG.d_model))
    chex.assert_trees_all_equal(point, lists)
    model = OneRec(dataclasses.replace(CFG, session_place=False), SPEC)
    plain = jax.eval_shape(model.init, jax.random.key(0), BATCH)["params"]
    assert "place" not in plain
