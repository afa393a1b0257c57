"""Lists of items that sessions were good for: what session-wise generation learns (OneRec V0).

OneRec (arXiv 2502.18965), section 3.2: a session is the videos returned for one request; it is of
high quality by (i) the number of videos that the user actually watched, (ii) the total watch time,
(iii) an interaction such as a like. The paper gives 5 for (i), no threshold for (ii), and does not
say whether all or any must hold; nor which videos of a session become its list. Choices here:

- the list is the first `items` watched items of a session in order, none twice;
- a session belongs to the part of the split in which it begins, with its actions in that part;
- its history is what lies strictly before its first action there, so that nothing of the session
  itself is known when its list is asked for. A session without history gives no list.

Parts. A split by time has windows that sessions fit into: validation and test lists are those of
their windows, and no training list or history holds any of their actions. Leave-one-out holds out
one action, which is no session: there the last list of a user's training part is for test, the one
before for validation, and the rest, if there is any, for training; a user with fewer than three
trains on all. The items that leave-one-out holds out lie behind all lists of a user either way, so
that item metrics stay those of every other run. A point-wise model of the same split, though, has
trained on the actions of such held-out lists: compare lists of the two on a split by time.

Axes: N actions, S sessions, m items of a list, n lists.
"""

import dataclasses
from typing import Literal

import numpy as np

from onerec_jax.data.examples import Examples
from onerec_jax.data.exposures import LabelRule, objective_labels
from onerec_jax.data.schema import Dataset
from onerec_jax.data.sessions import GAP_S, session_of_action
from onerec_jax.data.splits import Split, train_mask
from onerec_jax.errors import InputError, require_at_least

Part = Literal["train", "valid", "test"]


@dataclasses.dataclass(frozen=True)
class SessionRule:
    """Which sessions are good enough to learn from, and which of their items make the list.

    A criterion that the log cannot tell, for lack of columns, is left out of the combination.
    """

    items: int = 5
    """Items m of a list."""
    min_watched: int = 5
    """(i) Different items that the user watched. A view counts as watched from
    `effective_view_s` on, without play times if it was clicked, without clicks always."""
    effective_view_s: float = 7.0
    """Seconds of play from which an item counts as watched, or all of it where it is shorter."""
    min_watch_s: float | None = None
    """(ii) Seconds of play of the whole session; None: the median of the sessions of the training
    part."""
    actions: tuple[str, ...] = ("like", "follow", "comment", "forward")
    """(iii) Feedback columns of which one action of the session must have one."""
    min_rating: float = 4.0
    """Rating from which an action counts for (iii) too, where the data has ratings."""
    combine: Literal["watched", "all", "any", "none"] = "watched"
    """watched: (i), and (ii) or (iii); all or any of the three; none: every session is good."""
    listed: Literal["watched", "shown"] = "watched"
    """What a list holds: the first items that were watched, or that were shown."""
    gap_s: int = GAP_S
    """Seconds without an action after which a session ends, where the log names no sessions."""

    def __post_init__(self):
        object.__setattr__(self, "actions", tuple(self.actions))  # JSON gives lists
        require_at_least(self, "sessions.", items=1, min_watched=0, effective_view_s=0, gap_s=1)
        if self.min_watch_s is not None:
            require_at_least(self, "sessions.", min_watch_s=0)


@dataclasses.dataclass(frozen=True, eq=False)
class SessionExamples(Examples):
    """Lists of sessions: `position` is that of the session's first action, `rows` int64 `[n, m]`
    are the rows of the log behind the list's items."""

    counts: dict = dataclasses.field(default_factory=dict)
    """Of the part: `sessions`; `watched`, `watch_time`, `interaction`: how many each criterion
    keeps (None: the log cannot tell); `good`: how many their combination keeps; `long_enough`: of
    these, those with m items; `lists`: of these, those with a history. And `min_watch_s`."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Sessions:
    """Sessions of one part of the log, ascending."""

    first: np.ndarray  # int64 [S], row of the session's first action
    criteria: dict  # bool [S] or None by name
    good: np.ndarray  # bool [S]
    count: np.ndarray  # int64 [S], different items that a list may hold
    start: np.ndarray  # int64 [S], where they begin in `row`
    row: np.ndarray  # int64, rows of those items, session by session, in order


def session_examples(
    dataset: Dataset, split: Split, rule: SessionRule, part: Part = "train"
) -> SessionExamples:
    """The lists of the good sessions of one part, by user and time.

    Args:
      split: of the data set, over all actions.

    Raises:
      InputError: no training session survives; names the criterion that none passes.
    """
    facts = _Facts.of(dataset, rule)
    training = train_mask(dataset, split)
    found = _sessions(dataset, facts, rule, training, training)
    if part != "train" and split.kind == "time":
        found = _sessions(dataset, facts, rule, _window(dataset, split, part), training)
    long_enough = found.good & (found.count >= rule.items)
    user = dataset.interactions["user_row"].to_numpy()[found.first]
    position = found.first - dataset.offsets[user]
    kept = long_enough & (position > 0)
    counts = {
        "sessions": len(found.first),
        **{k: None if x is None else int(x.sum()) for k, x in found.criteria.items()},
        "good": int(found.good.sum()),
        "long_enough": int(long_enough.sum()),
    }
    if part == "train" and not kept.any():
        raise InputError(_why_none(dataset, rule, found, long_enough))
    chosen = np.flatnonzero(kept)
    if split.kind != "time":
        chosen = chosen[_turn(user[chosen]) == part]
    rows = found.row[found.start[chosen, None] + np.arange(rule.items)]
    counts |= {"lists": len(chosen), "min_watch_s": facts.least_s(training)}
    return SessionExamples(
        user[chosen].astype(np.int32), position[chosen].astype(np.int32), rows, counts
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Facts:
    """What the log says of its actions, `[N]` each; None: it does not say."""

    rule: SessionRule
    session: np.ndarray  # int64
    watched: np.ndarray  # bool
    playtime: np.ndarray | None  # float64, seconds, 0 where unknown
    interaction: np.ndarray | None  # bool

    @classmethod
    def of(cls, dataset: Dataset, rule: SessionRule) -> "_Facts":
        playtime, click = dataset.column("playtime_s"), dataset.column("click")
        watched = np.ones(len(dataset.item_rows), bool)
        if playtime is not None:
            seconds = LabelRule(effective_view_s=rule.effective_view_s)
            watched = objective_labels(dataset, seconds, ["vtr"])["vtr"] == 1
            playtime = np.nan_to_num(np.asarray(playtime, np.float64))
        elif click is not None:
            watched = click > 0
        columns = [dataset.column(name) for name in rule.actions]
        clauses = [column > 0 for column in columns if column is not None]
        if (rating := dataset.column("rating")) is not None:
            clauses.append(rating >= rule.min_rating)
        interaction = np.logical_or.reduce(clauses) if clauses else None
        return cls(rule, session_of_action(dataset, rule.gap_s), watched, playtime, interaction)

    def least_s(self, training: np.ndarray) -> float | None:
        """Seconds that criterion (ii) asks for; None without play times."""
        if self.playtime is None or self.rule.min_watch_s is not None:
            return None if self.playtime is None else self.rule.min_watch_s
        seconds = np.bincount(self.session[training], self.playtime[training])
        there = np.bincount(self.session[training]) > 0
        return float(np.median(seconds[there])) if there.any() else 0.0


def _sessions(dataset, facts: _Facts, rule: SessionRule, here, training) -> _Sessions:
    """The sessions that begin among the actions `here`, bool `[N]`, and what they are worth."""
    begins = np.flatnonzero(np.diff(facts.session, prepend=-1))
    row = np.flatnonzero(here & here[begins][facts.session])
    number, first, session = np.unique(facts.session[row], return_index=True, return_inverse=True)
    sessions = len(number)

    def distinct(chosen):
        """The first row of each item of each session, of the `row`s chosen."""
        key = session[chosen] * dataset.num_items + dataset.item_rows[row[chosen]]
        return np.sort(chosen[np.unique(key, return_index=True)[1]])

    watched = distinct(np.flatnonzero(facts.watched[row]))
    listed = watched if rule.listed == "watched" else distinct(np.arange(len(row)))
    enough = np.bincount(session[watched], minlength=sessions) >= rule.min_watched
    criteria = {"watched": enough, "watch_time": None, "interaction": None}
    if facts.playtime is not None:
        seconds = np.bincount(session, facts.playtime[row], sessions)
        criteria["watch_time"] = seconds >= facts.least_s(training)
    if facts.interaction is not None:
        criteria["interaction"] = np.bincount(session, facts.interaction[row], sessions) > 0
    count = np.bincount(session[listed], minlength=sessions)
    return _Sessions(
        row[first],
        criteria,
        _combined(criteria, rule),
        count,
        np.cumsum(count) - count,
        row[listed],
    )


def _combined(criteria: dict, rule: SessionRule) -> np.ndarray:
    told = [x for x in criteria.values() if x is not None]
    if rule.combine == "all":
        return np.logical_and.reduce(told)
    if rule.combine == "any":
        return np.logical_or.reduce(told)
    if rule.combine == "none":
        return np.ones(len(told[0]), bool)
    watched, *others = told
    return watched & np.logical_or.reduce(others) if others else watched


def _window(dataset: Dataset, split: Split, part: Part) -> np.ndarray:
    """The actions of the validation or test window of a split by time, bool `[N]`."""
    length = np.diff(dataset.offsets)
    # The first action of the test window is its target: all of them are eligible.
    test = np.where(split.test_at >= 0, split.test_at, length)
    start, end = (split.train_end, test) if part == "valid" else (test, length)
    position = dataset.column("position")
    return (position >= np.repeat(start, length)) & (position < np.repeat(end, length))


def _turn(user: np.ndarray) -> np.ndarray:
    """Parts of lists under leave-one-out, by their users, ascending."""
    _, number, count = np.unique(user, return_inverse=True, return_counts=True)
    left = np.cumsum(count)[number] - 1 - np.arange(len(user))  # lists of the user that follow
    turn = np.where(left == 0, "test", np.where(left == 1, "valid", "train"))
    return np.where(count[number] >= 3, turn, "train")


def _why_none(dataset, rule: SessionRule, found: _Sessions, long_enough) -> str:
    """What to tell about a training part without a list."""
    where = f"of the {len(found.first)} training sessions of data set '{dataset.name}'"
    if long_enough.any():
        return (
            f"{where} {long_enough.sum()} are good, but none of them has an action of its user "
            "before it: lists need a history; give a longer log"
        )
    longest = found.count.max(initial=0)
    if longest < rule.items:
        word = "watched " if rule.listed == "watched" else ""
        return (
            f"--sessions.items {rule.items}: none {where} has so many different {word}items "
            f"(the most is {longest}): lower it to {max(longest, 1)} or less"
        )
    flags = {
        "watched": f"--sessions.min-watched {rule.min_watched}",
        "watch_time": f"--sessions.min-watch-s {rule.min_watch_s}",
        "interaction": f"--sessions.actions {' '.join(rule.actions)}",
    }
    kept = {flags[k]: int(x.sum()) for k, x in found.criteria.items() if x is not None}
    passed = ", ".join(f"{flag} keeps {count}" for flag, count in kept.items())
    killers = [flag for flag, count in kept.items() if not count]
    if not found.good.any() and killers:
        return f"{where} none passes {killers[0]} ({passed}): change it or give --sessions.combine"
    if not found.good.any():
        return f"{where} none passes all that is asked ({passed}): try --sessions.combine any"
    return (
        f"{where} {found.good.sum()} are good ({passed}), but none of these has "
        f"--sessions.items {rule.items} items to list: lower it"
    )
