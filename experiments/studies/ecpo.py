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
        above = sum(x["grpo"] > x["bound"] for x in runs)
        mean = {k: np.mean([x[k] for x in runs]) for k in ("items", "grpo", "ecpo", "bound")}
        lines.append(
            f"Negatives drawn by the start and early-clipped, {mean['items']:.0f} a run: the norm "
            f"of GRPO's gradient is {mean['grpo']:.3g}, of ECPO's {mean['ecpo']:.3g}, and the most "
            f"that ECPO's can be {mean['bound']:.3g}; GRPO's exceeds that in {above} of "
            f"{len(runs)} runs."
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
