"""Label weights of the preference score: which are tried, and which of them is kept.

OneRec Technical Report (arXiv 2506.13695), section 2.4.1: weights are adjusted until the AUC of
every objective rises. Only their ratios matter. Here several sets are tried side by side, each with
a fusion of its own on the same towers.

Axes: N sets of weights, O objectives.
"""

from collections.abc import Sequence

import numpy as np


def weight_candidates(
    objectives: Sequence[str], base_o, rate_o, factor: float
) -> dict[str, np.ndarray]:
    """Sets of label weights to try: float64 `[O]` by name.

    Args:
      base_o: weights to start from, above 0.
      rate_o: share of positive labels of each objective in training, between 0 and 1.
      factor: what one objective's weight is raised by; 1 tries nothing but the base.

    Returns:
      `base`; `by variance`, in which every label counts for as much as any other whatever its rate
      (base over p (1 - p)); and for each objective the base with its weight raised.
    """
    base_o, rate_o = np.asarray(base_o, float), np.asarray(rate_o, float)
    found = {"base": base_o}
    if factor == 1 or len(base_o) == 1:
        return found
    found["by variance"] = base_o / (rate_o * (1 - rate_o))
    for i, name in enumerate(objectives):
        found[f"{name} x {factor:g}"] = base_o * np.where(np.arange(len(base_o)) == i, factor, 1)
    return found


def choose_weights(auc_no: np.ndarray) -> int:
    """The set with the highest mean AUC among those that lower no objective's AUC.

    Args:
      auc_no: float `[N, O]`, AUC of p against each label on validation exposures; row 0 is the
        base, against which the others are held. NaN: cannot be told, counts nowhere.

    Returns:
      Row number; 0 where nothing is better in every respect.
    """
    auc_no = np.asarray(auc_no)[:, np.isfinite(auc_no).all(0)]
    if not auc_no.shape[1]:
        return 0
    good = (auc_no >= auc_no[0]).all(1)
    return int(np.argmax(np.where(good, auc_no.mean(1), -np.inf)))
