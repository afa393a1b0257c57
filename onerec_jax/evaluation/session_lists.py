"""What several generated lists of each user are worth.

OneRec V0 (arXiv 2502.18965), Table 1: mean and maximum over the lists of a user.

Axes: U users, W lists of each, m items.
"""

import numpy as np

from onerec_jax.data.examples import Examples
from onerec_jax.data.schema import Dataset
from onerec_jax.data.world.response import World, satisfaction
from onerec_jax.evaluation.lists import expected_of_lists, mean_of_lists

EXPECTED = ("watch_s", "long_view", "like", "follow", "satisfaction")
"""What `expected_of_sessions` says of a list."""


def mean_and_max(score_uw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and maximum of each user's lists, float64 `[U]` each; NaN is no list, and stays where
    there is none."""
    known = np.isfinite(score_uw)
    best = np.where(known, score_uw, -np.inf).max(1).astype(float)
    return mean_of_lists(score_uw), np.where(known.any(1), best, np.nan)


def expected_of_sessions(
    dataset: Dataset, test: Examples, item_uwm: np.ndarray
) -> dict[str, np.ndarray]:
    """What the world that made a data set expects of every list, float64 `[U, W]`.

    Every item is asked about at the example: in its session, at its place and time.

    Args:
      test: of U users.
      item_uwm: int `[U, W, m]`; -1 is no item.

    Returns:
      EXPECTED, means over the items of a list; NaN where a list lacks an item.
    """
    users, lists, items = item_uwm.shape
    asked = Examples(np.repeat(test.user, lists), np.repeat(test.position, lists))
    found = expected_of_lists(dataset, asked, item_uwm.reshape(-1, items))
    whole = (item_uwm >= 0).all(-1)
    return {name: np.where(whole, found[name].reshape(users, lists), np.nan) for name in EXPECTED}


def expected_in_order(
    dataset: Dataset, test: Examples, item_uwm: np.ndarray
) -> dict[str, np.ndarray]:
    """What a user is expected to do with every list, shown in its order, float64 `[U, W]`.

    A list begins at the example's place in its session; every further item comes a place later, so
    that fatigue counts, and only if the user has not left before: leaving ends the session, and
    what is not reached counts 0. All at the time of the example: what a world changes by the second
    is nothing. Exact, for a world's answers to different items are independent.

    Args:
      test: of U users.
      item_uwm: int `[U, W, m]`; -1 is no item.

    Returns:
      EXPECTED, sums over a list's items; NaN where it lacks an item.

    Raises:
      InputError: no world made the data set.
    """
    world = World.from_meta(dataset.meta)
    user, place = np.nonzero((item_uwm >= 0).all(-1))
    at = (dataset.offsets[test.user] + test.position)[user]
    session, slot, time_s = (dataset.column(c)[at] for c in ("session", "slot", "time_s"))
    found = {name: np.full(item_uwm.shape[:2], np.nan) for name in EXPECTED}
    for name in EXPECTED:
        found[name][user, place] = 0
    there = np.ones(len(user))
    for step in range(item_uwm.shape[2]):
        answer = world.expected(
            test.user[user], item_uwm[user, place, step], session, slot + step, time_s
        )
        values = answer._asdict() | {"satisfaction": satisfaction(answer)}
        for name in EXPECTED:
            found[name][user, place] += there * values[name]
        there *= 1 - answer.leave
    return found
