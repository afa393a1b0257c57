"""Lists of good sessions: by hand, against a loop over sessions, and what no session survives."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from onerec_jax.data.schema import build_dataset
from onerec_jax.data.session_lists import SessionRule, session_examples
from onerec_jax.data.sessions import session_of_action
from onerec_jax.data.splits import Split, make_split, train_mask
from onerec_jax.errors import InputError

USERS, ITEMS = 40, 25
RULE = SessionRule(items=3, min_watched=3)


def random_log(split="time", seed=0):
    """Forty users with sessions of 1 to 9 actions and long gaps between them."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(USERS):
        time_s = int(rng.integers(0, 50_000))
        for session in range(rng.integers(3, 9)):
            time_s += 20_000
            for _ in range(rng.integers(1, 10)):
                time_s += 7
                item, play = int(rng.integers(ITEMS)), float(rng.integers(0, 14))
                like = int(rng.random() < 0.08)
                rows.append((user, item, 10**6 + time_s, session, play, like))
    names = ("user_id", "item_id", "time_s", "session", "playtime_s", "like")
    frame = pl.DataFrame(rows, schema=names, orient="row")
    items = pl.DataFrame({"item_id": range(ITEMS), "text": ["a"] * ITEMS})
    meta = {"origin": "a test", "licence": "none"}
    return build_dataset("toy", items, None, frame, meta=meta, split=split)


def without(dataset, *columns):
    return dataclasses.replace(dataset, interactions=dataset.interactions.drop(columns))


def by_loop(dataset, here, training, rule):
    """`(user, position, rows)` of every list, and counts of the criteria, session by session."""
    sessions, log = session_of_action(dataset, rule.gap_s), dataset.interactions.to_dicts()
    has = set(dataset.interactions.columns)
    groups = {}
    for row, session in enumerate(sessions):
        groups.setdefault(session, []).append(row)
    seconds = [
        sum(log[row]["playtime_s"] for row in rows if training[row])
        for rows in groups.values()
        if any(training[row] for row in rows) and "playtime_s" in has
    ]
    found, counts = [], np.zeros(5, int)
    for rows in groups.values():
        if not here[rows[0]]:
            continue
        rows = [row for row in rows if here[row]]
        listed, items = [], set()
        for row in rows:
            watched = "playtime_s" not in has or log[row]["playtime_s"] >= 7
            if watched and log[row]["item_id"] not in items:
                listed.append(row)
                items.add(log[row]["item_id"])
        watched = len(listed) >= rule.min_watched
        told = [watched]
        if "playtime_s" in has:
            told.append(sum(log[row]["playtime_s"] for row in rows) >= np.median(seconds))
        if "like" in has:
            told.append(any(log[row]["like"] for row in rows))
        good = {
            "watched": watched and (len(told) == 1 or any(told[1:])),
            "all": all(told),
            "any": any(told),
            "none": True,
        }[rule.combine]
        counts += np.array([1, watched, *(told + [0, 0])[1:3], good])
        position = log[rows[0]]["position"]
        if good and len(listed) >= rule.items and position > 0:
            found.append((log[rows[0]]["user_row"], position, listed[: rule.items]))
    return found, counts


def check(examples, expected):
    assert [int(x) for x in examples.user] == [user for user, _, _ in expected]
    assert [int(x) for x in examples.position] == [position for _, position, _ in expected]
    np.testing.assert_array_equal(examples.rows, [rows for _, _, rows in expected])


@pytest.mark.parametrize("combine", ["watched", "all", "any", "none"])
@pytest.mark.parametrize("dropped", [(), ("session",), ("like",), ("like", "playtime_s")])
def test_training_lists_against_a_loop(combine, dropped):
    dataset = without(random_log(), *dropped)
    split, rule = make_split(dataset), dataclasses.replace(RULE, combine=combine)
    training = train_mask(dataset, split)
    expected, counts = by_loop(dataset, training, training, rule)
    found = session_examples(dataset, split, rule)
    assert len(expected) > 10
    check(found, expected)
    names = ("sessions", "watched", "watch_time", "interaction", "good")
    columns = {"playtime_s": "watch_time", "like": "interaction"}
    unknown = {columns[name] for name in dropped if name in columns}
    for name, count in zip(names, counts, strict=True):
        assert found.counts[name] == (None if name in unknown else count), name
    assert found.counts["lists"] == len(expected)


@pytest.mark.parametrize("part", ["valid", "test"])
def test_windows_of_a_split_by_time(part):
    dataset = random_log()
    split = make_split(dataset)
    training = train_mask(dataset, split)
    position, user = dataset.column("position"), dataset.interactions["user_row"].to_numpy()
    length = np.diff(dataset.offsets)
    test = np.where(split.test_at >= 0, split.test_at, length)[user]
    here = position >= test if part == "test" else (position < test) & ~training
    rule = dataclasses.replace(RULE, combine="any")
    expected, _ = by_loop(dataset, here, training, rule)
    assert len(expected) > 3
    check(session_examples(dataset, split, rule, part), expected)


def test_no_part_holds_actions_of_another():
    """Neither as targets nor, of training, in a history."""
    for kind in ("time", "leave-one-out"):
        dataset = random_log(kind)
        split = make_split(dataset)
        rule = dataclasses.replace(RULE, combine="any")
        parts = [
            session_examples(dataset, split, rule, part) for part in ("train", "valid", "test")
        ]
        rows = [set(part.rows.reshape(-1).tolist()) for part in parts]
        assert all(rows)
        assert not rows[0] & rows[1] | rows[0] & rows[2] | rows[1] & rows[2]
        last = {}
        for user, listed in zip(parts[0].user, parts[0].rows, strict=True):
            last[user] = max(last.get(user, 0), listed.max())
        for later in parts[1:]:
            for user, listed in zip(later.user, later.rows, strict=True):
                assert listed.min() > last.get(user, -1)
        held_out = dataset.offsets[:-1] + split.test_at
        assert not rows[0] & set(held_out[split.test_at >= 0].tolist())


def test_leave_one_out_holds_out_a_users_last_two_lists():
    dataset = random_log("leave-one-out")
    split = make_split(dataset)
    rule = dataclasses.replace(RULE, combine="none")
    training = train_mask(dataset, split)
    expected, _ = by_loop(dataset, training, training, rule)
    of_user = {}
    for example in expected:
        of_user.setdefault(example[0], []).append(example)
    parts = {"train": [], "valid": [], "test": []}
    for lists in of_user.values():
        if len(lists) < 3:
            parts["train"] += lists
        else:
            parts["train"] += lists[:-2]
            parts["valid"].append(lists[-2])
            parts["test"].append(lists[-1])
    assert {len(lists) < 3 for lists in of_user.values()} == {True, False}
    for part, lists in parts.items():
        check(session_examples(dataset, split, rule, part), lists)


def one_user(**columns):
    """Two sessions of four actions, of which a third session behind them is no training."""
    n = 12
    frame = pl.DataFrame(
        {"user_id": [0] * n, "item_id": [1, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 0]}
        | {"session": np.arange(n) // 4, "time_s": np.arange(n)}
        | columns
    )
    items = pl.DataFrame({"item_id": range(10), "text": ["a"] * 10})
    meta = {"origin": "a test", "licence": "none"}
    dataset = build_dataset("toy", items, None, frame, meta=meta, split="time")
    numbers = [np.array([x], np.int32) for x in (8, 9, 10)]
    return dataset, Split("time", dataset.offsets, *numbers)


def test_a_list_by_hand():
    """Item 4 twice, item 5 skipped; a short item is watched to its end; a click where no seconds
    are known."""
    dataset, split = one_user(playtime_s=[9.0] * 4 + [8.0, 9, 1, 7] + [9.0] * 4)
    rule = SessionRule(items=2, min_watched=2, min_watch_s=25)
    found = session_examples(dataset, split, rule)
    np.testing.assert_array_equal(found.rows, [[4, 7]])
    np.testing.assert_array_equal(found.position, [4])
    assert found.counts == {
        "sessions": 2,
        "watched": 2,
        "watch_time": 2,
        "interaction": None,
        "good": 2,
        "long_enough": 2,
        "lists": 1,
        "min_watch_s": 25,
    }
    shown = session_examples(dataset, split, dataclasses.replace(rule, listed="shown", items=3))
    np.testing.assert_array_equal(shown.rows, [[4, 6, 7]])
    clicked = one_user(click=[1] * 4 + [0, 1, 1, 0] + [1] * 4)
    np.testing.assert_array_equal(session_examples(*clicked, rule).rows, [[5, 6]])
    rated = one_user(rating=[5.0] * 4 + [2.0, 3, 4, 1] + [1.0] * 4)
    np.testing.assert_array_equal(session_examples(*rated, rule).rows, [[4, 6]])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"items": 4}, r"--sessions.items 4: none .* 2 training sessions .* most is 3\): lower"),
        ({"min_watched": 4}, r"none passes --sessions.min-watched 4 \(.*min-watched 4 keeps 0"),
        ({"min_watch_s": 99, "combine": "all"}, "none passes --sessions.min-watch-s 99"),
        ({"combine": "all"}, "none passes --sessions.actions like follow"),
        ({"min_watched": 0, "items": 3, "min_watch_s": 30}, "none of them has an action of its"),
    ],
)
def test_no_session_survives(rule, message):
    """The first session watches 36 s of three items, the second 25 s; nobody likes a thing."""
    data = one_user(playtime_s=[9.0] * 4 + [8.0, 9, 1, 7] + [9.0] * 4, like=[0] * 12)
    with pytest.raises(InputError, match=message):
        session_examples(*data, SessionRule(**{"items": 2, "min_watched": 2, **rule}))


def test_rules_are_checked():
    for field in ("items", "gap_s"):
        with pytest.raises(InputError, match="--sessions"):
            SessionRule(**{field: 0})
    with pytest.raises(InputError, match="--sessions.min-watch-s -1"):
        SessionRule(min_watch_s=-1)
