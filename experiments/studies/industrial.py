"""Holding down what the platform wants less of (SIR): OneRec Technical Report (arXiv 2506.13695),
section 2.4.3.

The reward is the click rate, by which the platform's content farms thrive: the P-Score holds them
down by itself. First comes the arm without SIR; the target share f lies 10% below its share of
flagged items among what is drawn, seed by seed, and the other arms differ by the factor alpha.

    python -m experiments.studies.industrial --small
"""

from collections.abc import Mapping

import numpy as np

from experiments.studies.post_config import StudyConfig
from experiments.studies.post_runs import Measured, Start, measure
from experiments.studies.posttraining import Study, command
from onerec_jax.rewards.industrial import target_below
from onerec_jax.training.metrics import late_mean

CUT = 0.1
FACTORS = (0.9, 0.7, 0.5, 0.2)
FREE = "no SIR"
NEVER = {"industrial.target_share": 0.9999}
"""A share that is never exceeded: flagged items are counted and nothing is cut."""


def arms(config: StudyConfig, starts: list[Start]):
    """Without SIR, and with f as the former says, at several alpha."""
    free = measure(config, starts, {FREE: NEVER}, config.judge)[FREE]
    targets = [target_below(late_mean(rows, "flagged"), CUT) for rows in free.rows]

    def with_factor(factor):
        return lambda seed: {
            "industrial.target_share": targets[seed],
            "industrial.factor": factor,
        }

    return {FREE: NEVER} | {f"alpha {factor}": with_factor(factor) for factor in FACTORS}


def notes(measured: Mapping[str, Measured]) -> list[str]:
    """How near to the target each arm came, in what is drawn and in the lists."""
    free = measured[FREE] if FREE in measured else next(iter(measured.values()))
    drawn = np.array([late_mean(rows, "flagged") for rows in free.rows])
    listed = np.nanmean(free.scores["flagged"], axis=1)
    lines = [
        f"{FREE}: flagged items are {drawn.mean():.2%} of what is drawn at the end, "
        f"{listed.mean():.2%} of the lists; f lies {CUT:.0%} below the former in each seed"
    ]
    for arm, found in measured.items():
        if found is free:
            continue
        here = np.array([late_mean(rows, "flagged") for rows in found.rows])
        lists = np.nanmean(found.scores["flagged"], axis=1)
        near = here / ((1 - CUT) * drawn) - 1
        lines.append(
            f"{arm}: {here.mean():.2%} of what is drawn, {np.mean(near):+.1%} off f "
            f"({', '.join(f'{x:+.1%}' for x in near)}); {lists.mean():.2%} of the lists, "
            f"{lists.mean() / listed.mean() - 1:+.1%} of the share without SIR"
        )
    return lines


STUDY = Study(
    name="industrial",
    question="SIR on and off, by alpha",
    paper=(
        "exposure of viral farms falls by 9.59% while Watch Time and App Stay Time stay as they are"
        " (section 4.3; f and alpha are not given)."
    ),
    arms=arms,
    headline=("flagged", "watch_s", "satisfaction"),
    curves=("flagged", "reward", "legality"),
    post={"objective": "ctr", "flagged": "viral_farm"},
    notes=notes,
)

if __name__ == "__main__":
    command(STUDY)
