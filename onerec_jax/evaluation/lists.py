"""What lists of recommendations are worth, by a world's expectation or by any scores.

Axes: U users, n places of a list.
"""

from collections.abc import Mapping

import numpy as np

from onerec_jax.data.examples import Examples
from onerec_jax.data.schema import Dataset
from onerec_jax.data.world.response import World, satisfaction
from onerec_jax.evaluation.ranking import paired_difference

EXPECTED = (
    *("watch_s", "watch_ratio", "long_view", "like", "follow", "comment", "forward", "hate"),
    "satisfaction",
)
"""What `expected_of_lists` says of a list."""


def response_to_listed(
    dataset: Dataset, test: Examples, lists_un: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """What the world that made a data set expects of each of the N items that are listed.

    Args:
      test, lists_un: as `expected_of_lists`.

    Returns:
      row and place of the items in `lists_un`, int `[N]` each; EXPECTED by name, float64 `[N]`.

    Raises:
      InputError: no world made the data set.
    """
    world = World.from_meta(dataset.meta)
    user, place = np.nonzero(lists_un >= 0)
    at = dataset.offsets[test.user] + test.position
    session, slot, time_s = (dataset.column(c)[at] for c in ("session", "slot", "time_s"))
    answer = world.expected(
        test.user[user], lists_un[user, place], session[user], slot[user], time_s[user]
    )
    return user, place, answer._asdict() | {"satisfaction": satisfaction(answer)}


def expected_of_lists(
    dataset: Dataset, test: Examples, lists_un: np.ndarray
) -> dict[str, np.ndarray]:
    """What the world that made a data set expects of each user's list, float64 `[U]`.

    A user is asked at the example: in its session, at its place and time.

    Args:
      test: of U users.
      lists_un: int `[U, n]`, item rows; -1 is no item.

    Returns:
      EXPECTED, means over the list; NaN where it is empty.

    Raises:
      InputError: no world made the data set.
    """
    user, _, values = response_to_listed(dataset, test, lists_un)
    length = np.bincount(user, minlength=len(lists_un)).astype(float)
    length[length == 0] = np.nan
    return {k: np.bincount(user, values[k], len(lists_un)) / length for k in EXPECTED}


def mean_of_lists(score_un: np.ndarray) -> np.ndarray:
    """Mean of each row, float64 `[U]`; NaN is no item, a row of nothing else stays NaN."""
    known = np.isfinite(score_un)
    count = known.sum(1)
    total = np.where(known, score_un, 0).sum(1, dtype=float)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def before_and_after(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], seed: int, resamples: int
) -> dict[str, dict]:
    """Means of the same users twice, and the difference with its 95% interval over users.

    Args:
      before, after: metric -> float `[U]`; users without a finite value in either are left out.
      seed, resamples: of the bootstrap.

    Returns:
      metric -> `before`, `after`, `difference`, `ci95`.
    """
    rows = {}
    for name in before:
        both = np.isfinite(before[name]) & np.isfinite(after[name])
        old, new = before[name][both], after[name][both]
        rows[name] = {
            "before": float(old.mean()),
            "after": float(new.mean()),
            **paired_difference(new, old, seed, resamples),
        }
    return rows
