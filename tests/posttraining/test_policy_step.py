"""The joint step: what each of its parts moves, and the copy that draws."""

import functools

import helpers
import jax
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.generation.rollout import policy_log_probs
from onerec_jax.losses.ecpo import PolicyConfig
from onerec_jax.models.onerec import OneRec
from onerec_jax.posttraining.step import (
    FormatConfig,
    LossWeights,
    ObjectiveConfig,
    PolicyBatch,
    init_policy_state,
    policy_step,
)
from onerec_jax.rewards.industrial import IndustrialConfig
from onerec_jax.sharding import make_mesh, put_batch
from onerec_jax.training.checkpoint import Checkpoints
from onerec_jax.training.optimizer import OptimizerConfig, make_optimizer
from onerec_jax.training.step import Trainer

SPEC = helpers.bare_spec()
CFG = helpers.tiny_config(
    num_experts=4, decoder_layers=1, lifelong_length=0, dropout=0.2, capacity_factor=0.5
)
USERS, GROUPS, GROUP = 8, 4, 6
EXAMPLE = helpers.random_batch(CFG, SPEC, 1)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_trainer(joint=True, devices=1, **changes):
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
    args = (OneRec(CFG, SPEC, train=True), make_optimizer(optimizer, 100), make_mesh(devices))
    if not joint:
        return Trainer(*args, EXAMPLE, seed=3)
    values = {
        "policy": PolicyConfig(),
        "weights": LossWeights(),
        "format": FormatConfig(k=2),
        "group": GROUP,
        "refresh_every": 2,
        "industrial": IndustrialConfig(),
    }
    cfg = ObjectiveConfig(**(values | changes))
    joint = {"step": policy_step, "init": init_policy_state, "cfg": cfg}
    return Trainer(*args, EXAMPLE, seed=3, **joint)


@pytest.fixture(scope="module")
def variables():
    """Weights to start from, on the host."""
    drawn = helpers.random_variables(OneRec(CFG, SPEC), EXAMPLE)
    return {k: drawn[k] for k in ("params", "router")}


log_probs = helpers.quick_jit(functools.partial(policy_log_probs, OneRec(CFG, SPEC)))


@pytest.fixture(scope="module")
def batch(variables):
    """Items 0 to 4 of a group are legal, item 4 twice; the first has the highest reward."""
    rng = np.random.default_rng(0)
    sft = helpers.random_batch(CFG, SPEC, USERS, seed=1)
    rl = jax.tree.map(lambda x: x[:GROUPS], sft)
    sid = rng.integers(0, SPEC.codebook_size, (GROUPS, GROUP, SPEC.levels)).astype(np.int32)
    sid[:, 5] = sid[:, 4]
    reward = np.tile(np.linspace(0.9, 0.1, GROUP, dtype=np.float32), (GROUPS, 1))
    first = np.tile(np.arange(GROUP) < 5, (GROUPS, 1))
    logp = np.asarray(log_probs(variables, rl, sid)[0])
    row = np.zeros(GROUPS, np.int32)
    return PolicyBatch(
        sft, rl, row, row, sid=sid, logp=logp, alive=np.ones_like(first), reward=reward, first=first
    )


@pytest.fixture(scope="module")
def stepped(variables, batch):
    """A trainer, the states after each of three steps, and their metrics."""
    trainer = make_trainer()
    state, states, rows = trainer.init_from(variables), [], []
    for _ in range(3):
        state, metrics = trainer.step(state, put_batch(batch, trainer.mesh))
        states.append(jax.device_get(state))
        rows.append(jax.device_get(metrics))
    return trainer, states, rows


def test_on_policy_the_ratio_is_one(stepped):
    _, _, rows = stepped
    np.testing.assert_array_equal(rows[0]["ratio_quantiles"], 1)
    for name in ("clipped_high", "clipped_low", "early_clipped"):
        assert rows[0][name] == 0
    assert rows[1]["ratio_quantiles"][-1] > 1  # the same draws of a policy one step older
    np.testing.assert_allclose(rows[0]["valid"], 5 / 6, rtol=1e-6)


def test_every_statistic_is_there_and_finite(stepped):
    _, _, rows = stepped
    wanted = {"loss", "loss_level", "loss_preference", "loss_format", "grad_norm", "entropy"}
    wanted |= {"grad_norm_policy", "ratio_quantiles", "clipped_high", "load", "max_violation"}
    assert wanted <= set(rows[0])
    assert all(np.isfinite(value).all() for value in rows[0].values())
    assert rows[0]["entropy"].shape == (SPEC.levels,)
    # By hand, at ratio 1: a mean of advantages that sum to 0, and one of ones.
    np.testing.assert_allclose(rows[0]["loss_preference"], 0, atol=1e-6)
    np.testing.assert_allclose(rows[0]["loss_format"], -1, rtol=1e-6)


def test_the_copy_that_draws_is_as_old_as_asked_for(stepped, variables):
    _, states, _ = stepped
    jax.tree.map(np.testing.assert_array_equal, states[0].sampler, variables)
    jax.tree.map(np.testing.assert_array_equal, states[1].sampler, states[1].variables)
    jax.tree.map(np.testing.assert_array_equal, states[2].sampler, states[1].variables)


def test_a_checkpoint_holds_the_copy(stepped, tmp_path):
    trainer, states, _ = stepped
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = jax.device_put(states[2], trainer.shardings)
    checkpoints.save(state, note={}, score=0.0)
    found = checkpoints.restore(trainer.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), states[2])
    checkpoints.close()


def test_groups_move_no_router_bias(stepped, variables, batch):
    """Nor what the NTP loss is: both as in a step of pretraining."""
    _, states, rows = stepped
    alone = make_trainer(joint=False)
    expected, row = alone.step(alone.init_from(variables), put_batch(batch.sft, alone.mesh))
    before, ours, theirs = (
        jax.tree.leaves(x)[0] for x in (variables["router"], states[0].router, expected.router)
    )
    np.testing.assert_array_equal(ours, theirs)
    assert (ours != before).any()
    np.testing.assert_allclose(rows[0]["loss"], row["loss"], rtol=1e-5)
    assert rows[0]["grad_norm"] != row["grad_norm"]
    assert not expected.sampler


def test_rewards_move_probabilities(variables, batch):
    """Up with the best of each group; but down once it is flagged, a fifth of what counts."""
    industrial = IndustrialConfig(target_share=0.1, factor=0.1)
    trainer = make_trainer(
        weights=LossWeights(ntp=0, format=0), refresh_every=0, industrial=industrial
    )
    change = {}
    for share in (0, 0.2):
        flagged = np.zeros((GROUPS, GROUP), bool)
        flagged[:, 0] = share > 0
        given = put_batch(batch.replace(flagged=flagged), trainer.mesh)
        state, metrics = trainer.step(trainer.init_from(variables), given)
        np.testing.assert_allclose(metrics["flagged"], share)
        state, _ = trainer.step(state, given)
        logp = log_probs(state.variables, batch.rl, batch.sid)[0]
        change[share] = (logp - batch.logp).sum(-1)[:, 0].mean()
        jax.tree.map(np.testing.assert_array_equal, state.sampler, variables)
    assert change[0.2] < 0 < change[0]


def test_the_same_groups_on_many_devices(stepped, variables, batch):
    """Of the NTP loss, capacity and so what is dropped are a device's own."""
    _, _, rows = stepped
    trainer = make_trainer(devices=4)
    _, metrics = trainer.step(trainer.init_from(variables), put_batch(batch, trainer.mesh))
    for name in ("loss_preference", "loss_format", "grad_norm_policy", "entropy"):
        np.testing.assert_allclose(metrics[name], rows[0][name], rtol=1e-3, atol=1e-5)


def test_in_parts_the_step_is_the_same(variables, batch):
    """Groups of unlike users, of whom one counts nowhere; gradients by the parameters they make."""
    unlike = batch.replace(first=batch.first & (np.arange(GROUPS) > 0)[:, None])
    found = []
    for parts, devices in ((1, 1), (2, 2)):
        # The step on groups alone: of the NTP loss, what is dropped is a device's own.
        trainer = make_trainer(devices=devices, parts=parts, weights=LossWeights(ntp=0))
        state = trainer.init_from(variables)
        for _ in range(2):
            state, metrics = trainer.step(state, put_batch(unlike, trainer.mesh))
        found.append(jax.device_get((state.params, metrics)))
    (params, metrics), (others, theirs) = found
    names = {"loss_preference", "loss_format", "grad_norm_policy", "entropy", "ratio_quantiles"}
    names |= {"clipped_high", "clipped_low", "early_clipped", "valid"}
    for name in names:
        np.testing.assert_allclose(theirs[name], metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)
    # AdamW divides by the gradient's size: where that is nothing but rounding, steps are not alike.
    moved = jax.tree.map(lambda x, y: np.abs(x - y).mean(), params, variables["params"])
    apart = jax.tree.map(lambda x, y: np.abs(x - y).mean(), params, others)
    assert all(x <= 1e-2 * y for x, y in zip(*map(jax.tree.leaves, (apart, moved)), strict=True))


def test_more_items_for_format_than_in_a_group():
    with pytest.raises(InputError, match="--format.k 7 items of groups of 6"):
        make_trainer(format=FormatConfig(k=7))
