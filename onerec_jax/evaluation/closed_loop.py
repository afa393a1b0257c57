"""What a policy is worth in a closed loop with a simulated platform.

A policy goes on from a log for so many days of each user: what it shows is watched or not, and what
was watched is the history of its next request. Feedback is drawn with noise that belongs to (user,
item, time), so that policies differ by what they show, and users can be paired.

Axes: U users, n exposures, S seeds.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onerec_jax.data.schema import Dataset
from onerec_jax.data.world.constants import DAY_S
from onerec_jax.data.world.loop import Log, Loop, Policy, Request
from onerec_jax.data.world.response import World, satisfaction
from onerec_jax.evaluation.paired import paired_over_seeds

METRICS = {
    "stay_s": "app stay time, s",
    "watch_s": "watch time, s",
    "views": "exposures",
    "long_view": "long views",
    "like": "likes",
    "follow": "follows",
    "comment": "comments",
    "forward": "forwards",
    "hate": "dislikes",
    "flagged": "share of flagged",
    "variety": "different topics in 5 in a row",
    "return": "P(return in 7 days)",
}
"""Sums over a user's exposures; the last three are means over exposures, over fives of exposures
and over sessions."""
IN_A_ROW = 5
"""Exposures of a session, one after the other, whose topics are counted."""


def play(
    policy: Policy,
    world: World,
    dataset: Dataset,
    *,
    days: float,
    room: int,
    flagged: np.ndarray,
    say: Callable[[float, int], None] = lambda share, exposures: None,
) -> dict[str, np.ndarray]:
    """Lets a policy go on from a world's log, and measures what comes of it.

    Args:
      dataset: the log of `world`.
      days: of each user, from the first request after the log's end on.
      room: most exposures of a user.
      flagged: float `[I]`, 1 for an item that is flagged.
      say: told at every request what share of the users' days is over, and of the exposures so far.

    Returns:
      METRICS, float64 `[U]`.
    """
    log = Log.from_dataset(dataset, room)
    before = log.length.copy()
    horizon = np.zeros(len(before))

    def within_days(users, log, request):
        late = users[request.time_s >= horizon[users]]
        log.room[late] = log.length[late] + 1  # one exposure more, which is not counted
        left = np.where(log.length < log.room, (horizon - loop.clock_s) / (days * DAY_S), 0)
        say(1 - float(np.clip(left, 0, 1).mean()), int((log.length - before).sum()))
        return policy(users, log, request)

    loop = Loop(world, within_days, log=log)
    horizon[:] = loop.clock_s + days * DAY_S
    loop.run()
    table = log.table(before)
    counted = table["time_s"] < horizon[table["user"]]
    return measure({name: x[counted] for name, x in table.items()}, world, flagged)


def measure(
    table: Mapping[str, np.ndarray], world: World, flagged: np.ndarray
) -> dict[str, np.ndarray]:
    """METRICS of exposures, float64 `[U]`; NaN where a mean is over nothing.

    Args:
      table: `user` and all columns of a log, `[n]`, sorted by user and time.
      flagged: float `[I]`.
    """
    total = functools.partial(np.bincount, table["user"], minlength=world.config.users)
    found = {"stay_s": app_stay(table, world.config.users)}
    found |= {"watch_s": total(table["playtime_s"]), "views": total().astype(float)}
    for name in ("long_view", "like", "follow", "comment", "forward", "hate"):
        found[name] = total(table[name])
    with np.errstate(invalid="ignore"):  # a user without an exposure has neither
        found["flagged"] = total(flagged[table["item"]]) / found["views"]
    found["variety"] = variety(table, world)
    found["return"] = returns(table, world)
    return found


def app_stay(table: Mapping[str, np.ndarray], num_users: int) -> np.ndarray:
    """Seconds that a user spends in the app, summed over sessions, float64 `[U]`.

    A session lasts from its first request, at which its first item starts, to the end of its last
    play. Worlds know no pause within it but the swipe: the next item starts a second after the last
    one ended, on the next whole second. So stay exceeds watch time by 1 to 2 s for every exposure
    but a session's last, and what one policy gains in it over another is watch time and swipes.
    """
    begins = session_begins(table)
    ends = np.append(begins[1:], True)[: len(begins)]
    last = table["time_s"][ends] + table["playtime_s"][ends].astype(float)
    user = table["user"][begins]
    return np.bincount(user, last - table["time_s"][begins], num_users)


def session_begins(table: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which exposures are the first of a session, bool `[n]`."""
    begins = np.ones(len(table["user"]), bool)
    begins[1:] = (np.diff(table["user"]) != 0) | (np.diff(table["session"]) != 0)
    return begins


def variety(table: Mapping[str, np.ndarray], world: World) -> np.ndarray:
    """Mean number of different topics in five exposures in a row, float64 `[U]`; NaN without any.

    A session's exposures are cut into fives from its first on; what is left over does not count.
    So arms are compared whatever the length of their slates and of the sessions that come of them.
    """
    user, session, slot = (table[name] for name in ("user", "session", "slot"))
    first = np.flatnonzero(slot % IN_A_ROW == 0)
    first = first[first + IN_A_ROW <= len(user)]
    last = first + IN_A_ROW - 1
    first = first[(user[last] == user[first]) & (session[last] == session[first])]
    shown = table["item"][first[:, None] + np.arange(IN_A_ROW)]
    topics = np.sort(np.asarray(world.latents.items.topic)[shown], axis=1)
    different = 1 + (np.diff(topics, axis=1) != 0).sum(1)
    users = world.config.users
    with np.errstate(invalid="ignore"):
        return np.bincount(user[first], different, users) / np.bincount(
            user[first], minlength=users
        )


def returns(table: Mapping[str, np.ndarray], world: World) -> np.ndarray:
    """Mean over a user's sessions of the probability to be back within 7 days, float64 `[U]`."""
    begins = session_begins(table)
    user, session, users = table["user"][begins], np.cumsum(begins) - 1, world.config.users
    content = np.bincount(session, satisfaction(table)) / np.bincount(session)
    p = world.return_within_7_days(user, content)
    with np.errstate(invalid="ignore"):
        return np.bincount(user, p, users) / np.bincount(user, minlength=users)


class Metered:
    """A policy and what it costs: time inside it, and the FLOPs that it counts itself.

    Compiling does not count: before the clock runs, the policy is asked for many users and for one.
    A policy that counts has `flops`, a dict of totals by part, and `scored`, how many items it has
    ranked.
    """

    def __init__(self, policy: Policy, users: int):
        """`users`: how many the policy's largest program takes."""
        self.policy, self.users, self.requests, self.seconds = policy, users, 0, 0.0

    def __call__(self, users: np.ndarray, log: Log, request: Request):
        """As the policy."""
        if not self.requests:
            for number in (max(self.users, len(users)), 1):
                some = (np.resize(x, number) for x in request[:3])
                self.policy(np.resize(users, number), log, Request(*some, request.day))
            self._before = self._counted()
        begin = time.perf_counter()
        slate = self.policy(users, log, request)
        self.seconds += time.perf_counter() - begin
        self.requests += len(users)
        return slate

    def _counted(self) -> dict[str, float]:
        policy = self.policy
        return {"scored": getattr(policy, "scored", 0), **getattr(policy, "flops", {})}

    @property
    def cost(self) -> dict:
        """Of a request, on average: `seconds`, `scored` items, and `flops` by part.

        `flops` is None for a policy that does not count.
        """
        per = {k: (v - self._before.get(k, 0)) / self.requests for k, v in self._counted().items()}
        scored = per.pop("scored")
        return {
            "requests": self.requests,
            "seconds": self.seconds / self.requests,
            "scored": scored,
            "flops": per if hasattr(self.policy, "flops") else None,
        }


def mean_cost(costs: Sequence[Mapping]) -> dict:
    """`Metered.cost` of several seeds as one, over the requests of all."""
    requests = [cost["requests"] for cost in costs]

    def mean(values) -> float:
        return float(np.average(values, weights=requests))

    flops = [cost["flops"] for cost in costs]
    parts = () if None in flops else dict.fromkeys(k for part in flops for k in part)
    by_part = {k: mean([part.get(k, 0.0) for part in flops]) for k in parts}
    return {
        "requests": sum(requests),
        "seconds": mean([cost["seconds"] for cost in costs]),
        "scored": mean([cost["scored"] for cost in costs]),
        "flops": None if None in flops else by_part,
    }


def compare(values: Mapping[str, Mapping[str, np.ndarray]], resamples: int = 2000) -> dict:
    """Every arm against the first, paired by user and seed; see `paired_over_seeds`.

    Args:
      values: arm -> METRICS, float `[S, U]`, or `[U]`; an arm of one seed stands beside every seed
        of the others.
      resamples: bootstrap samples of users and seeds.

    Returns:
      arm -> metric -> `mean`, `base` (the first arm's mean over the same users), `difference`,
      `ci95`, `by_seed`, `agrees`.
    """
    (_, base), *_ = values.items()
    result = {}
    for name, arm in values.items():
        result[name] = {}
        for metric in METRICS:
            ours, theirs = np.broadcast_arrays(*map(np.atleast_2d, (arm[metric], base[metric])))
            neither = ~np.isfinite(ours - theirs)
            ours, theirs = (np.where(neither, np.nan, x) for x in (ours, theirs))
            found = paired_over_seeds(ours, theirs, resamples=resamples)
            result[name][metric] = {"mean": found.pop("a"), "base": found.pop("b"), **found}
    return result
