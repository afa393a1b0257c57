"""The steps of both rewards: what they report, and the same numbers on a mesh."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from onerec_jax.data.exposures import RewardBatchBuilder, make_blocks
from onerec_jax.data.features import action_log, build_feature_spec, item_features
from onerec_jax.data.splits import make_split
from onerec_jax.inputs import PositiveRule
from onerec_jax.losses.reward import cross_entropies, reward_loss
from onerec_jax.models.reward import PScore, RewardConfig
from onerec_jax.models.session_reward import SessionReward, SessionRewardConfig
from onerec_jax.sharding import make_mesh, put_batch
from onerec_jax.training.reward_step import reward_step, session_reward_step
from onerec_jax.training.step import Trainer

CFG = RewardConfig(d_model=8, num_heads=2, history_length=6, shared_dims=(8,), tower_dims=(4,))
WEIGHTS = np.array([[1.0, 1.0], [1.0, 4.0]])


@pytest.fixture(autouse=True)
def quick_compilation():
    """Compiling is nearly all the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def made():
    """A model and a batch of eight blocks."""
    data = helpers.full_dataset(users=8)
    ids, split = helpers.random_ids(data.num_items), make_split(data)
    spec = build_feature_spec(data, split, ids, PositiveRule())
    items = item_features(data, split, ids, spec)
    known = np.ones(data.num_items, bool)
    builder = RewardBatchBuilder(action_log(data, spec), items, CFG, known)
    labels = np.stack([data.column("click"), data.column("rating") > 3], 1).astype(np.int8)
    blocks = make_blocks(np.zeros(8, int), np.diff(data.offsets))
    cfg = dataclasses.replace(CFG, dropout=0, item_dropout=0)
    model = PScore(cfg, spec, ("ctr", "ltr"), ids.codebooks, 2, train=True)
    return model, builder.exposures(blocks, labels)


def step_on(mesh, model, batch):
    trainer = Trainer(
        model, optax.sgd(0.5), mesh, batch, seed=0, step=reward_step, weight_no=WEIGHTS
    )
    state = trainer.init(0)
    before = jax.device_get(state.params)
    after, metrics = trainer.step(state, put_batch(batch, mesh))
    return before, jax.device_get(after.params), jax.device_get(metrics)


def test_metrics_and_the_same_step_on_a_mesh(made):
    model, batch = made
    before, after, metrics = step_on(make_mesh(1), model, batch)
    towers, p = model.apply({"params": before}, batch)
    loss, of_towers, of_p = reward_loss(towers, p, jnp.asarray(batch.label), WEIGHTS)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_objective"], of_towers, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_p"], of_p, rtol=1e-5)
    slope = jax.tree.map(lambda x, y: (x - y) / 0.5, before, after)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(slope), rtol=1e-3)
    start, end, other = step_on(make_mesh(2, fsdp=2), model, batch)
    jax.tree.map(np.testing.assert_array_equal, start, before)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), end, after)
    np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-5)


def test_a_step_on_sessions(made):
    """Lists of four of the sixteen items of each block, each with labels of its own."""
    of_items, batch = made
    rng = np.random.default_rng(0)
    batch = batch.replace(session_label=rng.integers(-1, 2, (8, 4, 2)).astype(np.int8))
    same = {name: getattr(CFG, name) for name in ("d_model", "num_heads", "history_length")}
    cfg = SessionRewardConfig(**same, shared_dims=(8,), tower_dims=(4,), dropout=0, item_dropout=0)
    model = SessionReward(
        cfg, of_items.spec, ("swt", "ltr"), of_items.content, 4, ("ctr", "ltr"), train=True
    )
    mesh = make_mesh(1)
    step = {"step": session_reward_step, "item_weight": 0.5}
    trainer = Trainer(model, optax.sgd(0.5), mesh, batch, seed=0, **step)
    state = trainer.init(0)
    before = jax.device_get(state.params)
    after, metrics = trainer.step(state, put_batch(batch, mesh))
    sessions, items = model.apply({"params": before}, batch)
    heads = cross_entropies(sessions, batch.session_label)
    single = cross_entropies(items, batch.label)
    np.testing.assert_allclose(metrics["loss_objective"], heads, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_item"], single, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], heads.sum() + 0.5 * single.sum(), rtol=1e-5)
    slope = jax.tree.map(lambda x, y: (x - y) / 0.5, before, jax.device_get(after.params))
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(slope), rtol=1e-3)
