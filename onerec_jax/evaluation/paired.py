"""Arms that ran once a seed, compared over users and seeds.

Axes: S seeds, U users.
"""

from typing import Any

import numpy as np


def paired_over_seeds(
    a_su: np.ndarray, b_su: np.ndarray, *, seed: int = 0, resamples: int = 2000
) -> dict[str, Any]:
    """Mean of a - b with a 95% interval over users and seeds, and its sign in each seed.

    Users and seeds are drawn anew independently (a user stays the same in every seed and arm), so
    that the interval holds what either would change.

    Args:
      a_su, b_su: float `[S, U]`, one metric of two arms; NaN where a user has none.

    Returns:
      `a`, `b` (means), `difference`, `ci95` [lower, upper], `by_seed` (differences) and `agrees`,
      whether all seeds have one sign.

    Raises:
      ValueError: the shapes differ.
    """
    if a_su.shape != b_su.shape or a_su.ndim != 2:
        raise ValueError(f"arms of shapes {a_su.shape} and {b_su.shape} cannot be paired")
    seeds, users = a_su.shape
    rng = np.random.default_rng(seed)
    differences = a_su - b_su
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = differences[rng.integers(seeds, size=seeds)]
        means[i] = np.nanmean(drawn[:, rng.integers(users, size=users)])
    by_seed = np.nanmean(differences, axis=1)
    return {
        "a": float(np.nanmean(a_su)),
        "b": float(np.nanmean(b_su)),
        "difference": float(np.nanmean(differences)),
        "ci95": np.percentile(means, [2.5, 97.5]).tolist(),
        "by_seed": by_seed.tolist(),
        "agrees": bool((by_seed > 0).all() or (by_seed < 0).all()),
    }
