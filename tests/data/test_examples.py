"""Which examples there are, and in which order they come."""

import collections

import helpers
import numpy as np
import pytest

from onerec_jax.data.examples import (
    Examples,
    ShuffledBatches,
    bucket_sizes,
    check_batch_size,
    target_examples,
    train_examples,
)
from onerec_jax.data.splits import make_split
from onerec_jax.errors import InputError


@pytest.mark.parametrize("kind", ["leave-one-out", "time"])
def test_examples_cover_what_the_split_says(kind):
    dataset = helpers.full_dataset(users=25, split=kind)
    split = make_split(dataset)
    examples = train_examples(split)
    expected = [
        (user, position)
        for user in range(dataset.num_users)
        for position in range(1, split.train_end[user])
    ]
    assert list(zip(examples.user, examples.position, strict=True)) == expected
    assert len(examples) == len(expected)
    eligible = np.random.default_rng(0).random(len(dataset.item_rows)) < 0.4
    chosen = train_examples(split, eligible)
    assert list(zip(chosen.user, chosen.position, strict=True)) == [
        (user, position)
        for user, position in expected
        if eligible[dataset.offsets[user] + position]
    ]
    for at in (split.valid_at, split.test_at):
        targets = target_examples(at)
        assert targets.user.tolist() == [u for u in range(dataset.num_users) if at[u] >= 0]
        assert targets.position.tolist() == [p for p in at.tolist() if p >= 0]
        for array in (targets.user, targets.position, examples.user, chosen.position):
            assert array.dtype == np.int32


def test_every_epoch_is_a_permutation_of_its_own():
    batches = ShuffledBatches(23, 5, seed=0)
    assert batches.batches_per_epoch == 4
    epochs = []
    for epoch in range(5):
        drawn = [batches(4 * epoch + i) for i in range(4)]
        epochs.append(np.concatenate([index for index, _ in drawn]).tolist())
    for epoch in epochs:
        assert len(set(epoch)) == 20
    assert len({tuple(epoch) for epoch in epochs}) == 5
    left_out = {tuple(set(range(23)) - set(epoch)) for epoch in epochs}
    assert len(left_out) > 1
    assert set(sum(epochs, [])) == set(range(23))


def test_a_batch_is_a_function_of_seed_and_number():
    first, again = ShuffledBatches(23, 5, seed=0), ShuffledBatches(23, 5, seed=0)
    later = [again(k)[0].tolist() for k in (17, 2, 9)]  # in any order
    assert later == [first(k)[0].tolist() for k in (17, 2, 9)]
    assert first(3)[0].tolist() != ShuffledBatches(23, 5, seed=1)(3)[0].tolist()


def test_bucket_sizes():
    assert bucket_sizes(2000) == [0, 64, 256, 1024, 2000]
    assert bucket_sizes(256) == [0, 64, 256]
    assert bucket_sizes(64) == [64]
    assert bucket_sizes(32) == [32]
    assert bucket_sizes(0) == [0]


def test_examples_of_a_batch_have_lives_of_similar_length():
    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(500) < 0.5, 0, rng.integers(0, 257, 500))
    sizes = bucket_sizes(256)
    batches = ShuffledBatches(500, 16, 0, lengths, sizes)
    seen, slots = [], collections.Counter()
    for k in range(batches.batches_per_epoch):
        index, padded = batches(k)
        assert len(index) == 16
        assert lengths[index].max() <= padded
        seen += index.tolist()
        slots[padded] += 1
    assert len(set(seen)) == len(seen) == 496
    # All but a remainder of each bucket is batched with its like.
    for number, size in enumerate(sizes[:-1]):
        mine = (np.searchsorted(sizes, lengths) == number).sum()
        assert abs(slots[size] - mine / 16) <= 1 + number
    assert slots[256] <= (lengths > 64).sum() / 16 + 2
    other = [batches(batches.batches_per_epoch + k)[1] for k in range(batches.batches_per_epoch)]
    assert other != sorted(other)  # short and long ones in random order


def test_batch_larger_than_the_data_set():
    examples = Examples(np.zeros(23, np.int32), np.ones(23, np.int32))
    with pytest.raises(InputError, match="--train.batch-size 24 .* 23 training examples"):
        check_batch_size(24, examples)
    check_batch_size(23, examples)
