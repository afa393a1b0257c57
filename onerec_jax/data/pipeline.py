"""Examples to batches: vectorised assembly of the four pathways, and the Grain pipeline.

An example is (user, position): the target is the action at that position, the history every
strictly earlier action of the same user. Actions at equal times keep the data set's order. A whole
batch is gathered at once in NumPy, so that one thread feeds the accelerator.

Axes: B examples, T history slots.
"""

import dataclasses
import functools

import jax
import numpy as np

from onerec_jax.config import ModelConfig
from onerec_jax.data.features import ActionLog, ItemFeatures, log_bucket
from onerec_jax.data.splits import Split
from onerec_jax.errors import InputError
from onerec_jax.inputs import Batch, FeatureSpec, Pathway


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Targets to train or evaluate on."""

    user: np.ndarray  # int32 [n], user row
    position: np.ndarray  # int32 [n], position of the target within the user

    def __len__(self):
        return len(self.user)


def train_examples(split: Split) -> Examples:
    """Every training action that has at least one action before it."""
    count = np.maximum(split.train_end.astype(np.int64) - 1, 0)
    user = np.repeat(np.arange(len(count), dtype=np.int32), count)
    position = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count) + 1
    return Examples(user, position.astype(np.int32))


def target_examples(position: np.ndarray) -> Examples:
    """One example a user from `Split.valid_at` or `Split.test_at` (-1: none)."""
    user = np.flatnonzero(position >= 0).astype(np.int32)
    return Examples(user, position[user].astype(np.int32))


class BatchBuilder:
    """Gathers the history before given positions into a `Batch` of NumPy arrays."""

    def __init__(self, log: ActionLog, items: ItemFeatures, cfg: ModelConfig):
        self.log, self.items, self.cfg = log, items, cfg
        self._positive_rows = np.flatnonzero(log.positive)
        # Positive actions before each row of the log, and before its end.
        self._positives_before = np.concatenate([[0], np.cumsum(log.positive)])

    def __call__(self, user, position, request_time_s=None) -> Batch:
        """Batch of B users asked at the given positions.

        Args:
          user: int `[B]`, user rows.
          position: int `[B]`; history is positions 0 to `position - 1`. A position may be one past
            the last action: the target is then zeros and must not be read.
          request_time_s: int `[B]`, when the recommendation is asked for, from which ages count.
            None: the time of the target, or of the last action where there is no target.
        """
        log = self.log
        first, last = log.offsets[user], log.offsets[np.asarray(user) + 1]
        here = first + position
        has_target = here < last
        at = np.minimum(here, len(log.item) - 1)
        if request_time_s is None and log.time_s is not None:
            request_time_s = log.time_s[np.where(has_target, at, np.maximum(here - 1, 0))]

        def recent(rows_before, first_row, length, rows=None):
            """The latest `length` rows before, newest first, and how many there are."""
            index = rows_before[:, None] - 1 - np.arange(length)
            count = np.clip(rows_before - first_row, 0, length)
            index = np.maximum(index, 0)
            return self._pathway(index if rows is None else rows[index], count, request_time_s)

        positive_rows = self._positive_rows if len(self._positive_rows) else np.zeros(1, int)
        before, since = self._positives_before[here], self._positives_before[first]
        positive_index = np.minimum(before, len(positive_rows))
        target = np.where(has_target[:, None], self.items.sid[log.item[at]], 0)
        return Batch(
            static=log.static[user],
            short=recent(here, first, self.cfg.short_length),
            positive=recent(positive_index, since, self.cfg.positive_length, positive_rows),
            lifelong=recent(here, first, self.cfg.lifelong_length),
            target=target.astype(np.int32),
        )

    def _pathway(self, row_bt, length_b, request_time_s) -> Pathway:
        """Features of the given log rows; everything past the length is zero."""
        log, items = self.log, self.items
        valid_bt = np.arange(row_bt.shape[1]) < length_b[:, None]

        def pad(values):
            mask = valid_bt.reshape(*valid_bt.shape, *(1,) * (values.ndim - 2))
            return np.where(mask, values, 0).astype(values.dtype)

        item_bt = log.item[row_bt]
        age = None
        if log.time_s is not None:
            age = pad(log_bucket(request_time_s[:, None] - log.time_s[row_bt]))
        return Pathway(
            length=length_b.astype(np.int32),
            sid=pad(items.sid[item_bt]),
            item=pad(item_bt),
            tags=None if items.tags is None else pad(items.tags[item_bt]),
            author=None if items.author is None else pad(items.author[item_bt]),
            age=age,
            playtime=None if log.playtime is None else pad(log.playtime[row_bt]),
            duration=None if items.duration is None else pad(items.duration[item_bt]),
            label=None if log.label is None else pad(log.label[row_bt]),
        )


class ShuffledBatches:
    """Example numbers of every global batch of an endless, reshuffled stream.

    Batch k holds places k * B to (k + 1) * B - 1 of the stream; epoch e of the stream is a
    permutation drawn from (seed, e). Order therefore depends on nothing else: not on threads, not
    on the number of processes, not on where a run was resumed.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self._permutation = functools.lru_cache(maxsize=2)(self._draw)

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_examples)

    def __call__(self, batch: int) -> np.ndarray:
        """Example numbers of one batch, int64 `[batch_size]`."""
        place = batch * self.batch_size + np.arange(self.batch_size)
        epoch, within = np.divmod(place, self.num_examples)
        parts = [self._permutation(int(e))[within[epoch == e]] for e in np.unique(epoch)]
        return np.concatenate(parts)


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


def train_pipeline(builder: BatchBuilder, examples: Examples, *, batch_size: int, seed: int):
    """Endless, shuffled, resumable Grain iterator over this process's share of training batches.

    Its elements are whole batches, so that Python's cost is paid once a batch, not once an example.

    Args:
      batch_size: global batch; each process gets an equal, contiguous share.

    Raises:
      InputError: the batch is larger than the data set.
    """
    import grain

    processes, process = jax.process_count(), jax.process_index()
    check_batch_size(batch_size, examples)
    batches = ShuffledBatches(len(examples), batch_size, seed)
    share = slice(process * batch_size // processes, (process + 1) * batch_size // processes)

    def assemble(batch: int) -> Batch:
        index = batches(batch)[share]
        return builder(examples.user[index], examples.position[index])

    dataset = grain.MapDataset.range(np.iinfo(np.int32).max).map(assemble)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def padded_batches(builder: BatchBuilder, examples: Examples, batch_size: int):
    """Yields `(Batch, number of real rows)` over all examples once, in order.

    The last batch repeats its first row up to `batch_size`, so that one compiled shape serves all.
    """
    for start in range(0, len(examples), batch_size):
        index = np.arange(start, min(start + batch_size, len(examples)))
        full = np.concatenate([index, np.full(batch_size - len(index), start)])
        yield builder(examples.user[full], examples.position[full]), len(index)


def log_from_histories(histories, spec: FeatureSpec) -> ActionLog:
    """An `ActionLog` of bare item lists, as a caller without logs would give them.

    Its actions count as done just now (age 0) and as positive, for the caller names what the user
    likes; labels and play times stay unknown (no bit set, bucket 0). An empty history is a
    newcomer: all pathways stay empty.

    Args:
      histories: item rows of each user, oldest first.
      spec: feature specification of the run.
    """
    lengths = np.array([len(items) for items in histories], np.int64)
    # A last row that belongs to nobody, so that there is a row to gather even for newcomers.
    item = np.concatenate([*(np.asarray(items, np.int32) for items in histories), [0]])
    n = len(item)
    return ActionLog(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        item=item.astype(np.int32),
        positive=np.arange(n) < n - 1,
        time_s=np.zeros(n, np.int64) if spec.has_time else None,
        playtime=np.zeros(n, np.int32) if spec.has_playtime else None,
        label=np.zeros((n, len(spec.labels)), np.uint8) if spec.labels else None,
        static=np.zeros((len(histories), len(spec.static)), np.int32),
    )
