"""Examples to batches: vectorised assembly of the four pathways in NumPy.

A whole batch is gathered at once, so that one thread feeds the accelerator.

Axes: B examples, M targets, T history slots.
"""

import numpy as np

from onerec_jax.config import ModelConfig
from onerec_jax.data.examples import Examples
from onerec_jax.data.features import SINGLE, ActionLog, ItemFeatures, LifelongLog, log_bucket
from onerec_jax.inputs import Batch, FeatureSpec, Pathway


class BatchBuilder:
    """Gathers the history before given positions into a `Batch` of NumPy arrays.

    The lifelong pathway holds the clusters of the last snapshot closed before the position, or,
    without `lives`, the latest actions as they are.
    """

    def __init__(
        self,
        log: ActionLog,
        items: ItemFeatures,
        cfg: ModelConfig,
        lives: LifelongLog | None = None,
    ):
        self.log, self.items, self.cfg, self.lives = log, items, cfg, lives

    def over(self, log: ActionLog) -> "BatchBuilder":
        """The same over another log of the same users."""
        return BatchBuilder(log, self.items, self.cfg, self.lives)

    def __call__(
        self,
        user,
        position,
        request_time_s=None,
        *,
        lifelong_slots: int | None = None,
        targets: int = 1,
        target_end=None,
        positive_targets: bool = False,
        rows=None,
    ) -> Batch:
        """Batch of B users asked at the given positions.

        Args:
          user: int `[B]`, user rows.
          position: int `[B]`; history is positions 0 to `position - 1`. A position may be one past
            the last action: the target is then zeros and must not be read.
          request_time_s: int `[B]`, when the recommendation is asked for, from which ages count.
            None: the time of the target, or of the last action where there is no target.
          lifelong_slots: T of the lifelong pathway, at least what any user needs; None: as the
            model has it.
          targets: M. Those after the first are the user's next actions and share its history.
          target_end: int `[B]`, position before which targets lie; None: the end of the log.
          positive_targets: further targets are positive actions only.
          rows: int `[B, M]`, rows of the log that are the targets; the last three arguments are not
            read then.
        """
        log, cfg = self.log, self.cfg
        first, last = log.offsets[user], log.offsets[np.asarray(user) + 1]
        here = first + position
        has_target = here < last
        at = np.minimum(here, len(log.item) - 1)
        if request_time_s is None and log.time_s is not None:
            request_time_s = log.time_s[np.where(has_target, at, np.maximum(here - 1, 0))]

        known = log.positive_rows
        positive_rows = known if len(known) else np.zeros(1, int)
        before, since = np.searchsorted(known, here), np.searchsorted(known, first)

        def recent(rows_before, first_row, slots, rows=None):
            """The latest `slots` rows before, newest first, and how many there are."""
            index = np.maximum(rows_before[:, None] - 1 - np.arange(slots), 0)
            count = np.clip(rows_before - first_row, 0, slots)
            return self._pathway(index if rows is None else rows[index], count, request_time_s)

        target, count = at[:, None], np.ones(len(at), np.int64)
        if rows is not None:
            target, count = rows, np.full(len(at), rows.shape[1])
        elif targets > 1:
            end = last if target_end is None else first + target_end
            ahead = np.arange(1, targets)
            if positive_targets:
                later = np.searchsorted(known, np.minimum(at + 1, last))[:, None] + ahead - 1
                further = positive_rows[np.minimum(later, len(positive_rows) - 1)]
                exists = (later < len(known)) & (further < end[:, None])
            else:
                further = at[:, None] + ahead
                exists = further < end[:, None]
            count = count + exists.sum(1)
            target = np.concatenate([target, further], axis=1)
            slot = np.arange(targets) % count[:, None]  # repeats fill up: experts see real tokens
            target = np.take_along_axis(target, slot, axis=1)
        sid = np.where(has_target[:, None, None], self.items.sid[log.item[target]], 0)
        return Batch(
            static=log.static[user],
            short=recent(here, first, cfg.slots("short")),
            positive=recent(before, since, cfg.slots("positive"), positive_rows),
            lifelong=self._lifelong(user, position, first, request_time_s, lifelong_slots),
            target=sid.astype(np.int32),
            target_count=count.astype(np.int32),
        )

    def lifelong_lengths(self, examples: Examples) -> np.ndarray:
        """Entries of every example's lifelong pathway, int32 `[n]`."""
        length, _ = self._life(examples.user, examples.position)
        return np.minimum(length, self.cfg.slots("lifelong")).astype(np.int32)

    def _life(self, user, position):
        """Entries of each user's life, and its first cluster: -1 if the entries are actions."""
        if self.lives is None:
            return np.asarray(position, np.int64), np.full(len(user), -1)
        snapshot = self.lives.find(user, position)
        length, cluster = np.zeros(len(snapshot), np.int64), np.full(len(snapshot), -1)
        has = np.flatnonzero(snapshot >= 0)
        start, end = self.lives.offsets[snapshot[has]], self.lives.offsets[snapshot[has] + 1]
        length[has] = np.where(end > start, end - start, self.lives.covered(snapshot[has]))
        cluster[has] = np.where(end > start, start, -1)
        return length, cluster

    def _lifelong(self, user, position, first, request_time_s, slots) -> Pathway:
        """Latest actions, or the clusters of each user's snapshot, newest first."""
        slots = self.cfg.slots("lifelong") if slots is None else slots
        length, cluster = self._life(user, position)
        count, place = np.minimum(length, slots), np.arange(slots)
        valid = place < count[:, None]
        clustered = valid & (cluster[:, None] >= 0)
        # Without clusters an entry is an action: the latest `length` before the snapshot's end.
        row = np.maximum((first + length)[:, None] - 1 - place, 0)
        if clustered.any():
            cluster = np.where(clustered, cluster[:, None] + place, 0)
            row = np.where(clustered, first[:, None] + self.lives.representative[cluster], row)
        pathway = self._pathway(row, count, request_time_s)
        if self.lives is None:
            return pathway
        pathway = pathway.replace(count=np.where(valid, SINGLE, 0).astype(np.int32))
        if not clustered.any():
            return pathway
        of_clusters = {
            name: getattr(self.lives, name) for name in ("playtime", "duration", "count")
        }
        means = {name: x[cluster] for name, x in of_clusters.items() if x is not None}
        if pathway.age is not None:
            means["age"] = log_bucket(request_time_s[:, None] - self.lives.time_s[cluster])
        return pathway.replace(
            **{
                name: np.where(clustered, mean, getattr(pathway, name)).astype(np.int32)
                for name, mean in means.items()
            }
        )

    def _pathway(self, row_bt, length_b, request_time_s) -> Pathway:
        """Features of the given log rows; everything past the length is zero."""
        log, items = self.log, self.items
        valid_bt = np.arange(row_bt.shape[1]) < length_b[:, None]

        def pad(values, dtype=np.int32):
            mask = valid_bt.reshape(*valid_bt.shape, *(1,) * (values.ndim - 2))
            return np.where(mask, values, 0).astype(dtype)

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
            label=None if log.label is None else pad(log.label[row_bt], np.uint8),
        )


def padded_batches(builder: BatchBuilder, examples: Examples, batch_size: int):
    """Yields `(Batch, number of real rows)` over all examples once, in order.

    The last batch repeats its first row up to `batch_size`, so that one compiled shape serves all.
    """
    for start in range(0, len(examples), batch_size):
        index = np.arange(start, min(start + batch_size, len(examples)))
        full = np.concatenate([index, np.full(batch_size - len(index), start)])
        some = examples[full]
        yield builder(some.user, some.position, rows=some.rows), len(index)


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
        positive_rows=np.arange(n - 1),
        time_s=np.zeros(n, np.int64) if spec.has_time else None,
        playtime=np.zeros(n, np.uint8) if spec.has_playtime else None,
        label=np.zeros((n, len(spec.labels)), np.uint8) if spec.labels else None,
        static=np.zeros((len(histories), len(spec.static)), np.int32),
    )
