"""Which targets a run trains and tests on, and in which order: numbers only, no histories.

An example is (user, position): the first target is the action at that position, the history every
strictly earlier action of the same user. Actions at equal times keep the data set's order. Examples
may name their targets themselves, such as the list of a session that begins at the position.
"""

import dataclasses

import numpy as np

from onerec_jax.data.splits import Split
from onerec_jax.errors import InputError

FIRST_BUCKET = 64
"""Lives are padded to 0, 64, 256, 1024, … slots: few shapes to compile, little padding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Targets to train or evaluate on."""

    user: np.ndarray  # int32 [n], user row
    position: np.ndarray  # int32 [n], position of the first target within the user
    rows: np.ndarray | None = None  # int64 [n, M], rows of the log that are the targets

    def __len__(self):
        return len(self.user)

    def __getitem__(self, index) -> "Examples":
        """Those at an index, such as int `[k]`."""
        rows = None if self.rows is None else self.rows[index]
        return Examples(self.user[index], self.position[index], rows)


def train_examples(split: Split, eligible: np.ndarray | None = None) -> Examples:
    """Every training action that has at least one action before it.

    Args:
      eligible: bool `[N]`, which actions may be targets; None: all.
    """
    count = np.maximum(split.train_end.astype(np.int64) - 1, 0)
    user = np.repeat(np.arange(len(count), dtype=np.int32), count)
    position = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count) + 1
    if eligible is not None:
        chosen = eligible[split.offsets[user] + position]
        user, position = user[chosen], position[chosen]
    return Examples(user, position.astype(np.int32))


def target_examples(position: np.ndarray) -> Examples:
    """One example a user from `Split.valid_at` or `Split.test_at` (-1: none)."""
    user = np.flatnonzero(position >= 0).astype(np.int32)
    return Examples(user, position[user].astype(np.int32))


def check_batch_size(batch_size: int, examples: Examples) -> None:
    """Refuses a batch larger than the data set.

    Raises:
      InputError: with the largest batch that fits.
    """
    if batch_size > len(examples):
        raise InputError(
            f"--train.batch-size {batch_size} is larger than the {len(examples)} training "
            f"examples: lower it to {len(examples)} or less"
        )


def bucket_sizes(slots: int) -> list[int]:
    """Slots that a lifelong pathway of at most `slots` is padded to, ascending."""
    sizes = [0] if slots > FIRST_BUCKET else []
    size = FIRST_BUCKET
    while size < slots:
        sizes.append(size)
        size *= 4
    return [*sizes, slots]


class ShuffledBatches:
    """Example numbers of every global batch of an endless, reshuffled stream.

    All that a batch depends on is (seed, its number): not threads, not the number of processes or
    workers, not where a run was resumed. An epoch is a permutation of all examples less the
    remainder of a batch, other ones each time. With `lengths`, the examples of a batch have lives
    of similar length: an epoch's examples are dealt to buckets, what is left over of a bucket goes
    to the next longer one, and the batches come in random order.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int, lengths=None, sizes=(0,)):
        """`lengths`: int `[num_examples]`, each at most `sizes[-1]`; `sizes`: ascending."""
        self.batch_size, self.seed, self.sizes = batch_size, seed, sizes
        self.num_examples = num_examples
        self.bucket = None
        if lengths is not None and len(sizes) > 1:
            self.bucket = np.searchsorted(sizes, lengths).astype(np.uint8)
        self._drawn: tuple[int, tuple] | None = None  # the latest epoch

    @property
    def batches_per_epoch(self) -> int:
        return self.num_examples // self.batch_size

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Examples `[batches, batch_size]` and padded length `[batches]` of one epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.num_examples)
        if self.bucket is None:
            kept = order[: self.batches_per_epoch * self.batch_size]
            return kept.reshape(-1, self.batch_size), np.full(len(kept), self.sizes[-1])
        bucket_of = self.bucket[order]
        batches, padded, waiting = [], [], order[:0]
        for number, size in enumerate(self.sizes):
            waiting = np.concatenate([waiting, order[bucket_of == number]])
            whole = len(waiting) // self.batch_size * self.batch_size
            batches.append(waiting[:whole].reshape(-1, self.batch_size))
            padded.append(np.full(len(batches[-1]), size))
            waiting = waiting[whole:]
        turn = rng.permutation(self.batches_per_epoch)
        return np.concatenate(batches)[turn], np.concatenate(padded)[turn]

    def __call__(self, batch: int) -> tuple[np.ndarray, int]:
        """Example numbers of one batch, int64 `[batch_size]`, and slots for its lives."""
        epoch, within = divmod(batch, self.batches_per_epoch)
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self._draw(epoch)
        examples, padded = self._drawn[1]
        return examples[within], int(padded[within])
