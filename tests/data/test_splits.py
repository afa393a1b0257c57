"""Splits: where the parts lie, and that nothing later reaches anything earlier."""

import numpy as np
import polars as pl
import pytest

from onerec_jax.data.schema import build_dataset
from onerec_jax.data.splits import (
    by_time,
    item_popularity,
    leave_one_out,
    make_split,
    train_mask,
)
from onerec_jax.errors import InputError


def dataset_of(users, times=None, split="leave-one-out"):
    rows = {"user_id": users, "item_id": [position % 3 for position in range(len(users))]}
    if times is not None:
        rows["time_s"] = times
    return build_dataset(
        "toy",
        pl.DataFrame({"item_id": [0, 1, 2, 3]}),
        None,
        pl.DataFrame(rows),
        meta={"origin": "", "licence": ""},
        split=split,
    )


def random_log(seed, moments=50):
    """30 users with 1 to 20 actions at times from 0 to `moments` - 1, with many ties."""
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(30), rng.integers(1, 21, 30))
    return dataset_of(users, rng.integers(0, moments, users.size), split="time")


def test_leave_one_out():
    dataset = dataset_of([1, 1, 1, 2, 2, 2, 2, 2])
    split = make_split(dataset)
    assert split.kind == "leave-one-out"
    assert split.train_end.tolist() == [1, 3]
    assert split.valid_at.tolist() == [1, 3]
    assert split.test_at.tolist() == [2, 4]
    assert train_mask(dataset, split).tolist() == [1, 0, 0, 1, 1, 1, 0, 0]
    # Items in order 0 1 2 | 0 1 2 0 1; training is 0 | 0 1 2.
    assert item_popularity(dataset, split).tolist() == [2, 1, 1, 0]
    for part in (split.train_end, split.valid_at, split.test_at):
        assert part.dtype == np.int32
    assert item_popularity(dataset, split).dtype == np.int64


def test_short_users_are_named_and_counted():
    with pytest.raises(InputError, match=r"2 of 3 users .*user 2 has 1.*--min-user-actions 3"):
        leave_one_out(dataset_of([1, 1, 1, 2, 3, 3]))


def test_time_split_by_hand():
    users = [1] * 9 + [2] + [3, 3]
    times = [0, 1, 2, 3, 4, 5, 6, 7, 9] + [8] + [2, 9]
    # All times: 0 1 2 2 | 3 4 5 6 | 7 8 9 9, so validation starts at 3 and test at 7.
    split = by_time(dataset_of(users, times), valid_fraction=1 / 3, test_fraction=1 / 3)
    assert split.train_end.tolist() == [3, 0, 1]
    assert split.valid_at.tolist() == [3, -1, -1]
    assert split.test_at.tolist() == [7, -1, 1]  # user 2's only action has no history


@pytest.mark.parametrize("seed", range(5))
def test_time_split_never_leaks(seed):
    dataset = random_log(seed)
    split = make_split(dataset)
    time_s, mask = dataset.column("time_s"), train_mask(dataset, split)
    start = dataset.offsets[:-1]
    valid = (start + split.valid_at)[split.valid_at >= 0]
    test = (start + split.test_at)[split.test_at >= 0]
    assert time_s[mask].max() < time_s[valid].min()
    assert time_s[valid].max() < time_s[test].min()
    # Every action at a time is on one side: what is not training is no earlier than the cut.
    assert time_s[~mask].min() > time_s[mask].max()
    for user, at in enumerate(split.test_at):
        if at >= 0:
            assert at >= 1
            history = time_s[start[user] : start[user] + at]
            assert history.max() <= time_s[start[user] + at]


def test_leave_one_out_never_leaks():
    dataset = dataset_of(np.repeat(np.arange(9), 3 + np.arange(9)))
    split = leave_one_out(dataset)
    assert (split.train_end <= split.valid_at).all()
    assert (split.valid_at < split.test_at).all()
    last = np.diff(dataset.offsets) - 1
    assert (split.test_at == last).all()
    positions = dataset.column("position")[train_mask(dataset, split)]
    owners = dataset.column("user_row")[train_mask(dataset, split)]
    assert (positions < split.valid_at[owners]).all()


def test_time_split_refusals():
    with pytest.raises(InputError, match="--split leave-one-out"):
        by_time(dataset_of([1, 1, 1]))
    with pytest.raises(InputError, match="leaves no training actions"):
        by_time(dataset_of([1, 1, 1], [5, 5, 5]))
    with pytest.raises(InputError, match="leaves no test targets"):
        by_time(dataset_of([1, 2, 1, 3], [0, 1, 2, 3]), valid_fraction=0.25, test_fraction=0.25)
    with pytest.raises(ValueError, match="fractions"):
        by_time(random_log(0), valid_fraction=0.5, test_fraction=0.5)


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match="--split weekly: unknown"):
        dataset_of([1, 1, 1], split="weekly")


@pytest.mark.parametrize("seed", range(3))
def test_targets_among_eligible_actions_only(seed):
    """Both kinds of split against a loop over users."""
    dataset = random_log(seed, moments=500)
    eligible = np.random.default_rng(seed).random(dataset.interactions.height) < 0.3
    time_s, offsets = dataset.column("time_s"), dataset.offsets
    split = by_time(dataset, eligible)
    whole = by_time(dataset)
    np.testing.assert_array_equal(split.train_end, whole.train_end)  # training is what it was
    starts = [time_s[dataset.offsets[:-1] + s][s >= 0].min() for s in (whole.valid_at,)]
    ordered = np.sort(time_s)
    cuts = [ordered[int(len(ordered) * share)] for share in (0.8, 0.9)]
    assert starts[0] >= cuts[0]
    for user in range(dataset.num_users):
        mine = range(offsets[user], offsets[user + 1])
        for at, low, high in ((split.valid_at, *cuts), (split.test_at, cuts[1], np.inf)):
            chosen = [
                row - offsets[user]
                for row in mine
                if eligible[row] and low <= time_s[row] < high and row > offsets[user]
            ]
            assert at[user] == (chosen[0] if chosen else -1)


def test_leave_one_out_among_eligible_actions_only():
    dataset = dataset_of(np.repeat(np.arange(5), 6))
    eligible = np.zeros((5, 6), bool)
    eligible[0, [1, 3, 4]] = True
    eligible[1, [0, 5]] = True  # nothing before the validation target
    eligible[2, 2] = True
    eligible[3] = True
    split = make_split(dataset, eligible.ravel())
    assert split.valid_at.tolist() == [3, -1, -1, 4, -1]
    assert split.test_at.tolist() == [4, -1, -1, 5, -1]
    assert split.train_end.tolist() == [3, 6, 6, 4, 6]
