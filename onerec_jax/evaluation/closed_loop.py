"""What a policy is worth in a closed loop with a simulated platform.

A policy goes on from a log for so many days of each user: what it shows is watched or not, and what
was watched is the history of its next request. Feedback is drawn with noise that belongs to (user,
item, time), so that policies differ by what they show, and users can be paired.

Axes: U users, n exposures.
"""

import functools
from collections.abc import Mapping

import numpy as np

from onerec_jax.data.schema import Dataset
from onerec_jax.data.world.constants import DAY_S
from onerec_jax.data.world.loop import Log, Loop, Policy
from onerec_jax.data.world.response import World, satisfaction
from onerec_jax.evaluation.ranking import paired_difference

METRICS = {
    "watch_s": "watch time, s",
    "views": "exposures",
    "long_view": "long views",
    "like": "likes",
    "follow": "follows",
    "comment": "comments",
    "forward": "forwards",
    "hate": "dislikes",
    "flagged": "share of flagged",
    "return": "P(return in 7 days)",
}
"""Sums over a user's exposures; the last two are means over exposures and over sessions."""


def play(
    policy: Policy, world: World, dataset: Dataset, *, days: float, room: int, flagged: np.ndarray
) -> dict[str, np.ndarray]:
    """Lets a policy go on from a world's log, and measures what comes of it.

    Args:
      dataset: the log of `world`.
      days: of each user, from the first request after the log's end on.
      room: most exposures of a user.
      flagged: float `[I]`, 1 for an item that is flagged.

    Returns:
      METRICS, float64 `[U]`.
    """
    log = Log.from_dataset(dataset, room)
    before = log.length.copy()
    horizon = np.zeros(len(before))

    def within_days(users, log, request):
        late = users[request.time_s >= horizon[users]]
        log.room[late] = log.length[late] + 1  # one exposure more, which is not counted
        return policy(users, log, request)

    loop = Loop(world, within_days, log=log)
    horizon[:] = loop.clock_s + days * DAY_S
    loop.run()
    return measure(exposures_within(log, before, horizon), world, flagged)


def exposures_within(log: Log, before: np.ndarray, horizon: np.ndarray) -> dict[str, np.ndarray]:
    """`user` and all columns of a log, `[n]`, from a place of each user on to a time of each.

    Args:
      before: int `[U]`, exposures to leave out.
      horizon: float `[U]`, Unix time.
    """
    table = log.table()
    user = table["user"]
    place = np.arange(len(user)) - (np.cumsum(log.length) - log.length)[user]
    counted = (place >= before[user]) & (table["time_s"] < horizon[user])
    return {name: values[counted] for name, values in table.items()}


def measure(
    table: Mapping[str, np.ndarray], world: World, flagged: np.ndarray
) -> dict[str, np.ndarray]:
    """METRICS of exposures, float64 `[U]`; NaN where a mean is over nothing.

    Args:
      table: `user` and all columns of a log, `[n]`, sorted by user and time.
      flagged: float `[I]`.
    """
    total = functools.partial(np.bincount, table["user"], minlength=world.config.users)
    found = {"watch_s": total(table["playtime_s"]), "views": total().astype(float)}
    for name in ("long_view", "like", "follow", "comment", "forward", "hate"):
        found[name] = total(table[name])
    with np.errstate(invalid="ignore"):  # a user without an exposure has neither
        found["flagged"] = total(flagged[table["item"]]) / found["views"]
    found["return"] = returns(table, world)
    return found


def returns(table: Mapping[str, np.ndarray], world: World) -> np.ndarray:
    """Mean over a user's sessions of the probability to be back within 7 days, float64 `[U]`."""
    user, users = table["user"], world.config.users
    begins = np.ones(len(user), bool)
    begins[1:] = (np.diff(user) != 0) | (np.diff(table["session"]) != 0)
    session = np.cumsum(begins) - 1
    content = np.bincount(session, satisfaction(table)) / np.bincount(session)
    p = world.return_within_7_days(user[begins], content)
    with np.errstate(invalid="ignore"):
        return np.bincount(user[begins], p, users) / np.bincount(user[begins], minlength=users)


def compare(values: Mapping[str, Mapping[str, np.ndarray]], resamples: int = 2000) -> dict:
    """Every arm against the first: mean, difference and its 95% interval over users.

    Args:
      values: arm -> METRICS, float `[U]`.
      resamples: bootstrap samples of the users.
    """
    (_, base), *_ = values.items()
    result = {}
    for name, arm in values.items():
        result[name] = {}
        for metric in METRICS:
            both = np.isfinite(arm[metric]) & np.isfinite(base[metric])
            ours, theirs = arm[metric][both], base[metric][both]
            result[name][metric] = {
                "mean": float(ours.mean()),
                "base": float(theirs.mean()),
                **paired_difference(ours, theirs, 0, resamples),
            }
    return result
