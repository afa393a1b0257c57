"""What the best of N generated items is worth, as more of them are generated.

OneRec Technical Report (arXiv 2506.13695), Table 6, reports rewards at Pass@K and does not say how
the K items of a user become one number. Here are three: their mean, the best of them, and what a
reward that knows nothing of the truth would choose of them.

Axes: U users, n places of a list.
"""

from collections.abc import Sequence

import numpy as np

from onerec_jax.data.examples import Examples
from onerec_jax.data.schema import Dataset
from onerec_jax.evaluation.lists import mean_of_lists, response_to_listed

MEASURES = ("watch_s", "satisfaction")


def response_to_items(
    dataset: Dataset, test: Examples, lists_un: np.ndarray
) -> dict[str, np.ndarray]:
    """What the world that made a data set expects of each item, float64 `[U, n]`; NaN for none.

    Args:
      test: of U users; each is asked at its example.
      lists_un: int `[U, n]`, item rows; -1 is no item.

    Raises:
      InputError: no world made the data set.
    """
    user, place, values = response_to_listed(dataset, test, lists_un)
    found = {name: np.full(lists_un.shape, np.nan) for name in MEASURES}
    for name in MEASURES:
        found[name][user, place] = values[name]
    return found


def best_of(value_un: np.ndarray, n: int) -> np.ndarray:
    """The largest of the first n of each row, float64 `[U]`; NaN is no item."""
    first = np.where(np.isfinite(value_un[:, :n]), value_un[:, :n], -np.inf).max(1)
    return np.where(np.isfinite(first), first, np.nan)


def chosen_of(value_un: np.ndarray, score_un: np.ndarray, n: int) -> np.ndarray:
    """The value of that one of the first n of each row that has the highest score, `[U]`.

    Args:
      value_un, score_un: float `[U, n]`, NaN in the same places: no item.
    """
    score = np.where(np.isfinite(value_un), score_un, -np.inf)[:, :n]
    return value_un[np.arange(len(value_un)), np.argmax(score, axis=1)]


def pass_at(
    dataset: Dataset,
    test: Examples,
    lists_un: np.ndarray,
    score_un: np.ndarray,
    numbers: Sequence[int],
) -> dict[str, np.ndarray]:
    """MEASURES of the first N of each list: `watch_s mean@N`, `… best@N`, `… chosen@N`, `[U]`.

    Args:
      score_un: float `[U, n]`, by which one is chosen.
    """
    found = {}
    for name, value in response_to_items(dataset, test, lists_un).items():
        for n in numbers:
            found[f"{name} mean@{n}"] = mean_of_lists(value[:, :n])
            found[f"{name} best@{n}"] = best_of(value, n)
            found[f"{name} chosen@{n}"] = chosen_of(value, score_un, n)
    return found
