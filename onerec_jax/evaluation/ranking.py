"""Ranking metrics over the whole catalogue for one target a user, with intervals over users.

Every candidate is an item row (0 to I - 1) and no candidate is sampled away: sampled metrics
order models differently from full ones (Krichene & Rendle, KDD 2020). Equal scores rank by
popularity, then by the lower item row, so that a model that cannot tell two items apart gains
nothing by the order in which a sort happens to leave them.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

NOT_RANKED = np.iinfo(np.int32).max
"""Rank of a target that is no candidate or not in the list: a miss at every cutoff."""


def tie_order(popularity: np.ndarray) -> np.ndarray:
    """Place of each item when all scores are equal.

    Args:
        popularity: [I] actions on each item in the training part.

    Returns:
        int32 [I], a permutation of 0 to I - 1: popularity descending, then item row ascending.
    """
    popularity = np.asarray(popularity)
    by_place = np.argsort(-popularity, kind="stable")
    places = np.empty(len(popularity), np.int32)
    places[by_place] = np.arange(len(popularity), dtype=np.int32)
    return places


@jax.jit
def target_ranks(
    scores: jax.Array,
    targets: jax.Array,
    tie_order: jax.Array,
    excluded: jax.Array | None = None,
) -> jax.Array:
    """Rank of each user's target among all candidates.

    Args:
        scores: float [B, I], higher is better. NaN ranks below every number.
        targets: int [B] item rows.
        tie_order: int32 [I] from `tie_order`: of two equal scores the lower place ranks first.
        excluded: bool [B, I], True where an item is no candidate for a user; None excludes none.

    Returns:
        int32 [B], 0 is the top; NOT_RANKED where the target is excluded or its score is NaN
        (a diverged model must not pass for the popularity ranking that its ties would give).
    """
    place = targets[:, None]
    target_scores = jnp.take_along_axis(scores, place, axis=1)
    ahead = (scores > target_scores) | (
        (scores == target_scores) & (tie_order[None, :] < tie_order[place])
    )
    missing = jnp.isnan(target_scores[:, 0])
    if excluded is not None:
        ahead &= ~excluded
        missing |= jnp.take_along_axis(excluded, place, axis=1)[:, 0]
    return jnp.where(missing, NOT_RANKED, ahead.sum(axis=1, dtype=jnp.int32))


def rank_of_target_in_list(lists: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Rank of each user's target in a list of recommendations.

    Args:
        lists: int [B, n] item rows, best first, -1 where a list is shorter than n.
        targets: int [B] item rows.

    Returns:
        int32 [B], the first place where the target stands, NOT_RANKED where it does not.
    """
    hits = (lists == targets[:, None]) & (lists >= 0)
    return np.where(hits.any(axis=1), hits.argmax(axis=1), NOT_RANKED).astype(np.int32)


def ranking_metrics(ranks: np.ndarray, cutoffs: tuple[int, ...] = (5, 10)) -> dict[str, np.ndarray]:
    """Recall@k and NDCG@k of every user.

    With one relevant item a user, recall@k is 1 when its rank is below k, and the ideal DCG is 1,
    so NDCG@k is 1 / log2(rank + 2) at ranks below k (Järvelin & Kekäläinen, TOIS 2002).

    Args:
        ranks: int [U], 0 is the top.
        cutoffs: list lengths k.

    Returns:
        `recall@k` and `ndcg@k` for each k, float64 [U].
    """
    ranks = np.asarray(ranks, np.float64)  # NOT_RANKED + 2 does not fit into int32
    gains = 1 / np.log2(ranks + 2)
    metrics = {}
    for k in cutoffs:
        hits = ranks < k
        metrics[f"recall@{k}"] = hits.astype(np.float64)
        metrics[f"ndcg@{k}"] = np.where(hits, gains, 0.0)
    return metrics


def _bootstrap_ci95(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Percentile bootstrap of the means of [U, M] over users: float64 [2, M], lower and upper."""
    if len(values) == 0 or resamples < 1:
        raise ValueError(f"cannot resample {len(values)} users {resamples} times")
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]))
    for i in range(resamples):  # one resample at a time: memory stays at one copy of `values`
        means[i] = values[rng.integers(len(values), size=len(values))].mean(axis=0)
    return np.percentile(means, [2.5, 97.5], axis=0)


def summarize(
    per_user: Mapping[str, np.ndarray], seed: int, resamples: int = 2000
) -> dict[str, float | list[float]]:
    """Means over users with 95% intervals from the percentile bootstrap (Efron 1979).

    Args:
        per_user: metrics, each float [U] over the same users.
        seed: of the resampling.
        resamples: bootstrap samples of U users.

    Returns:
        For each metric `name`: its mean under `name` and [lower, upper] under `name_ci95`.

    Raises:
        ValueError: there are no users.
    """
    values = np.stack(list(per_user.values()), axis=1)
    lower, upper = _bootstrap_ci95(values, seed, resamples)
    summary: dict[str, float | list[float]] = {}
    for i, name in enumerate(per_user):
        summary[name] = float(values[:, i].mean())
        summary[f"{name}_ci95"] = [float(lower[i]), float(upper[i])]
    return summary


def paired_difference(
    a: np.ndarray, b: np.ndarray, seed: int, resamples: int = 2000
) -> dict[str, float | list[float]]:
    """Mean of a - b over users, with a 95% interval from resampling users, both models at once.

    Args:
        a: float [U], one metric of one model.
        b: float [U], the same metric of another model, the same users in the same order.
        seed: of the resampling.
        resamples: bootstrap samples of U users.

    Returns:
        `difference` and `ci95` as [lower, upper].

    Raises:
        ValueError: a and b differ in shape, or there are no users.
    """
    if a.shape != b.shape:
        raise ValueError(f"a paired difference needs the same users: {a.shape} and {b.shape}")
    values = (a - b)[:, None]
    lower, upper = _bootstrap_ci95(values, seed, resamples)[:, 0]
    return {"difference": float(values.mean()), "ci95": [float(lower), float(upper)]}


def coverage(lists: np.ndarray, num_items: int, cutoff: int = 10) -> float:
    """Share of the catalogue that stands in at least one user's top `cutoff`.

    Args:
        lists: int [U, n] item rows, best first, -1 where a list is shorter than n.
        num_items: I, items in the catalogue.
        cutoff: places of each list that count.
    """
    shown = np.unique(lists[:, :cutoff])
    return float((shown >= 0).sum() / num_items)
