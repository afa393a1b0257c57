"""How well a score tells labels apart: AUC, AUC within users, calibration.

Axes: n judged exposures, U users, Q bins.
"""

import numpy as np


def auc_by_group(group, label, score) -> tuple[np.ndarray, np.ndarray]:
    """Area under the ROC curve within every group: P(a positive scores above a negative).

    Equal scores count half, as Mann and Whitney have it.

    Args:
      group: int `[n]`, from 0.
      label: int `[n]`, 0 or 1.
      score: float `[n]`, higher means 1.

    Returns:
      AUC float64 `[groups]`, NaN where a group has one kind of label only; members int64
      `[groups]`.
    """
    group, label = np.asarray(group), np.asarray(label).astype(np.int64)
    number = int(group.max()) + 1 if group.size else 0
    order = np.lexsort((score, group))
    group, label, score = group[order], label[order], np.asarray(score)[order]
    count = np.bincount(group, minlength=number)
    start = np.cumsum(count) - count
    # Ranks within the group, from 1; those of equal scores are their mean.
    new = np.ones(len(group), bool)
    new[1:] = (group[1:] != group[:-1]) | (score[1:] != score[:-1])
    tie = np.cumsum(new) - 1
    size = np.bincount(tie)
    rank = (np.cumsum(size) - (size - 1) / 2)[tie] - start[group]
    positive = np.bincount(group, label, number)
    negative = count - positive
    above = np.bincount(group, label * rank, number) - positive * (positive + 1) / 2
    pairs = positive * negative
    return np.divide(above, pairs, out=np.full(number, np.nan), where=pairs > 0), count


def auc(label, score) -> float:
    """`auc_by_group` of one group; NaN without both kinds of label."""
    value, _ = auc_by_group(np.zeros(len(label), int), label, score)
    return float(value[0]) if len(value) else float("nan")


def gauc(user, label, score) -> tuple[float, int]:
    """Mean of the users' AUCs, weighted by their exposures, and the users it is a mean of.

    Users with one kind of label have no AUC and do not count (Zhou et al., DIN, arXiv 1706.06978).
    """
    values, count = auc_by_group(user, label, score)
    has = np.isfinite(values)
    if not has.any():
        return float("nan"), 0
    return float(np.average(values[has], weights=count[has])), int(has.sum())


def calibration(label, probability, bins: int = 20) -> dict:
    """Mean prediction and share of positives in bins of equally many exposures.

    Returns:
      `predicted`, `observed`, `count` (lists, at most `bins` long) and `error`, the mean distance
      of the two, weighted by exposures (expected calibration error; NaN without any).
    """
    order = np.argsort(probability, kind="stable")
    parts = [part for part in np.array_split(order, bins) if part.size]
    predicted = np.array([np.mean(np.asarray(probability, float)[part]) for part in parts])
    observed = np.array([np.mean(np.asarray(label, float)[part]) for part in parts])
    count = np.array([part.size for part in parts])
    return {
        "predicted": predicted.tolist(),
        "observed": observed.tolist(),
        "count": count.tolist(),
        "error": float((np.abs(predicted - observed) * count).sum() / count.sum())
        if parts
        else float("nan"),
    }
