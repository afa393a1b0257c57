"""The stream of training batches: from memory or by worker processes, always the same."""

import dataclasses
import pickle

import chex
import helpers
import jax
import numpy as np
import pytest

from onerec_jax.data.batches import BatchBuilder, padded_batches
from onerec_jax.data.compress import compress
from onerec_jax.data.examples import train_examples
from onerec_jax.data.features import (
    action_log,
    build_feature_spec,
    item_features,
    lifelong_log,
)
from onerec_jax.data.lifelong import LifelongConfig
from onerec_jax.data.mapped import MappedBatches, write_mapped
from onerec_jax.data.pipeline import PipelineConfig, TrainStream
from onerec_jax.data.splits import make_split
from onerec_jax.errors import InputError
from onerec_jax.inputs import PositiveRule

CFG = helpers.tiny_config(lifelong_length=70)


@pytest.fixture(scope="module", params=["clusters", "latest"])
def parts(request, tmp_path_factory):
    """Builder, mapped log, examples and ends of targets, with and without compressed lives."""
    folder = tmp_path_factory.mktemp(request.param)
    dataset = helpers.full_dataset(users=40)
    split, ids = make_split(dataset), helpers.random_ids(dataset.num_items)
    clustered = request.param == "clusters"
    spec = build_feature_spec(dataset, split, ids, PositiveRule(), clustered=clustered)
    lives = None
    if clustered:
        config = LifelongConfig(max_clusters=5, chunk_actions=2, growth=0)
        lives = lifelong_log(compress(dataset, ids.vectors, config, folder / "lives"), spec)
    log, items = action_log(dataset, spec), item_features(dataset, split, ids, spec)
    builder = BatchBuilder(log, items, CFG, lives)
    write_mapped(folder / "mapped", builder)
    return builder, MappedBatches(folder / "mapped", CFG), train_examples(split), split.train_end


def stream(parts, *, batch_size=8, seed=0, **config):
    builder, mapped, examples, end = parts
    return TrainStream(
        builder, examples, PipelineConfig(**config), batch_size, seed, end, mapped=mapped
    )


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def test_batches_are_those_of_the_builder(parts):
    builder, _, examples, end = parts
    made = stream(parts, targets_per_user=2)
    index, slots = made.assembler().batches(0)
    expected = builder(
        examples.user[index],
        examples.position[index],
        lifelong_slots=slots,
        targets=2,
        target_end=end[examples.user[index]],
    )
    (batch,) = take(made(), 1)
    chex.assert_trees_all_equal(batch, expected)
    chex.assert_shape(batch.target, (8, 2, 3))


@pytest.mark.parametrize("step", [0, 3, 50])
def test_resumes_at_any_step(parts, step):
    whole = take(stream(parts)(), step + 3)
    chex.assert_trees_all_equal(take(stream(parts)(step), 3), whole[step:])


def test_a_mapped_log_gives_what_memory_gives(parts):
    builder, mapped, examples, end = parts
    user, position = examples.user[::3], examples.position[::3]
    options = {"targets": 2, "target_end": end[user]}
    expected = builder(user, position, **options)
    mapped(user, position)  # opened: what is sent to a worker must still be a path
    sent = pickle.dumps(mapped)
    assert len(sent) < 2000
    chex.assert_trees_all_equal(pickle.loads(sent)(user, position, **options), expected)


def test_worker_processes_change_nothing(parts):
    """Not the order, and not a run that had another number of them before."""
    expected = take(stream(parts)(), 7)
    chex.assert_trees_all_equal(take(stream(parts, workers=2)(), 7), expected)
    chex.assert_trees_all_equal(take(stream(parts, workers=1)(4), 3), expected[4:])


def test_processes_share_a_batch(parts, monkeypatch):
    (whole,) = take(stream(parts)(), 1)
    shares = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares += take(stream(parts)(), 1)
    joined = jax.tree.map(lambda *x: np.concatenate(x), *shares)
    chex.assert_trees_all_equal(joined, whole)


def test_length_buckets_only_trim_padding(parts):
    for batch in take(stream(parts)(), 12):
        assert batch.lifelong.item.shape[1] in (0, 64, 70)
        assert batch.lifelong.length.max() <= batch.lifelong.item.shape[1]
    for batch in take(stream(parts, length_buckets=False)(), 3):
        assert batch.lifelong.item.shape[1] == 70


def test_a_batch_larger_than_the_data_set(parts):
    with pytest.raises(InputError, match="--train.batch-size 9999"):
        stream(parts, batch_size=9999)


def test_examples_that_name_their_targets(parts):
    """From memory, from workers, resumed; the history is that of the position."""
    builder, mapped, examples, end = parts
    log = builder.log
    rows = np.random.default_rng(0).integers(0, len(log.item), (len(examples), 4))
    named = dataclasses.replace(examples, rows=rows)
    whole = take(stream((builder, mapped, named, end))(), 5)
    chex.assert_trees_all_equal(
        take(stream((builder, mapped, named, end), workers=1)(2), 3), whole[2:]
    )
    plain = take(stream(parts)(), 1)[0]
    chex.assert_trees_all_equal(
        whole[0].replace(target=plain.target, target_count=plain.target_count), plain
    )
    index, _ = stream(parts).assembler().batches(0)
    np.testing.assert_array_equal(whole[0].target, builder.items.sid[log.item[rows[index]]])
    np.testing.assert_array_equal(whole[0].target_count, 4)
    padded = list(padded_batches(builder, named, 7))
    lists = np.concatenate([batch.target[:real] for batch, real in padded])
    np.testing.assert_array_equal(lists, builder.items.sid[log.item[rows]])
    with pytest.raises(InputError, match="--pipeline.targets-per-user 2: session lists"):
        stream((builder, mapped, named, end), targets_per_user=2)
