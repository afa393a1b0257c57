"""The learning-rate course, and AdamW with clipping and decay against arithmetic by hand."""

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import full_spec, random_batch, tiny_config

from onerec_jax.models.onerec import OneRec
from onerec_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer


@pytest.mark.parametrize(
    ("decay", "middle", "end"),
    [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)],
)
def test_schedule_at_key_steps(decay, middle, end):
    cfg = OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay=decay, final_fraction=0.1)
    rate = learning_rate_schedule(cfg, 110)
    found = [float(rate(step)) for step in (0, 5, 10, 60, 110, 500)]
    expected = [0.0, 1.0, 2.0, 2 * middle, 2 * end, 2 * end]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_cosine_and_linear_differ_off_the_middle():
    values = {}
    for decay in ("cosine", "linear"):
        cfg = OptimizerConfig(learning_rate=1.0, warmup_steps=0, decay=decay, final_fraction=0.0)
        values[decay] = float(learning_rate_schedule(cfg, 100)(25))
    np.testing.assert_allclose(values["cosine"], 0.5 * (1 + np.cos(np.pi / 4)), rtol=1e-6)
    np.testing.assert_allclose(values["linear"], 0.75, rtol=1e-6)


def test_schedule_with_little_room():
    """No warm-up starts at the peak; a warm-up longer than the run only rises."""
    none = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=0), 10)
    np.testing.assert_allclose([none(0), none(10)], [1.0, 0.1], rtol=1e-6)
    long = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=50), 10)
    np.testing.assert_allclose([long(i) for i in (0, 5, 10)], [0.0, 0.5, 1.0], rtol=1e-6)


@pytest.fixture(scope="module")
def params():
    """Real parameters, abstract, under their paths."""
    cfg, spec = tiny_config(), full_spec()
    init = OneRec(cfg, spec).init
    boxed = jax.eval_shape(init, jax.random.key(0), random_batch(cfg, spec, 2))
    return nn.unbox(boxed["params"])


def test_weight_decay_skips_vectors(params):
    """Matrices and tables shrink without a gradient; norm scales, biases and BOS stay."""
    cfg = OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.5)
    tx = make_optimizer(cfg, 10)
    # The rule reads names; one element a leaf keeps the arithmetic to a few compiled shapes.
    ones = jax.tree.map(lambda x: jnp.ones((1,) * x.ndim, x.dtype), params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, ones), tx.init(ones), ones)
    seen = set()
    for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rank = update.ndim - ("/layers/" in name)  # scanned blocks carry a leading layer axis
        np.testing.assert_allclose(update, -0.5 if rank > 1 else 0.0, err_msg=name)
        seen.add((name.split("/")[-1], rank > 1))
    # The rule met everything it is about.
    assert {("scale", False), ("bias", False), ("bos", False)} <= seen
    assert {("kernel", True), ("sid_embedding", True), ("heads", True), ("router", True)} <= seen
    assert {("w_in", True), ("embedding", True), ("tag", True)} <= seen


def test_two_steps_by_hand():
    """Adam with bias correction, decoupled decay, the clip before the moments."""
    cfg = OptimizerConfig(
        learning_rate=0.1,
        warmup_steps=0,
        decay="constant",
        weight_decay=0.2,
        clip_norm=1.0,
        b1=0.9,
        b2=0.8,
    )
    tx = make_optimizer(cfg, 10)
    p = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    state = tx.init(p)
    m, v = np.zeros(3), np.zeros(3)
    by_hand = np.array([1.0, -2.0, 3.0])
    # The first gradient has norm 13 and is clipped to 1; the second is below the limit.
    for step, g in enumerate((np.array([3.0, -4.0, 12.0]), np.array([0.1, 0.2, -0.3])), 1):
        grads = {"kernel": jnp.array([g[:2]]), "bias": jnp.array(g[2:])}
        updates, state = tx.update(grads, state, p)
        p = optax.apply_updates(p, updates)
        g = g / max(np.linalg.norm(g), 1.0)
        m, v = 0.9 * m + 0.1 * g, 0.8 * v + 0.2 * g**2
        adam = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.8**step)) + 1e-8)
        by_hand = by_hand - 0.1 * (adam + 0.2 * by_hand * [1, 1, 0])
        found = np.concatenate([p["kernel"][0], p["bias"]])
        np.testing.assert_allclose(found, by_hand, rtol=1e-5)


def test_tables_have_a_learning_rate_of_their_own():
    """Updates of embedding tables are in proportion to it, all others as before."""
    cfg, spec = tiny_config(decoder_layers=1, num_experts=0), full_spec()
    init = jax.eval_shape(OneRec(cfg, spec).init, jax.random.key(0), random_batch(cfg, spec, 1))
    params = jax.tree.map(lambda x: np.ones(1, np.float32), nn.unbox(init)["params"])
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, decay="constant")
    updates = []
    for rate in (None, 0.3):
        tx = make_optimizer(config, 10, sparse_learning_rate=rate)
        step = helpers.quick_jit(lambda p, tx=tx: tx.update(p, tx.init(p), p)[0])
        updates.append(jax.device_get(step(params)))
    ratio = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float((b / a)[0])
        for (path, a), b in zip(
            jax.tree_util.tree_flatten_with_path(updates[0])[0],
            jax.tree.leaves(updates[1]),
            strict=True,
        )
    }
    assert {name for name, x in ratio.items() if abs(x - 3) < 1e-4} == {
        name for name in ratio if name == "sid_embedding" or "features/" in name
    }
    assert all(abs(x - 3) < 1e-4 or abs(x - 1) < 1e-4 for x in ratio.values())
    assert ratio["encoder/features/author"] > 2
