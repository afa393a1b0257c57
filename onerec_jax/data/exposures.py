"""What the preference score learns from: exposures with what became of each, and their batches.

An exposure is judged by the history strictly before it. Stretches of BLOCK exposures of one user
share one history, from which each sees only what lies before itself.

Axes: N actions, U users, I items, B blocks or users, M items judged, T history entries,
O objectives.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import numpy as np
import polars as pl

from onerec_jax.data.batches import BatchBuilder
from onerec_jax.data.examples import ShuffledBatches, bucket_sizes
from onerec_jax.data.features import ActionLog, ItemFeatures
from onerec_jax.data.schema import Dataset
from onerec_jax.data.splits import Split, count_before
from onerec_jax.errors import InputError
from onerec_jax.inputs import Pathway, RewardBatch

OBJECTIVES = {
    "ctr": "click",
    "lvtr": "long_view",
    "vtr": "playtime_s",
    "ltr": "like",
    "wtr": "follow",
    "cmtr": "comment",
}
"""Predicted rates and the columns that say what became of an exposure."""
BLOCK = 16
"""Exposures that share a history. The same for every run: the shares of two models in the exposures
are told apart by blocks."""


@dataclasses.dataclass(frozen=True)
class LabelRule:
    """Where a label is a matter of degree."""

    effective_view_s: float = 7.0
    """Seconds from which a view is effective (vtr), or the whole item where that is shorter. The
    report names the label and no threshold."""
    min_rating: float = 4.0
    """Rating from which an item counts as liked, where the data has ratings and no likes."""


def objective_labels(
    dataset: Dataset, rule: LabelRule, named: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Labels of every action by objective: int8 `[N]`, 0 or 1, -1 where unknown.

    Args:
      named: objectives that must be there; none: all that the data has.

    Raises:
      InputError: an objective that does not exist or that the data lacks; or it has none at all.
    """
    columns = set(dataset.interactions.columns)
    has = {name: column in columns for name, column in OBJECTIVES.items()}
    has["ltr"] |= "rating" in columns
    for name in named:
        if name not in OBJECTIVES:
            raise InputError(f"--objectives {name}: choose among {', '.join(OBJECTIVES)}")
        if not has[name]:
            there = ", ".join(n for n in has if has[n]) or "no objective"
            raise InputError(
                f"--objectives {name}: data set '{dataset.name}' has no column "
                f"{OBJECTIVES[name]}; it has {there}"
            )
    chosen = [name for name in OBJECTIVES if (name in named if named else has[name])]
    if not chosen:
        raise InputError(
            f"data set '{dataset.name}' says nothing of how its actions went (no "
            f"{', '.join(OBJECTIVES.values())} or rating): a preference score cannot be learned"
        )
    labels = {}
    for name in chosen:
        if name == "vtr":
            values, least = dataset.column("playtime_s"), _effective_view_s(dataset, rule)
        elif name == "ltr" and "like" not in columns:
            values, least = dataset.column("rating"), rule.min_rating
        else:
            values, least = dataset.column(OBJECTIVES[name]), 0.5
        values = np.asarray(values, np.float64)
        labels[name] = np.where(np.isnan(values), -1, values >= least).astype(np.int8)
    return labels


def _effective_view_s(dataset: Dataset, rule: LabelRule) -> np.ndarray:
    """Seconds from which each action is an effective view, float64 `[N]`."""
    duration = dataset.column("duration_s")
    if "duration_s" in dataset.items.columns:
        duration = dataset.items["duration_s"].cast(pl.Float64).to_numpy()[dataset.item_rows]
    if duration is None:
        return np.full(len(dataset.item_rows), rule.effective_view_s)
    known = duration > 0  # neither NaN nor the 0 of some sources
    return np.where(known, np.minimum(duration, rule.effective_view_s), rule.effective_view_s)


def check_labels(
    labels: dict[str, np.ndarray],
    training: np.ndarray,
    named: Sequence[str] = (),
    flag: str = "--objectives",
):
    """The objectives whose training labels differ, and those that are left out.

    Args:
      training: int `[n]`, rows of the training exposures.
      named: objectives that must not be left out.
      flag: that names them.

    Raises:
      InputError: a named objective, or every one, has the same label throughout.
    """
    kept, left_out = {}, []
    for name, label in labels.items():
        values = np.unique(label[training])
        if len(values[values >= 0]) == 2:
            kept[name] = label
        elif name in named:
            found = ", ".join(str(x) for x in values[values >= 0]) or "unknown"
            raise InputError(
                f"{flag} {name}: all its training labels are {found}, so there is nothing "
                "to learn: leave it out"
            )
        else:
            left_out.append(name)
    if not kept:
        raise InputError(
            f"all training labels are equal ({', '.join(left_out)}): a preference score needs "
            "exposures that went well and others that did not"
        )
    return kept, left_out


def has_exposures(dataset: Dataset) -> bool:
    """Whether the log holds what was shown, and not only what somebody chose to act on."""
    return bool({"click", "long_view", "playtime_s"} & set(dataset.interactions.columns))


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """Bounds of every user's training, validation and test exposures, int64 `[U]` positions."""

    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def exposure_parts(
    dataset: Dataset, split: Split, valid_fraction: float, test_fraction: float
) -> Parts:
    """The exposures in time order: the latest `test_fraction` of all, what comes before, the rest.

    Cut at two moments of the whole log, or, without times, within each user. What the policy does
    not train on (`split`) is not trained on here either.

    Raises:
      InputError: a part has no exposure.
    """
    lengths, offsets = np.diff(dataset.offsets), dataset.offsets
    time_s = dataset.column("time_s")
    if time_s is None:
        cuts = [
            (lengths * (1 - fraction)).astype(np.int64)
            for fraction in (valid_fraction + test_fraction, test_fraction)
        ]
    else:
        ordered = np.sort(time_s)
        cuts = [
            count_before(ordered[int(time_s.size * (1 - fraction))], time_s, offsets)
            for fraction in (valid_fraction + test_fraction, test_fraction)
        ]
    zero = np.zeros_like(lengths)
    parts = Parts(
        (zero, np.minimum(cuts[0], split.train_end)), (cuts[0], cuts[1]), (cuts[1], lengths)
    )
    for name, (start, end) in vars(parts).items():
        if not (end > start).any():
            raise InputError(
                f"{dataset.name}: a split by time leaves no exposure for '{name}': the log is too "
                "short, or too many of its times are equal"
            )
    return parts


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """Stretches of exposures of one user, `[n]` each."""

    user: np.ndarray  # int32, user row
    end: np.ndarray  # int32, position past the last exposure
    count: np.ndarray  # int32, exposures, 1 to BLOCK

    def __len__(self):
        return len(self.user)

    def __getitem__(self, index) -> "Blocks":
        return Blocks(self.user[index], self.end[index], self.count[index])

    def rows(self, offsets: np.ndarray) -> np.ndarray:
        """Log rows of all exposures, block by block, the newest of each first."""
        place = np.arange(BLOCK)
        rows = (offsets[self.user] + self.end)[:, None] - 1 - place
        return rows[place < self.count[:, None]]


def make_blocks(start: np.ndarray, end: np.ndarray) -> Blocks:
    """All blocks of the positions `start` to `end` - 1 of every user."""
    number = np.maximum(-(-(end - start) // BLOCK), 0)
    user = np.repeat(np.arange(len(number), dtype=np.int32), number)
    place = np.arange(len(user)) - np.repeat(np.cumsum(number) - number, number)
    first = start[user] + place * BLOCK
    last = np.minimum(first + BLOCK, end[user])
    return Blocks(user, last.astype(np.int32), (last - first).astype(np.int32))


def share_of(blocks, share: Literal["all", "reward", "judge"], judge_share: float):
    """The training blocks (or windows) of a reward model or of its judge; none is of both.

    Drawn one by one with a fixed seed, so that it depends on the data set alone.
    """
    if share == "all":
        return blocks
    of_judge = np.random.default_rng(0).random(len(blocks)) < judge_share
    return blocks[of_judge if share == "judge" else ~of_judge]


class RewardBatchBuilder:
    """Gathers blocks of exposures, or candidates for requests, into a `RewardBatch` of NumPy."""

    def __init__(self, log: ActionLog, items: ItemFeatures, cfg, known_item: np.ndarray):
        """`cfg`: RewardConfig; `known_item`: bool `[I]`, which items training has shown."""
        self.builder = BatchBuilder(log, items, cfg)
        self.log, self.items, self.cfg = log, items, cfg
        # An item without an exposure keeps the embedding that chance gave it: better have none.
        self.item_index = np.where(known_item, np.arange(1, len(known_item) + 1), 0)

    def exposures(self, blocks: Blocks, labels_no: np.ndarray, slots: int | None = None):
        """Batch of B blocks of BLOCK exposures, the newest first.

        Args:
          labels_no: int8 `[N, O]`.
          slots: history entries T, the exposures themselves included; None: as many as are needed.
        """
        slots = self.cfg.history_length + BLOCK if slots is None else slots
        place = np.arange(BLOCK)
        valid = place < blocks.count[:, None]
        row = self.log.offsets[blocks.user] + blocks.end - 1
        row_bm = np.where(valid, row[:, None] - place, row[:, None])
        time_s = None if self.log.time_s is None else self.log.time_s[row]
        static, history, seconds = self._history(blocks.user, blocks.end, time_s, slots)
        since = np.zeros(row_bm.shape, np.int32)
        if time_s is not None:
            since = (time_s[:, None] - self.log.time_s[row_bm]).astype(np.int32)
        return RewardBatch(
            static,
            history,
            seconds,
            self._target(self.log.item[row_bm]),
            hidden=np.broadcast_to(place + 1, row_bm.shape).astype(np.int32),
            since=since,
            label=np.where(valid[..., None], labels_no[row_bm], -1).astype(np.int8),
        )

    def candidates(
        self, user, position, item_bm, request_time_s=None, slots: int | None = None
    ) -> RewardBatch:
        """Batch of B requests with M candidates each, without labels.

        Args:
          user, position: int `[B]`; the history is positions 0 to `position - 1`.
          item_bm: int `[B, M]`, item rows.
          request_time_s: int `[B]`; None: the time of the action at the position, or of the last
            one where there is none.
          slots: history entries T; None: as many as are needed.
        """
        slots = self.cfg.history_length if slots is None else slots
        user, position = np.asarray(user), np.asarray(position)
        log = self.log
        if request_time_s is None and log.time_s is not None:
            here, end = log.offsets[user] + position, log.offsets[user + 1]
            at = np.where(here < end, here, np.maximum(here - 1, 0))
            request_time_s = log.time_s[np.minimum(at, len(log.time_s) - 1)]
        history = self._history(user, position, request_time_s, slots)
        zero = np.zeros(item_bm.shape, np.int32)
        label = np.full((*item_bm.shape, 0), -1, np.int8)
        return RewardBatch(*history, self._target(item_bm), hidden=zero, since=zero, label=label)

    def _history(self, user, position, request_time_s, slots):
        batch = self.builder(user, position, request_time_s, lifelong_slots=slots)
        history, seconds = batch.lifelong, None
        if self.log.time_s is not None:
            place = np.arange(slots)
            row = np.maximum((self.log.offsets[user] + position)[:, None] - 1 - place, 0)
            seconds = request_time_s[:, None] - self.log.time_s[row]
            seconds = np.where(place < history.length[:, None], seconds, 0).astype(np.int32)
        item = np.where(
            np.arange(slots) < history.length[:, None], self.item_index[history.item], 0
        )
        # Age is told by `seconds`, from which that of any exposure of the block follows.
        return batch.static, history.replace(item=item.astype(np.int32), age=None), seconds

    def _target(self, item_bm) -> Pathway:
        items = self.items
        return Pathway(
            length=np.full(len(item_bm), item_bm.shape[1], np.int32),
            sid=items.sid[item_bm],
            item=self.item_index[item_bm].astype(np.int32),
            tags=None if items.tags is None else items.tags[item_bm],
            author=None if items.author is None else items.author[item_bm],
            duration=None if items.duration is None else items.duration[item_bm],
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ExposureStream:
    """Endless, shuffled training batches; `stream(step)` iterates from that step on.

    Batch k is a function of (seed, k) alone.
    """

    builder: RewardBatchBuilder
    blocks: Blocks
    labels_no: np.ndarray
    batch_size: int
    seed: int

    def __call__(self, step: int = 0) -> Iterator[RewardBatch]:
        """Grain iterator over this process's share of batch `step` and all later ones."""
        slots = self.builder.cfg.history_length + BLOCK
        lengths = np.minimum(self.blocks.end, slots)

        def assemble(index, padded) -> RewardBatch:
            return self.builder.exposures(self.blocks[index], self.labels_no, padded)

        return shuffled_stream(
            assemble, step, self.batch_size, self.seed, lengths, bucket_sizes(slots)
        )


def shuffled_stream(assemble, step: int, batch_size: int, seed: int, lengths, sizes):
    """Grain iterator over this process's share of batch `step` and all later ones.

    Args:
      assemble: example numbers int `[B]` and slots for their histories -> batch.
      lengths, sizes: as `ShuffledBatches`.
    """
    import grain

    batches = ShuffledBatches(len(lengths), batch_size, seed, lengths, sizes)
    processes, process = jax.process_count(), jax.process_index()
    share = slice(process * batch_size // processes, (process + 1) * batch_size // processes)

    def make(batch: int) -> RewardBatch:
        index, padded = batches(batch)
        return assemble(index[share], padded)

    dataset = grain.MapDataset.range(step, np.iinfo(np.int32).max).map(make)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(options))


def padded_blocks(builder: RewardBatchBuilder, blocks: Blocks, labels_no, batch_size: int):
    """Yields `(RewardBatch, number of real blocks)` over all blocks once, in order.

    The last batch repeats its first block up to `batch_size`: one compiled shape serves all.
    """
    for start in range(0, len(blocks), batch_size):
        index = np.arange(start, min(start + batch_size, len(blocks)))
        full = np.concatenate([index, np.full(batch_size - len(index), start)])
        yield builder.exposures(blocks[full], labels_no), len(index)
