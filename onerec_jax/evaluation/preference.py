"""What a preference score is worth: against labels, and against a world that knows the truth.

Axes: n exposures or pairs, O objectives, N sets of label weights, B requests, G candidates.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from onerec_jax.data.schema import Dataset
from onerec_jax.data.world.response import Response, World, satisfaction
from onerec_jax.evaluation.classification import auc, calibration, gauc

WORLD_RATES = {
    "ctr": "click",
    "lvtr": "long_view",
    "ltr": "like",
    "wtr": "follow",
    "cmtr": "comment",
}
"""Objectives whose probability a world states."""


def objective_metrics(user, label, probability, p) -> dict:
    """AUC, GAUC and calibration of one tower, and what p says of the same label.

    Args:
      user, label: int `[n]`; label -1 is unknown and left out.
      probability, p: float `[n]`.
    """
    known = np.asarray(label) >= 0
    user, label, probability, p = (np.asarray(x)[known] for x in (user, label, probability, p))
    (user_auc, users), (p_user_auc, _) = gauc(user, label, probability), gauc(user, label, p)
    return {
        "exposures": int(known.sum()),
        "rate": float(label.mean()) if label.size else float("nan"),
        "auc": auc(label, probability),
        "gauc": user_auc,
        "gauc_users": users,
        "p_auc": auc(label, p),
        "p_gauc": p_user_auc,
        "calibration": calibration(label, probability),
    }


def validation_metrics(
    names: Sequence[str], label_no, logit_no, others: dict[str, np.ndarray] | None = None
) -> dict[str, float]:
    """`loss` (cross-entropy, summed over objectives), AUC of each where there are both kinds of
    label, and `score`, the negative loss.

    Args:
      label_no: int `[n, O]`, -1 unknown; logit_no: float `[n, O]`.
      others: prefix of a metric -> a score `[n]` whose AUC is asked for as well.
    """
    found = {"loss": 0.0}
    for i, name in enumerate(names):
        known = label_no[:, i] >= 0
        label, logit = label_no[known, i], logit_no[known, i].astype(float)
        if known.any():
            found["loss"] += float(np.mean(np.logaddexp(0, logit) - label * logit))
        scores = {"auc": logit} | {k: x[known] for k, x in (others or {}).items()}
        for kind, score in scores.items():
            if (value := auc(label, score)) == value:  # there may be one kind of label only
                found[f"{kind}_{name}"] = value
    return found | {"score": -found["loss"]}


def held_out_metrics(
    user, item, labels: dict, scores: dict, history, num_items: int, fused: str = "p"
) -> dict:
    """`objective_metrics` of every objective, and the AUC of what the items say without the user.

    Args:
      user: int `[n]`; item: int `[n]`, or `[n, S]` where lists are judged.
      labels: objective -> int `[n]`, -1 unknown; scores: objective -> probability `[n]`, and
        `fused`.
      history: items as `item` and labels int `[k, O]` of the training part.
    """
    item, (trained, label_ko) = np.reshape(item, (len(user), -1)), history
    trained, found = np.reshape(trained, (len(label_ko), -1)), {}
    for i, (name, label) in enumerate(labels.items()):
        found[name] = objective_metrics(user, label, scores[name], scores[fused])
        repeated = np.repeat(label_ko[:, i], trained.shape[1])
        rates = item_rates(trained.ravel(), repeated, num_items)
        known = label >= 0
        found[name]["item_rate_auc"] = auc(label[known], rates[item[known]].mean(1))
    return found


def item_rates(item, label, num_items: int, prior: float = 20.0) -> np.ndarray:
    """Share of positive labels of every item, float64 `[I]`: what can be said without the user.

    Args:
      item, label: int `[n]`, of training exposures; label -1 is unknown.
      prior: exposures that the mean over all items counts for.
    """
    known = np.asarray(label) >= 0
    item, label = np.asarray(item)[known], np.asarray(label)[known]
    positive = np.bincount(item, label, num_items)
    return (positive + prior * label.mean()) / (np.bincount(item, minlength=num_items) + prior)


def auc_by_weights(label_no, p_nn) -> np.ndarray:
    """AUC of p under each set of weights against each label, float64 `[N, O]`.

    Args:
      label_no: int `[n, O]`, -1 unknown.
      p_nn: float `[n, N]`.
    """
    known = label_no >= 0
    return np.array(
        [
            [auc(label_no[known[:, o], o], p[known[:, o]]) for o in range(label_no.shape[1])]
            for p in p_nn.T
        ]
    )


def spearman(a, b) -> float:
    """Rank correlation of two `[n]`; NaN where either is constant."""
    a, b = (rankdata(x) - (len(x) + 1) / 2 for x in (a, b))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else float("nan")


def world_expectations(
    dataset: Dataset, world: World, user, item, row, *, moods: int = 0
) -> dict[str, np.ndarray]:
    """What the world expects of users shown items in the situation of a log row, float `[n]` each.

    Args:
      user, item: int `[n]`, rows of the tables.
      row: int `[n]`, exposures whose session, slot and time are meant.
      moods: 0: in the mood that the session is in, which no log tells. Otherwise a mean over the
        moods of so many other sessions at the same time, as for somebody who knows everything but
        the session.
    """
    # A table's row is the world's as long as nobody was dropped; the id is it always.
    user, item = (
        dataset.users["user_id"].to_numpy()[user],
        dataset.items["item_id"].to_numpy()[item],
    )
    session, slot, time_s = (dataset.column(c)[row] for c in ("session", "slot", "time_s"))
    # The number of a session decides its mood and nothing else; no log gets as far as these.
    others = [session + 2**20 * (1 + k) for k in range(moods)] or [session]
    answers = [world.expected(user, item, other, slot, time_s) for other in others]
    answer = Response(*(np.mean(field, axis=0) for field in zip(*answers, strict=True)))
    rates = {name: getattr(answer, field) for name, field in WORLD_RATES.items()}
    return rates | {"satisfaction": satisfaction(answer), "watch_s": answer.watch_s}


def session_expectations(
    dataset: Dataset, world: World, user, item_ns, row_ns, *, moods: int = 0
) -> dict[str, np.ndarray]:
    """What the world expects of users shown lists of items, float64 `[n]` each: `swt`, seconds
    watched in all; `wtr`, `ltr`, that there is a follow or a like; `satisfaction`, a mean.

    Args:
      user: int `[n]`; item_ns: int `[n, S]`.
      row_ns: int `[n, S]`, exposures whose session, slot and time are meant.
      moods: as `world_expectations`.
    """
    shape = np.shape(item_ns)
    who = np.repeat(user, shape[1])
    found = world_expectations(
        dataset, world, who, np.ravel(item_ns), np.ravel(row_ns), moods=moods
    )
    found = {name: np.float64(x).reshape(shape) for name, x in found.items()}
    return {
        "swt": found["watch_s"].sum(1),
        "wtr": 1 - (1 - found["wtr"]).prod(1),
        "ltr": 1 - (1 - found["ltr"]).prod(1),
        "satisfaction": found["satisfaction"].mean(1),
    }


def oracle_metrics(user, labels: dict, expected: dict, blind: dict) -> dict:
    """AUC of the world's own probabilities: what nobody can beat who only sees the log.

    Args:
      labels: objective -> int `[n]`, -1 unknown.
      expected, blind: from `world_expectations`, in the session's mood and in any.
    """
    found = {}
    for name in labels:
        if name in expected:
            known = labels[name] >= 0
            label, truth = labels[name][known], expected[name][known]
            found[name] = {"auc": auc(label, truth), "gauc": gauc(user[known], label, truth)[0]}
            found[name]["auc_without_mood"] = auc(label, blind[name][known])
    return found


def against_world(expected: dict, scores: dict, fused: str = "p") -> dict[str, float]:
    """Spearman correlations over all pairs `[n]`: each tower with its rate, p (or what else fuses
    all) with satisfaction."""
    found = {name: spearman(scores[name], expected[name]) for name in scores if name in expected}
    found[f"{fused}, satisfaction"] = spearman(scores[fused], expected["satisfaction"])
    return found


def within_users(expected: dict, scores: dict, fused: str = "p") -> dict[str, float]:
    """Mean of `against_world` over the rows of `[B, G]`: how well each user's items are ranked."""
    rows = [
        against_world(
            {k: v[b] for k, v in expected.items()}, {k: v[b] for k, v in scores.items()}, fused
        )
        for b in range(len(scores[fused]))
    ]
    return {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]}


def unexposed_items(dataset: Dataset, user, number: int, seed: int) -> np.ndarray:
    """Random items that each user was never shown, int32 `[B, number]`; repeats where too few."""
    rng = np.random.default_rng(seed)
    rows = []
    for u in np.asarray(user):
        shown = dataset.item_rows[dataset.offsets[u] : dataset.offsets[u + 1]]
        others = np.setdiff1d(np.arange(dataset.num_items), shown)
        others = others if len(others) else np.arange(dataset.num_items)
        rows.append(rng.choice(others, number, replace=len(others) < number))
    return np.array(rows, np.int32)
