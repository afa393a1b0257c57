"""Which actions train, validate and test: leave-one-out or by time.

A split is three numbers a user. Whatever the kind, the history of a target is every strictly
earlier position of the same user, so no later action can reach it.
"""

import dataclasses

import numpy as np

from onerec_jax.data.schema import SPLITS, Dataset
from onerec_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Training part and targets of every user.

    Attributes:
      kind: "leave-one-out" or "time".
      offsets: int64 [U + 1], of the data set.
      train_end: int32 [U]; positions 0 to train_end - 1 of the user are training (0: none).
      valid_at: int32 [U]; position of the user's validation target, -1 for none.
      test_at: int32 [U]; position of the user's test target, -1 for none.
    """

    kind: str
    offsets: np.ndarray
    train_end: np.ndarray
    valid_at: np.ndarray
    test_at: np.ndarray


def make_split(dataset: Dataset, eligible: np.ndarray | None = None) -> Split:
    """The split that the data set was prepared for (`meta["split"]`).

    Args:
      eligible: bool [N], which actions may be targets of validation and test; None: all.

    Raises:
      InputError: as `leave_one_out` and `by_time`; or an unknown kind.
    """
    kind = dataset.meta.get("split")
    if kind == "leave-one-out":
        return leave_one_out(dataset, eligible)
    if kind == "time":
        return by_time(dataset, eligible)
    raise InputError(f"{dataset.name}: split '{kind}' is unknown; use one of {', '.join(SPLITS)}")


def leave_one_out(dataset: Dataset, eligible: np.ndarray | None = None) -> Split:
    """Last action of every user for test, the one before for validation, the rest to train on.

    With `eligible`, the last two such actions; the user trains on what comes before them, and a
    user with fewer than two, or with nothing before them, has no target and trains on everything.

    Raises:
      InputError: a user has fewer than three actions.
    """
    offsets = dataset.offsets
    lengths = np.diff(offsets).astype(np.int32)
    short = np.flatnonzero(lengths < 3)
    if short.size:
        user = short[0]
        raise InputError(
            f"{dataset.name}: {short.size} of {dataset.num_users} users have fewer than three "
            f"actions (user {dataset.users['user_id'][int(user)]} has {lengths[user]}), which "
            "leave-one-out needs; give --min-user-actions 3 to drop such users"
        )
    if eligible is None:
        return Split("leave-one-out", offsets, lengths - 2, lengths - 2, lengths - 1)
    rows = np.flatnonzero(eligible)
    end = np.searchsorted(rows, offsets[1:])  # of each user's eligible rows
    count = end - np.searchsorted(rows, offsets[:-1])
    padded = np.concatenate([[0, 0], rows])  # so that a user without two finds something
    test, valid = padded[end + 1] - offsets[:-1], padded[end] - offsets[:-1]
    good = (count >= 2) & (valid >= 1)
    return Split(
        "leave-one-out",
        offsets,
        np.where(good, valid, lengths).astype(np.int32),
        np.where(good, valid, -1).astype(np.int32),
        np.where(good, test, -1).astype(np.int32),
    )


def by_time(
    dataset: Dataset,
    eligible: np.ndarray | None = None,
    *,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
) -> Split:
    """Cut the whole log at two moments: before the first is training, after the second is test.

    The moments are quantiles of all times; actions at equal times fall on the same side. A
    user's target in a window is the first action there that has an earlier action of the user.

    Args:
      dataset: with `time_s`.
      eligible: bool [N], which actions may be targets; None: all.
      valid_fraction, test_fraction: rough share of all actions in the two windows; above 0,
        together below 1.

    Raises:
      InputError: no `time_s`, or a part stays empty because too many times are equal.
      ValueError: fractions out of range.
    """
    if min(valid_fraction, test_fraction) <= 0 or valid_fraction + test_fraction >= 1:
        raise ValueError(f"fractions {valid_fraction} and {test_fraction} leave a part empty")
    time_s = dataset.column("time_s")
    if time_s is None:
        raise InputError(
            f"{dataset.name}: a split by time needs times, and the source has none; "
            "use --split leave-one-out"
        )
    ordered = np.sort(time_s)
    valid_from = ordered[int(time_s.size * (1 - valid_fraction - test_fraction))]
    test_from = ordered[int(time_s.size * (1 - test_fraction))]

    train_end = count_before(valid_from, time_s, dataset.offsets)
    valid_end = count_before(test_from, time_s, dataset.offsets)
    lengths = np.diff(dataset.offsets)
    valid_at = _first_target(train_end, valid_end, dataset.offsets, eligible)
    test_at = _first_target(valid_end, lengths, dataset.offsets, eligible)
    parts = {
        "training actions": (train_end > 0).any(),
        "validation targets": (valid_at >= 0).any(),
        "test targets": (test_at >= 0).any(),
    }
    for part, present in parts.items():
        if not present:
            raise InputError(
                f"{dataset.name}: a split by time leaves no {part} (too many actions share a "
                "time, or the log is too short); use --split leave-one-out"
            )
    return Split("time", dataset.offsets, train_end.astype(np.int32), valid_at, test_at)


def train_mask(dataset: Dataset, split: Split) -> np.ndarray:
    """bool [N]: which interactions are training."""
    ends = np.repeat(split.train_end, np.diff(dataset.offsets))
    return dataset.column("position") < ends


def item_popularity(dataset: Dataset, split: Split) -> np.ndarray:
    """int64 [I]: how often each item occurs in the training part."""
    rows = dataset.item_rows[train_mask(dataset, split)]
    return np.bincount(rows, minlength=dataset.num_items)


def count_before(moment: int, time_s: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int64 [U]: each user's actions before `moment`; a prefix, as positions follow time."""
    running = np.concatenate([[0], np.cumsum(time_s < moment)])
    return running[offsets[1:]] - running[offsets[:-1]]


def _first_target(start, end, offsets, eligible) -> np.ndarray:
    """int32 [U]: the first eligible position from `start` to `end` - 1 with a history, or -1."""
    first = np.maximum(start, 1)
    if eligible is not None:
        rows = np.append(np.flatnonzero(eligible), len(eligible))
        first = rows[np.searchsorted(rows, offsets[:-1] + first)] - offsets[:-1]
    return np.where(first < end, first, -1).astype(np.int32)
