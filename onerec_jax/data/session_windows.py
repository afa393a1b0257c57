"""What the session reward learns from: lists that were shown, good and bad, and what came of them.

OneRec V0 (arXiv 2502.18965), reward model R(u, S). A list is a stretch of S consecutive exposures
of one session, judged by the history strictly before it. Unlike the lists that session-wise
generation learns from, these are of all sessions: the reward has to know bad ones.

Axes: N actions, U users, n windows, S items of a window, O heads.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from onerec_jax.data.examples import bucket_sizes
from onerec_jax.data.exposures import (
    LabelRule,
    RewardBatchBuilder,
    objective_labels,
    shuffled_stream,
)
from onerec_jax.data.schema import Dataset
from onerec_jax.data.sessions import session_of_action
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.inputs import RewardBatch

HEADS = {"swt": "playtime_s", "vtr": "playtime_s", "wtr": "follow", "ltr": "like"}
"""Heads of the session reward and the columns that their labels come from."""


@dataclasses.dataclass(frozen=True)
class SessionLabelRule(LabelRule):
    """When a session counts as one that went well; the paper gives no rule."""

    watch_s: float | None = None
    """Seconds watched of the list's items from which its watch time counts as long (swt); default:
    the median of the training lists."""
    view_share: float = 0.5
    """Share of the list's items that must be effective views (vtr)."""

    def __post_init__(self):
        require_at_least(self, "labels.", view_share=0)
        if self.watch_s is not None:
            require_at_least(self, "labels.", watch_s=0)
        if not 0 < self.view_share <= 1:
            raise InputError(f"--labels.view-share {self.view_share} must be above 0, at most 1")


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Lists that were shown, by user and time."""

    user: np.ndarray  # int32 [n], user row
    position: np.ndarray  # int32 [n], position of the first item within the user
    length: int  # S

    def __len__(self):
        return len(self.user)

    def __getitem__(self, index) -> "Windows":
        return Windows(self.user[index], self.position[index], self.length)

    def rows(self, offsets: np.ndarray) -> np.ndarray:
        """Rows of the log behind the items, int64 `[n, S]`."""
        return (offsets[self.user] + self.position)[:, None] + np.arange(self.length)


def make_windows(dataset: Dataset, start: np.ndarray, end: np.ndarray, length: int) -> Windows:
    """Windows of the positions `start` to `end` - 1 of every user, int `[U]`.

    A session is cut into windows from its first exposure there on; what is left over at its end is
    in none.
    """
    user = dataset.interactions["user_row"].to_numpy()
    position = np.arange(len(user)) - dataset.offsets[user]
    rows = np.flatnonzero((position >= start[user]) & (position < end[user]))
    _, first, session = np.unique(
        session_of_action(dataset)[rows], return_index=True, return_inverse=True
    )
    place = np.arange(len(rows)) - first[session]
    count = np.bincount(session, minlength=len(first))
    begins = rows[(place % length == 0) & (place + length <= count[session])]
    return Windows(user[begins].astype(np.int32), position[begins].astype(np.int32), length)


def check_windows(dataset: Dataset, parts: dict[str, Windows]) -> None:
    """Refuses parts without a window.

    Args:
      parts: part of the log -> its windows.

    Raises:
      InputError: names the part and the longest session.
    """
    for name, windows in parts.items():
        if not len(windows):
            longest = np.bincount(session_of_action(dataset)).max()
            raise InputError(
                f"--items {windows.length}: no session of data set '{dataset.name}' shows so many "
                f"items within the part '{name}' (the longest of all shows {longest}): lower it"
            )


def window_labels(
    dataset: Dataset,
    windows: Windows,
    rule: SessionLabelRule,
    watch_s: float | None,
    named: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Labels of every window by head: int8 `[n]`, 0 or 1, -1 where unknown.

    An item of which nothing is known leaves its window unknown, unless the others settle it.

    Args:
      watch_s: seconds of the head swt, resolved.
      named: heads that must be there; none: all that the data has.

    Raises:
      InputError: as `objective_labels`; a head that does not exist.
    """
    has = _heads(dataset, named)
    rows = windows.rows(dataset.offsets)
    objectives = tuple(name for name in ("vtr", "wtr", "ltr") if name in has)
    of_items = objective_labels(dataset, rule, objectives) if objectives else {}
    least = {"vtr": np.ceil(rule.view_share * windows.length - 1e-9), "wtr": 1, "ltr": 1}
    labels = {}
    for name in has:
        if name == "swt":
            value, need, most = dataset.column("playtime_s")[rows], watch_s, np.inf
        else:
            label = of_items[name][rows].astype(float)
            value, need, most = np.where(label < 0, np.nan, label), least[name], 1.0
        sure = np.where(np.isnan(value), 0, value).sum(1, dtype=np.float64)
        perhaps = np.where(np.isnan(value), most, value).sum(1, dtype=np.float64)
        labels[name] = np.where(sure >= need, 1, np.where(perhaps < need, 0, -1)).astype(np.int8)
    return labels


def _heads(dataset: Dataset, named: Sequence[str]) -> tuple[str, ...]:
    columns = set(dataset.interactions.columns)
    columns |= {"like"} if "rating" in columns else set()  # as `objective_labels` has it
    for name in named:
        if name not in HEADS:
            raise InputError(f"--heads {name}: choose among {', '.join(HEADS)}")
        if HEADS[name] not in columns:
            raise InputError(f"--heads {name}: data set '{dataset.name}' has no {HEADS[name]}")
    has = tuple(name for name in HEADS if HEADS[name] in columns and (not named or name in named))
    if not has:
        raise InputError(
            f"data set '{dataset.name}' says nothing of how its sessions went (no playtime_s, "
            "follow, like or rating): a session reward cannot be learned"
        )
    return has


def watch_seconds(dataset: Dataset, windows: Windows, rule: SessionLabelRule) -> float | None:
    """The rule's seconds of watch time, or the median of the windows; None without play times."""
    playtime = dataset.column("playtime_s")
    if playtime is None or rule.watch_s is not None:
        return None if playtime is None else rule.watch_s
    seconds = np.nan_to_num(playtime[windows.rows(dataset.offsets)]).sum(1, dtype=np.float64)
    return float(np.median(seconds)) if len(seconds) else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Lists:
    """Windows with what became of them."""

    windows: Windows
    label_no: np.ndarray  # int8 [n, O], 0 or 1; -1: unknown
    item_label: np.ndarray  # int8 [N, objectives], of every action of the log, likewise

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index) -> "Lists":
        return Lists(self.windows[index], self.label_no[index], self.item_label)

    def batch(self, builder: RewardBatchBuilder, slots: int | None = None) -> RewardBatch:
        """Batch of B windows, one a user.

        Args:
          slots: history entries T; None: as many as are needed.
        """
        windows, rows = self.windows, self.windows.rows(builder.log.offsets)
        items = builder.log.item[rows]
        batch = builder.candidates(windows.user, windows.position, items, slots=slots)
        return batch.replace(label=self.item_label[rows], session_label=self.label_no[:, None])


@dataclasses.dataclass(frozen=True, eq=False)
class ListStream:
    """Endless, shuffled training batches; `stream(step)` iterates from that step on.

    Batch k is a function of (seed, k) alone.
    """

    builder: RewardBatchBuilder
    lists: Lists
    batch_size: int
    seed: int

    def __call__(self, step: int = 0) -> Iterator[RewardBatch]:
        """Grain iterator over this process's share of batch `step` and all later ones."""
        slots = self.builder.cfg.history_length
        lengths = np.minimum(self.lists.windows.position, slots)

        def assemble(index, padded) -> RewardBatch:
            return self.lists[index].batch(self.builder, padded)

        return shuffled_stream(
            assemble, step, self.batch_size, self.seed, lengths, bucket_sizes(slots)
        )


def padded_lists(builder: RewardBatchBuilder, lists: Lists, batch_size: int):
    """Yields `(RewardBatch, number of real lists)` over all lists once, in order.

    The last batch repeats its first list up to `batch_size`: one compiled shape serves all.
    """
    for start in range(0, len(lists), batch_size):
        index = np.arange(start, min(start + batch_size, len(lists)))
        full = np.concatenate([index, np.full(batch_size - len(index), start)])
        yield lists[full].batch(builder), len(index)
