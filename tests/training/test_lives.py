"""Compressed lives all the way: from a log by clusters and batches to losses."""

import chex
import helpers
import jax
import numpy as np
import polars as pl
import pytest

from onerec_jax.data.batches import BatchBuilder
from onerec_jax.data.compress import compress
from onerec_jax.data.examples import train_examples
from onerec_jax.data.features import (
    SINGLE,
    action_log,
    build_feature_spec,
    item_features,
    lifelong_log,
)
from onerec_jax.data.lifelong import LifelongConfig
from onerec_jax.data.pipeline import PipelineConfig, TrainStream
from onerec_jax.data.schema import build_dataset
from onerec_jax.data.splits import make_split
from onerec_jax.inputs import PositiveRule
from onerec_jax.losses.ntp import ntp_loss
from onerec_jax.models.onerec import OneRec
from onerec_jax.sharding import make_mesh, put_batch
from onerec_jax.training.optimizer import OptimizerConfig, make_optimizer
from onerec_jax.training.step import Trainer


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling is nearly all the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def prepared(dataset, cfg, config, folder):
    """Specification, batch builder and split of a data set with compressed lives."""
    split, ids = make_split(dataset), helpers.random_ids(dataset.num_items)
    vectors = np.random.default_rng(1).normal(size=(dataset.num_items, 8)).astype(np.float32)
    spec = build_feature_spec(dataset, split, ids, PositiveRule(), clustered=True)
    lives = lifelong_log(compress(dataset, vectors, config, folder), spec)
    items = item_features(dataset, split, ids, spec)
    return spec, BatchBuilder(action_log(dataset, spec), items, cfg, lives), split


def losses(spec, stream, mesh, steps=20):
    cfg = stream.builder.cfg
    batches = stream()
    one = jax.tree.map(lambda x: x[:1], next(stream()))
    tx = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup_steps=2), steps)
    trainer = Trainer(OneRec(cfg, spec, train=True), tx, mesh, one, seed=0)
    state, rows = trainer.init(0), []
    for _ in range(steps):
        state, metrics = trainer.step(state, put_batch(next(batches), mesh))
        rows.append(float(metrics["loss"]))
    batches.close()
    return rows


def test_a_run_on_one_and_on_eight_devices(tmp_path):
    """20 steps, several targets a pass, compressed lives, experts on their axis."""
    cfg = helpers.tiny_config(lifelong_length=5)
    config = LifelongConfig(max_clusters=5, chunk_actions=2, growth=0)
    spec, builder, split = prepared(helpers.full_dataset(users=60), cfg, config, tmp_path / "lives")
    stream = TrainStream(
        builder, train_examples(split), PipelineConfig(targets_per_user=3), 8, 0, split.train_end
    )
    batch = next(stream())
    assert (batch.lifelong.count > SINGLE).any()
    one = losses(spec, stream, make_mesh(1, 1))
    assert one[-1] < one[0]
    np.testing.assert_allclose(losses(spec, stream, make_mesh(2, 4)), one, rtol=1e-5)


@pytest.fixture(scope="module")
def long_life():
    """One user of 100,001 actions beside short ones."""
    rng, items = np.random.default_rng(0), 4000
    lengths = [100_001, 40, 7]
    n = sum(lengths)
    frame = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(3), lengths),
            "item_id": rng.integers(items, size=n),
            "time_s": np.concatenate([np.arange(k) * 864 for k in lengths]),
            "playtime_s": pl.Series(rng.random(n) * 30, dtype=pl.Float32),
            "long_view": pl.Series(rng.integers(0, 2, n), dtype=pl.Int8),
        }
    )
    catalogue = pl.DataFrame(
        {"item_id": np.arange(items), "text": ["x"] * items, "duration_s": [20.0] * items}
    )
    people = pl.DataFrame({"user_id": np.arange(3)})
    meta = {"origin": "a test", "licence": "none"}
    return build_dataset("long", catalogue, people, frame, meta=meta, split="leave-one-out")


def test_a_life_of_hundred_thousand_actions(long_life, tmp_path):
    """From the log to a gradient that reaches the lifelong queries."""
    cfg = helpers.tiny_config(lifelong_length=2000)
    config = LifelongConfig(growth=1.0)
    spec, builder, split = prepared(long_life, cfg, config, tmp_path / "lives")
    batch = builder(np.arange(3), split.test_at)
    assert 1000 < batch.lifelong.length[0] <= 2000
    chex.assert_shape(batch.lifelong.item, (3, 2000))
    snapshot = builder.lives.find([0], split.test_at[:1])
    assert builder.lives.covered(snapshot) > 50_000  # not the latest 2000 actions
    model = OneRec(cfg, spec)
    params = model.init(jax.random.key(0), batch)

    def loss(params):
        return ntp_loss(model.apply(params, batch), batch.target).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    chex.assert_tree_all_finite(gradient)
    assert 0 < value < np.inf
    lifelong = gradient["params"]["encoder"]["qformer"]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(lifelong))
