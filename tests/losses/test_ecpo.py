"""ECPO and GRPO against numbers computed by hand, and against loops with numerical gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.losses.ecpo import PolicyConfig, log_probs, policy_loss

B, G, S = 3, 4, 2
ECPO, GRPO = PolicyConfig(), PolicyConfig(algorithm="grpo")

# Specification, section 9, with epsilon 0.2 and delta 0.1: A, pi / pi_old, then value and d value /
# d log pi of the objective under ECPO and under GRPO.
CASES = {
    "A > 0, below the clip": (2.0, 0.5, 1.0, 1.0, 1.0, 1.0),
    "A > 0, inside": (2.0, 1.1, 2.2, 2.2, 2.2, 2.2),
    "A > 0, above the clip": (2.0, 1.25, 2.4, 0.0, 2.4, 0.0),
    "A > 0, far above": (2.0, 5.0, 2.4, 0.0, 2.4, 0.0),
    "A < 0, below the clip": (-2.0, 0.5, -1.6, 0.0, -1.6, 0.0),
    "A < 0, inside": (-2.0, 0.9, -1.8, -1.8, -1.8, -1.8),
    "A < 0, between clip and early clip": (-2.0, 1.25, -2.5, -2.5, -2.5, -2.5),
    "A < 0, early clip binds": (-2.0, 5.0, -2.6, -2.6, -10.0, -10.0),
    "A < 0, far above": (-2.0, 1000.0, -2.6, -2.6, -2000.0, -2000.0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("level", [1, 3])
def test_every_row_of_the_case_table(case, level):
    """One item; its log-ratio may come from one code or from three."""
    advantage, ratio, *expected = CASES[case]
    old = jnp.full((1, 1, level), -2.0)
    logp = old + np.log(ratio) / level
    for cfg, value, gradient in ((ECPO, *expected[:2]), (GRPO, *expected[2:])):

        def loss(logp, cfg=cfg):
            return policy_loss(logp, old, jnp.full((1, 1), advantage), jnp.ones((1, 1), bool), cfg)

        (found, _), slope = jax.value_and_grad(loss, has_aux=True)(logp)
        np.testing.assert_allclose(found, -value, rtol=2e-5)
        # The item's log-probability is the sum of its codes': all get its gradient.
        np.testing.assert_allclose(slope, np.full((1, 1, level), -gradient), rtol=2e-5, atol=1e-7)


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    old = -np.abs(rng.standard_normal((B, G, S))).astype(np.float32)
    logp = old + rng.normal(0, 0.4, (B, G, S)).astype(np.float32)
    advantage = rng.standard_normal((B, G)).astype(np.float32)
    return logp, old, advantage, rng.random((B, G)) < 0.7


def loops(logp, old, advantage, valid, cfg, anchor=None):
    """The loss in float64; `anchor` is what the stop-gradient holds."""
    anchor, terms = (logp if anchor is None else anchor), []
    for b, g in np.argwhere(valid):
        groups = [range(S)] if cfg.ratio == "item" else [[s] for s in range(S)]
        values = []
        for codes in groups:
            pi, here, before = (np.exp(sum(x[b, g, s] for s in codes)) for x in (logp, anchor, old))
            if cfg.algorithm == "ecpo":
                before = max(here / (1 + cfg.epsilon + cfg.delta), before)
            ratio, a = pi / before, advantage[b, g]
            values.append(min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
        terms.append(np.mean(values))
    return -np.mean(terms)


@pytest.mark.parametrize("ratio", ["item", "token"])
@pytest.mark.parametrize("algorithm", ["ecpo", "grpo"])
def test_value_and_gradient_against_loops(algorithm, ratio):
    cfg = PolicyConfig(algorithm=algorithm, ratio=ratio)
    arrays = inputs()
    (value, stats), slope = jax.jit(
        jax.value_and_grad(lambda x: policy_loss(x, *arrays[1:], cfg), has_aux=True)
    )(arrays[0])
    wide = [x.astype(float) if x.dtype != bool else x for x in arrays]
    np.testing.assert_allclose(value, loops(*wide, cfg), rtol=1e-5)
    numeric, step = np.zeros(slope.shape), 1e-6
    for place in np.ndindex(slope.shape):
        moved = np.zeros(slope.shape)
        moved[place] = step
        up, down = (loops(wide[0] + d, *wide[1:], cfg, wide[0]) for d in (moved, -moved))
        numeric[place] = (up - down) / (2 * step)
    np.testing.assert_allclose(slope, numeric, rtol=1e-4, atol=1e-6)
    assert np.abs(numeric).max() > 0.01
    assert float(stats["valid"]) == pytest.approx(arrays[3].mean())


def test_on_policy_is_the_policy_gradient():
    """Ratio 1: the gradient is that of A log pi, whatever the algorithm; nothing is clipped."""
    _, old, advantage, valid = inputs()
    for cfg in (ECPO, GRPO, PolicyConfig(ratio="token")):
        loss, stats = policy_loss(old, old, advantage, valid, cfg)
        slope = jax.grad(lambda x, cfg=cfg: policy_loss(x, old, advantage, valid, cfg)[0])(old)
        np.testing.assert_allclose(loss, -advantage[valid].mean(), rtol=1e-5)
        share = 1 / S if cfg.ratio == "token" else 1
        expected = np.where(valid, -share * advantage / valid.sum(), 0)[..., None]
        np.testing.assert_allclose(slope, np.broadcast_to(expected, slope.shape), rtol=1e-5)
        np.testing.assert_allclose(stats["ratio_quantiles"], 1, rtol=1e-6)
        assert stats["clipped_high"] == stats["clipped_low"] == stats["early_clipped"] == 0


def test_what_does_not_count_may_hold_anything():
    logp, old, advantage, valid = inputs()
    value, slope = jax.value_and_grad(lambda x: policy_loss(x, old, advantage, valid, ECPO)[0])(
        logp
    )
    bad = np.where(valid[..., None], logp, -np.inf)
    worse = [np.where(valid[..., None], old, np.nan), np.where(valid, advantage, np.nan)]
    again, other = jax.value_and_grad(lambda x: policy_loss(x, *worse, valid, ECPO)[0])(bad)
    np.testing.assert_array_equal(value, again)
    np.testing.assert_array_equal(slope, other)
    nothing, _ = policy_loss(logp, old, advantage, np.zeros_like(valid), ECPO)
    assert nothing == 0


def test_statistics_by_hand():
    ratio = np.array([[1.25, 0.5, 1.4, 1.0, 3.0, 9.0]])
    advantage = np.array([[1.0, -1.0, -1.0, 1.0, -1.0, -1.0]])
    valid = np.array([[True, True, True, True, True, False]])
    entropy = np.stack([ratio, 2 * ratio], -1)
    _, stats = policy_loss(
        jnp.log(ratio)[..., None], jnp.zeros((1, 6, 1)), advantage, valid, ECPO, entropy
    )
    assert float(stats["clipped_high"]) == pytest.approx(1 / 5)
    assert float(stats["clipped_low"]) == pytest.approx(1 / 5)
    assert float(stats["early_clipped"]) == pytest.approx(2 / 5)
    np.testing.assert_allclose(
        stats["ratio_quantiles"], np.quantile(ratio[valid], [0.01, 0.5, 0.99, 1]), rtol=1e-5
    )
    np.testing.assert_allclose(stats["entropy"], [ratio[valid].mean(), 2 * ratio[valid].mean()])


def test_log_probs_and_entropy_by_hand():
    """Halves and quarters: an entropy of 1.5 bits. A forbidden code costs neither."""
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25, 0.0], [8.0, 8.0, 0.0, 0.0]]))
    logp, entropy = log_probs(logits, jnp.array([1, 0]))
    np.testing.assert_allclose(logp, np.log([0.25, 0.5]), rtol=1e-6)
    np.testing.assert_allclose(entropy, np.log(2) * np.array([1.5, 1.0]), rtol=1e-6)
    slope = jax.grad(lambda x: log_probs(x, jnp.array([1, 0]))[0].sum())(logits)
    chex.assert_tree_all_finite(slope)
    chex.assert_type(log_probs(logits.astype(jnp.bfloat16), jnp.array([1, 0])), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_log_probs_are_those_of_log_softmax_and_so_are_their_gradients(dtype):
    """Of both results, with forbidden codes among them."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 3, (B, G, 7)).astype(np.float32)
    logits[0, :, 2] = -np.inf
    logits = jnp.asarray(logits, dtype)
    target = rng.choice([0, 1, 3, 4, 5, 6], (B, G))
    weight = rng.standard_normal((2, B, G)).astype(np.float32)

    def plain(logits):
        logp = jax.nn.log_softmax(logits.astype(jnp.float32))
        finite = jnp.where(jnp.isfinite(logp), logp, 0)
        entropy = -(jnp.exp(logp) * finite).sum(-1)
        return jnp.take_along_axis(logp, target[..., None], axis=-1)[..., 0], entropy

    def loss(logits, function):
        found = function(logits)
        return (weight * jnp.stack(found)).sum(), found

    both = jax.value_and_grad(loss, has_aux=True)
    (_, found), slope = both(logits, lambda x: log_probs(x, target))
    (_, expected), expected_slope = both(logits, plain)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-6)
    chex.assert_type(slope, dtype)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    slopes = (jnp.asarray(x, jnp.float32) for x in (slope, expected_slope))
    np.testing.assert_allclose(*slopes, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize(
    "values", [{"epsilon": 1.0}, {"epsilon": -0.1}, {"delta": 0.0}, {"delta": float("nan")}]
)
def test_bounds(values):
    with pytest.raises(InputError, match=f"--policy.{next(iter(values))}"):
        PolicyConfig(**values)


def test_losses_of_parts_add_up():
    logp, old, advantage, valid = inputs()
    whole, _ = policy_loss(logp, old, advantage, valid, ECPO)
    parts = [
        policy_loss(*(x[b : b + 1] for x in (logp, old, advantage, valid)), ECPO, count=valid.sum())
        for b in range(B)
    ]
    np.testing.assert_allclose(sum(loss for loss, _ in parts), whole, rtol=1e-6)
