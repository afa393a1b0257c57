"""The step of alignment on two devices: what a pair moves, the frozen copy, the NTP loss beside."""

import dataclasses
import functools

import helpers
import jax
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.losses.preference import PreferenceConfig
from onerec_jax.models.onerec import OneRec
from onerec_jax.posttraining.preference_step import (
    AlignmentConfig,
    PairBatch,
    alignment_step,
    session_log_probs,
)
from onerec_jax.posttraining.step import init_policy_state
from onerec_jax.sharding import make_mesh, put_batch
from onerec_jax.training.optimizer import OptimizerConfig, make_optimizer
from onerec_jax.training.step import Trainer

SPEC = helpers.bare_spec(levels=2)
CFG = helpers.tiny_config(
    num_experts=4,
    decoder_layers=1,
    lifelong_length=0,
    dropout=0.2,
    capacity_factor=0.5,
    session_items=2,
)
USERS, PAIRED, SESSIONS = 8, 4, 3
EXAMPLE = helpers.random_batch(CFG, SPEC, 1, targets=2)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_trainer(loss="dpo", *, weight=1.0, refresh_every=2, joint=True):
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
    args = (OneRec(CFG, SPEC, train=True), make_optimizer(optimizer, 100), make_mesh(2))
    if not joint:
        return Trainer(*args, EXAMPLE, seed=3)
    preference = PreferenceConfig(loss, rejected=SESSIONS - 1 if loss == "s-dpo" else 1)
    cfg = AlignmentConfig(preference, weight, refresh_every)
    return Trainer(*args, EXAMPLE, seed=3, step=alignment_step, init=init_policy_state, cfg=cfg)


@pytest.fixture(scope="module")
def variables():
    """Weights to start from, on the host."""
    drawn = helpers.random_variables(OneRec(CFG, SPEC), EXAMPLE)
    return {k: drawn[k] for k in ("params", "router")}


log_probs = helpers.quick_jit(functools.partial(session_log_probs, OneRec(CFG, SPEC)))


def make_batch(sessions=2, valid=(True, True, False, True)):
    rng = np.random.default_rng(0)
    sft = helpers.random_batch(CFG, SPEC, USERS, seed=1, targets=2)
    rl = jax.tree.map(lambda x: x[:PAIRED], sft)
    sid = rng.integers(0, SPEC.codebook_size, (PAIRED, sessions, 2, SPEC.levels)).astype(np.int32)
    row = np.zeros(PAIRED, np.int32)
    return PairBatch(sft, rl, row, row, sid=sid, valid=np.array(valid))


def run(trainer, variables, batch, steps):
    """States after each step, on the host, and their metrics."""
    state, states, rows = trainer.init_from(variables), [], []
    for _ in range(steps):
        state, metrics = trainer.step(state, put_batch(batch, trainer.mesh))
        states.append(jax.device_get(state))
        rows.append(jax.device_get(metrics))
    return states, rows


@pytest.fixture(scope="module")
def stepped(variables):
    trainer = make_trainer()
    return trainer, *run(trainer, variables, make_batch(), 3)


def test_sessions_do_not_see_each_other(variables):
    """Side by side or alone: the sum over all codes of a session."""
    batch, model = make_batch(), OneRec(CFG, SPEC)
    apply = helpers.quick_jit(model.apply)
    together = log_probs(variables, batch.rl, batch.sid)
    for place in range(2):
        target = batch.sid[:, place]
        logits = np.asarray(apply(variables, batch.rl.replace(target=target)), np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        alone = np.take_along_axis(logp, target[..., None], axis=-1).sum((1, 2, 3))
        np.testing.assert_allclose(together[:, place], alone, rtol=1e-5)


def test_one_iteration_raises_the_margin(stepped, variables):
    """On policy the margin is 0 and DPO's loss ln 2; a step later the chosen ones are ahead."""
    _, states, rows = stepped
    np.testing.assert_allclose(rows[0]["margin"], 0, atol=1e-6)
    np.testing.assert_allclose(rows[0]["loss_preference"], np.log(2), rtol=1e-6)
    assert rows[0]["pairs"] == 3
    assert rows[1]["margin"] > 0.05
    assert rows[1]["loss_preference"] < np.log(2)
    # The metric is what the parameters say, of valid pairs.
    batch = make_batch()
    before, after = (log_probs(x, batch.rl, batch.sid) for x in (variables, states[0].variables))
    h = np.asarray((after - before)[:, 0] - (after - before)[:, 1])
    np.testing.assert_allclose(rows[1]["margin"], h[batch.valid].mean(), rtol=1e-3)
    assert all(np.isfinite(value).all() for row in rows for value in row.values())


def test_the_next_iteration_has_a_new_reference(stepped, variables):
    """After two steps the model takes the copy's place: its margin is 0 again."""
    _, states, rows = stepped
    jax.tree.map(np.testing.assert_array_equal, states[0].sampler, variables)
    jax.tree.map(np.testing.assert_array_equal, states[1].sampler, states[1].variables)
    jax.tree.map(np.testing.assert_array_equal, states[2].sampler, states[1].variables)
    np.testing.assert_allclose(rows[2]["margin"], 0, atol=1e-6)


def test_next_token_prediction_is_as_without_pairs(stepped, variables):
    trainer, states, rows = stepped
    alone = make_trainer(joint=False)
    expected, metrics = alone.step(
        alone.init_from(variables), put_batch(make_batch().sft, alone.mesh)
    )
    np.testing.assert_allclose(rows[0]["loss"], metrics["loss"], rtol=1e-5)
    ours, theirs = (jax.tree.leaves(x)[0] for x in (states[0].router, expected.router))
    np.testing.assert_array_equal(ours, theirs)  # pairs move no balancing bias
    assert rows[0]["grad_norm"] != metrics["grad_norm"]

    nothing = make_batch(valid=(False,) * PAIRED)
    (state,), (row,) = run(trainer, variables, nothing, 1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, expected.params
    )
    assert row["pairs"] == row["loss_preference"] == 0
    assert np.isnan(row["margin"])


def test_several_rejected_and_never_a_new_reference(variables):
    batch = make_batch(SESSIONS, (True,) * PAIRED)
    trainer = make_trainer("s-dpo", weight=100, refresh_every=0)  # next to pairs alone
    states, rows = run(trainer, variables, batch, 3)
    np.testing.assert_allclose(rows[0]["loss_preference"], np.log(3), rtol=1e-5)  # one of three
    losses = [row["loss_preference"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert rows[2]["margin"] > rows[1]["margin"] > 0
    jax.tree.map(np.testing.assert_array_equal, states[2].sampler, variables)


def test_settings_that_cannot_be():
    cfg = AlignmentConfig(PreferenceConfig(), 1.0, 10)
    for name in ("weight", "refresh_every"):
        with pytest.raises(InputError, match="must be at least 0"):
            dataclasses.replace(cfg, **{name: -1})
