"""Experts against 'every expert on every token', on meshes, and the balancing bias."""

import functools
import re
from unittest import mock

import chex
import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding

from onerec_jax.models import dropless
from onerec_jax.models.experts import capacity, plan_dispatch
from onerec_jax.models.moe import (
    MoE,
    auxiliary_loss,
    max_violation,
    route,
    update_router_bias,
)
from onerec_jax.sharding import BATCH, make_mesh, on_mesh, replicated, shardings_of

B, S, D, F, E, K = 8, 3, 6, 5, 8, 2
T = B * S
ALL_TO_TWO = np.where(np.arange(E) < 2, 9.0, 0.0)
BIAS = np.random.default_rng(7).permutation(np.linspace(-0.3, 0.3, E)).astype(np.float32)


def inputs():
    """Tokens, which of them are real, and weights of the loss."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, B, S, D)).astype(np.float32)
    return x, rng.random((B, S)) < 0.8, weight


def module(gate="sigmoid", factor=0.0):
    return MoE(E, K, F, factor, jnp.float32, gate)


@functools.cache
def boxed_variables():
    """Weights with their logical axes; a large router and a bias, to tell the experts apart."""
    init = helpers.quick_jit(module().init)
    state = init(jax.random.key(0), jnp.zeros((B, S, D)))
    params = state["params"]
    router = params["router"].replace_boxed(params["router"].value * 3)
    return {**state, "params": {**params, "router": router}, "router": {"bias": jnp.asarray(BIAS)}}


def variables():
    return nn.unbox(boxed_variables())


def choose(router, bias, x, valid, gate):
    """Which experts see each token, `[T, E]`, one token at a time."""
    chosen = np.zeros((T, E), np.float32)
    for t, token in enumerate(np.asarray(x, np.float64).reshape(T, D)):
        logits = token @ np.asarray(router, np.float64)
        score = 1 / (1 + np.exp(-logits))
        if gate == "softmax":
            score = np.exp(logits) / np.exp(logits).sum()
        if valid.reshape(T)[t]:
            chosen[t, np.argsort(-(score + bias))[:K]] = 1
    return chosen


def every_expert_on_every_token(params, x, chosen, gate):
    """Slow, obviously right: all experts run on all tokens, what was not chosen counts zero."""
    x = x.reshape(T, D)
    score = (jax.nn.sigmoid if gate == "sigmoid" else jax.nn.softmax)(x @ params["router"])
    gates = score * chosen
    if gate == "sigmoid":
        gates = gates / jnp.maximum(gates.sum(-1, keepdims=True), 1e-9)
    y = jnp.zeros((T, D))
    for e in range(E):
        a, b = x @ params["w_in"][e, :, 0], x @ params["w_in"][e, :, 1]
        y += gates[:, e : e + 1] * ((a * jax.nn.sigmoid(a) * b) @ params["w_out"][e])
    return y.reshape(B, S, D)


def layer_loss(variables, x, valid, weight, *, gate, dropless=False):
    """`((loss, (output, statistics)), gradients)` of the layer under test."""

    def loss(variables, x):
        y, updated = module(gate).apply(
            variables, x, valid, dropless=dropless, mutable=["router_stats"]
        )
        return (y * weight).sum(), (y, updated["router_stats"])

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, x)


class MeshTest(chex.TestCase):
    @parameterized.product(mesh=[(1, 1), (8, 1), (1, 8), (4, 2)], gate=["sigmoid", "softmax"])
    def test_value_and_gradients_equal_every_expert_on_every_token(self, mesh, gate):
        self.check(mesh, gate=gate)

    @parameterized.product(mesh=[(1, 1), (4, 2), (1, 8)], bias=["even", "two"])
    def test_dropless_equals_every_expert_on_every_token(self, mesh, bias):
        """However many copies are over: with the small sizes here, a loop of several blocks."""
        sizes = {"FREE_ROWS": 1, "COMMON_LOAD": 0.5, "BLOCK": 2}
        with mock.patch.multiple(dropless, **sizes):
            assert dropless.dropless_rows(T, E, K) < T
            self.check(mesh, bias=BIAS if bias == "even" else ALL_TO_TWO, dropless=True)

    def check(self, mesh, *, gate="sigmoid", bias=BIAS, dropless=False):
        x, valid, weight = inputs()
        state = {**variables(), "router": {"bias": jnp.asarray(bias, jnp.float32)}}
        mesh = make_mesh(*mesh)
        split, shardings = NamedSharding(mesh, BATCH), shardings_of(boxed_variables(), mesh)
        chex.assert_equal(shardings["params"]["w_in"].spec[0], "expert")
        chex.assert_equal(shardings["params"]["w_out"].spec[0], "expert")
        run = helpers.quick_jit(
            on_mesh(functools.partial(layer_loss, gate=gate, dropless=dropless), mesh),
            in_shardings=(shardings, split, split, split),
            out_shardings=replicated(mesh),
        )
        (_, (y, stats)), (grads, grad_x) = run(state, x, valid, weight)

        params = variables()["params"]
        chosen = choose(params["router"], bias, x, valid, gate)

        def twin_loss(params, x):
            y = every_expert_on_every_token(params, x, chosen, gate)
            return (y * weight).sum(), y

        twin = helpers.quick_jit(jax.value_and_grad(twin_loss, (0, 1), has_aux=True))
        (_, twin_y), twin_grads = twin(params, x)
        actual, expected = jax.device_get([(y, grads["params"], grad_x), (twin_y, *twin_grads)])
        chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5, strict=True)
        np.testing.assert_array_equal(stats["load"], chosen.sum(0))
        np.testing.assert_array_equal(stats["dropped"], 0)
        np.testing.assert_array_equal(grads["router"]["bias"], np.zeros(E))  # no gradient


class RouteTest(chex.TestCase):
    @parameterized.product(gate=["sigmoid", "softmax"], top_k=[1, 3])
    def test_bias_moves_the_choice_and_not_the_gates(self, gate, top_k):
        x, _, _ = inputs()
        x, router = x.reshape(T, D), variables()["params"]["router"]
        function = helpers.quick_jit(functools.partial(route, top_k=top_k, gate=gate))
        index, gates = function(x, router, jnp.zeros(E).at[5].set(9.0))
        chex.assert_shape([index, gates], (T, top_k))
        np.testing.assert_array_equal(index[:, 0], 5)  # not so without the bias:
        assert (np.asarray(function(x, router, jnp.zeros(E))[0][:, 0]) != 5).any()
        logits = np.asarray(x @ router)
        score = 1 / (1 + np.exp(-logits))
        if gate == "softmax":
            score = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        expected = np.take_along_axis(score, np.asarray(index), axis=1)
        if gate == "sigmoid":
            expected = expected / expected.sum(-1, keepdims=True)
        else:  # as OneRec V0: not renormalised over the chosen
            assert (expected.sum(-1) < 0.999).any()
        np.testing.assert_allclose(gates, expected, rtol=1e-5)

    def test_scores_are_float32_for_16_bit_tokens(self):
        x = jnp.asarray(inputs()[0].reshape(T, D), jnp.bfloat16)
        router = variables()["params"]["router"]
        function = helpers.quick_jit(functools.partial(route, top_k=K))
        actual = function(x, router, jnp.zeros(E))
        expected = function(x.astype(jnp.float32), router, jnp.zeros(E))
        chex.assert_trees_all_equal(actual, expected, strict=True)
        chex.assert_type(actual[1], jnp.float32)


@functools.partial(helpers.quick_jit, static_argnames=("factor", "dropless"))
def apply(state, x, valid, *, factor, dropless):
    return module(factor=factor).apply(state, x, valid, dropless=dropless, mutable=["router_stats"])


def run(x, valid=None, *, factor, bias=BIAS, dropless=False):
    state = {**variables(), "router": {"bias": jnp.asarray(bias)}}
    y, updated = apply(state, x, valid, factor=factor, dropless=dropless)
    return np.asarray(y), jax.device_get(updated["router_stats"])


def test_overflow_drops_late_tokens_and_counts_them():
    x, _, _ = inputs()
    y, stats = run(x, factor=1.0, bias=ALL_TO_TWO)
    rows = T * K // E  # 6 of 24 tokens fit into each of the two experts that all choose
    np.testing.assert_array_equal(stats["load"], [T, T] + [0] * (E - 2))
    np.testing.assert_allclose(stats["dropped"], 1 - rows / T, rtol=1e-6)
    exact, _ = run(x, factor=0.0, bias=ALL_TO_TWO)
    y, exact = y.reshape(T, D), exact.reshape(T, D)
    np.testing.assert_allclose(y[:rows], exact[:rows], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y[rows:], 0)
    assert (np.abs(exact[rows:]).max(-1) > 1e-3).all()


def test_dropless_ignores_the_capacity_factor():
    x, valid, _ = inputs()
    y, stats = run(x, valid, factor=0.5, dropless=True)
    exact, _ = run(x, valid, factor=0.0)
    np.testing.assert_array_equal(y, exact)
    assert stats["dropped"] == 0
    assert run(x, valid, factor=0.5)[1]["dropped"] > 0


def test_padding_takes_no_capacity_and_no_load():
    x, _, _ = inputs()
    rows = T * K // E
    valid = np.ones(T, bool)
    valid[:5] = False  # in front, where it would take the rows of the tokens behind
    y, stats = run(x, valid.reshape(B, S), factor=1.0, bias=ALL_TO_TWO)
    np.testing.assert_array_equal(stats["load"], [T - 5, T - 5] + [0] * (E - 2))
    np.testing.assert_allclose(stats["dropped"], 1 - rows / (T - 5), rtol=1e-6)
    served = np.abs(y.reshape(T, D)).max(-1) > 0
    np.testing.assert_array_equal(np.flatnonzero(served), np.arange(5, 5 + rows))
    other, _ = run(
        np.where(valid.reshape(B, S, 1), x, 3.0),
        valid.reshape(B, S),
        factor=1.0,
        bias=ALL_TO_TWO,
    )
    np.testing.assert_array_equal(other, y)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_plan_against_a_loop(rows):
    rng = np.random.default_rng(rows)
    index = np.stack([rng.permutation(4)[:2] for _ in range(20)]).astype(np.int32)
    valid = rng.random(20) < 0.7
    planned = helpers.quick_jit(plan_dispatch, static_argnums=(2, 3))
    slot, copy = jax.device_get(planned(index, valid[:, None] & np.ones((1, 2), bool), 4, rows))
    taken, expected = [0] * 4, np.full(4 * rows, 40)
    for t in range(20):
        for k in range(2):
            expert = index[t, k]
            fits = bool(valid[t]) and taken[expert] < rows
            row = expert * rows + taken[expert]
            assert slot[t, k] == (row if fits else 4 * rows)
            if fits:
                expected[row] = 2 * t + k
            taken[expert] += fits
    np.testing.assert_array_equal(copy, expected)


def test_capacity_by_hand():
    assert capacity(24, 8, 2, 0.0) == 24  # dropless
    assert capacity(24, 8, 2, 1.0) == 6
    assert capacity(24, 8, 2, 1.25) == 8  # 7.5, rounded up
    assert capacity(24, 8, 2, 99.0) == 24  # an expert sees a token once


def test_dropless_rows_by_hand():
    assert dropless.dropless_rows(24, 8, 2) == 24  # few tokens: as many rows as tokens
    assert dropless.dropless_rows(512, 24, 2) == 128  # what the weights' bytes pay for
    assert dropless.dropless_rows(16_384, 24, 2) == 1712  # 1.25 times the mean, rounded up


def test_no_gradient_has_rows_for_all_tokens_in_every_expert():
    """In post-training those would be E / K times the rows, and no GPU has the memory."""
    x, valid, weight = inputs()
    with mock.patch.multiple(dropless, FREE_ROWS=1, COMMON_LOAD=1.0, BLOCK=2):
        loss = functools.partial(layer_loss, gate="sigmoid", dropless=True)
        text = str(jax.make_jaxpr(loss)(variables(), x, valid, weight))
    shapes = [tuple(map(int, found.split(","))) for found in re.findall(r"\w\[([\d,]+)\]", text)]
    assert (E, T * K // E, F) in shapes  # hidden rows of all experts together
    assert not {shape for shape in shapes if shape[:2] == (E, T) and len(shape) == 3}


def test_a_lone_token_is_served_as_in_a_crowd():
    """Whether its experts are full or empty: the loop takes what the batched product leaves."""
    x, _, _ = inputs()
    state = {**variables(), "router": {"bias": jnp.asarray(ALL_TO_TWO, jnp.float32)}}
    with mock.patch.multiple(dropless, FREE_ROWS=5, BLOCK=4):
        crowd = helpers.quick_jit(functools.partial(module().apply, dropless=True))(state, x)
    for b, s in [(0, 0), (3, 1), (B - 1, S - 1)]:
        alone, _ = run(x[b : b + 1, s : s + 1], factor=0.0, bias=ALL_TO_TWO)
        np.testing.assert_allclose(crowd[b, s], alone[0, 0], rtol=1e-5, atol=1e-6)


def test_statistics_are_written_only_on_demand():
    x, valid, _ = inputs()
    assert set(boxed_variables()) == {"params", "router"}
    y = helpers.quick_jit(module().apply)(variables(), x, valid)
    np.testing.assert_allclose(y, run(x, valid, factor=0.0)[0], rtol=1e-5, atol=1e-6)


def test_bias_moves_by_exactly_the_rate_towards_the_mean():
    router = {"a": {"bias": jnp.array([[0.5, 0.0, -1.0], [0.0, 0.0, 0.0]])}}
    stats = {"a": {"load": jnp.array([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]]), "dropped": jnp.zeros(2)}}
    moved = update_router_bias(router, stats, 0.25)
    expected = {"a": {"bias": jnp.array([[0.75, 0.0, -1.25], [0.0, 0.0, 0.0]])}}
    chex.assert_trees_all_close(moved, expected, rtol=0, atol=0, strict=True)
    chex.assert_trees_all_equal(update_router_bias({}, {}, 0.25), {})  # a dense model


def test_balancing_lowers_the_imbalance():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((256, 2, D)) + 0.5, jnp.float32)
    state = variables()
    state["router"] = {"bias": jnp.zeros(E)}

    @helpers.quick_jit
    def step(router):
        _, updated = module().apply({**state, "router": router}, x, mutable=["router_stats"])
        stats = updated["router_stats"]
        return update_router_bias(router, stats, 0.01), max_violation(stats["load"])

    router, violations = state["router"], []
    for _ in range(100):
        router, violation = step(router)
        violations.append(float(violation))
    assert violations[0] > 0.8
    assert np.mean(violations[-10:]) < 0.5 * violations[0]


def test_max_violation_by_hand():
    load = jnp.array([[1.0, 1.0, 4.0], [2.0, 2.0, 2.0]])
    np.testing.assert_allclose(max_violation(load), [1.0, 0.0], atol=1e-6)


def test_no_valid_token_drops_nothing():
    x, _, _ = inputs()
    y, stats = run(x, np.zeros((B, S), bool), factor=1.0)
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal(stats["load"], 0)
    assert stats["dropped"] == 0


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_auxiliary_loss_by_hand(gate):
    """1 where all is even, more where experts that are liked get the tokens; padding left out."""
    rng = np.random.default_rng(3)
    x, router = rng.standard_normal((T, D)), rng.standard_normal((D, E))
    valid, load = rng.random(T) < 0.7, rng.integers(0, 9, E).astype(np.float32)
    score = 1 / (1 + np.exp(-x @ router)) if gate == "sigmoid" else np.exp(x @ router)
    score /= score.sum(1, keepdims=True)
    expected = E * (load / load.sum() * score[valid].mean(0)).sum()
    arguments = (jnp.float32(x), jnp.asarray(valid), jnp.float32(router), jnp.asarray(load))
    actual = auxiliary_loss(*arguments, gate=gate)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    even = auxiliary_loss(*arguments[:3], jnp.ones(E), gate=gate)
    np.testing.assert_allclose(even, 1.0, rtol=1e-5)


def test_auxiliary_loss_moves_the_router_towards_idle_experts():
    x, valid, _ = inputs()
    layer = MoE(E, K, F, 0.0, jnp.float32, "sigmoid", True)

    def loss(params):
        state = {"params": params, "router": {"bias": jnp.asarray(ALL_TO_TWO, jnp.float32)}}
        _, updated = layer.apply(state, x, valid, mutable=["router_stats"])
        return updated["router_stats"]["auxiliary"]

    params = variables()["params"]
    value, grads = helpers.quick_jit(jax.value_and_grad(loss))(params)
    moved = {**params, "router": params["router"] - 0.1 * grads["router"]}
    assert helpers.quick_jit(loss)(moved) < value
    np.testing.assert_array_equal(grads["w_in"], 0)
