"""What the early clip does: OneRec Technical Report (arXiv 2506.13695), section 2.4.1.

The pretrained model draws throughout, so that the policy is as far from its sampler as it gets. At
the end both losses' gradients are measured on the negatives that the early clip is there for, under
the same parameters (onerec_jax/posttraining/off_policy.py).

    python -m experiments.studies.ecpo --small
"""

from collections.abc import Mapping

import numpy as np

from experiments.studies.post_runs import Measured
from experiments.studies.posttraining import START, Study, command
from onerec_jax.training.metrics import late_mean


def notes(measured: Mapping[str, Measured]) -> list[str]:
    """Stability over training, and the gradients on off-policy negatives."""
    lines = []
    for arm, found in measured.items():
        logged = [rows for rows in found.rows if rows]  # a seed may stop before its first row
        if not logged:
            continue
        norms = [[row["grad_norm_policy"] for row in rows] for rows in logged]
        median, most = np.mean([np.median(x) for x in norms]), max(map(max, norms))
        ratio = max(row["ratio_quantiles"][-1] or 0 for rows in logged for row in rows)
        clipped = np.mean([late_mean(rows, "early_clipped") for rows in logged])
        lines.append(
            f"{arm}: gradient norm of the policy losses {median:.2f} in the median row, {most:.2f} "
            f"at most; largest ratio {ratio:.3g}; early-clipped at the end {clipped:.1%}"
        )
    runs = [x for found in measured.values() for x in found.off_policy if x.get("items")]
    if runs:
        above = sum(x["grpo_item"] > x["bound"] for x in runs)
        mean = {k: np.mean([x[k] for x in runs]) for k in runs[0]}
        lines.append(
            f"Negatives drawn by the start and early-clipped, {mean['items']:.0f} a run, "
            f"{mean['share']:.1%} of the negatives, largest ratio {mean['ratio']:.3g}: one item's "
            f"gradient has a norm of {mean['grpo_item']:.3g} under GRPO and {mean['bound']:.3g} "
            f"under ECPO, its bound, which GRPO exceeds in {above} of {len(runs)} runs; their mean "
            f"gradient, in which they cancel in part, {mean['grpo']:.3g} and {mean['ecpo']:.3g}."
        )
    return lines


STUDY = Study(
    name="ecpo",
    question="GRPO against ECPO",
    paper=(
        "with GRPO the ratio of negatives whose probability has risen has no bound, and gradients "
        "explode; the early clip with delta = 0.1 keeps training stable (section 2.4.1, no "
        "figures)."
    ),
    arms=lambda config, starts: {
        "GRPO": {"policy.algorithm": "grpo"},
        "ECPO, delta 0.1": {},
        "ECPO, delta 0.01": {"policy.delta": 0.01},
        "ECPO, delta 1": {"policy.delta": 1.0},
        START: None,
    },
    headline=("watch_s", "satisfaction", "p, reward", "legality, sample"),
    curves=("grad_norm_policy", "ratio_quantiles", "early_clipped", "reward", "legality"),
    post={"rollout.refresh_every": 0},
    judge={"off_policy_users": 16},
    notes=notes,
)

if __name__ == "__main__":
    command(STUDY)
