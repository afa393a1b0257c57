"""Holding down what the platform wants less of (SIR): OneRec Technical Report (arXiv 2506.13695),
section 2.4.3.

The users of the simulated platform dislike its content farms, so that any reward learned from them
drives farms out: there is nothing to hold down. What is held down here is the head, the items that
the log shows most; --post.flagged names others. First comes the arm without SIR; the target share f
lies 10% below its share of flagged items among what is drawn, seed by seed, and the other arms
differ by the factor alpha.

    python -m experiments.studies.industrial --small
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from experiments.studies.post_config import StudyConfig
from experiments.studies.post_runs import Measured, Start, measure
from experiments.studies.posttraining import Study, command
from onerec_jax.files import write_text
from onerec_jax.rewards.industrial import target_below
from onerec_jax.run import Run
from onerec_jax.training.metrics import late_mean

HEAD = 0.05
"""Share of the catalogue."""
CUT = 0.1
FACTORS = (0.9, 0.7, 0.5, 0.2)
FREE = "no SIR"
NEVER = {"industrial.target_share": 0.9999}
"""A share that is never exceeded: flagged items are counted and nothing is cut."""


def prepare(config: StudyConfig, starts: list[Start]) -> StudyConfig:
    """Flags the head of the catalogue, where nothing else is named, for training and judging."""
    flagged = config.post.flagged
    if flagged is None:
        run = Run.open(starts[0].policy)
        head = run.popular[: round(HEAD * run.dataset.num_items)]
        ids = run.dataset.items["item_id"].gather(head).to_list()
        path = starts[0].policy.parent / "head.txt"
        write_text(path, "".join(f"{item}\n" for item in ids))
        flagged = str(path)
    return dataclasses.replace(
        config,
        post=dataclasses.replace(config.post, flagged=flagged),
        judge=dataclasses.replace(config.judge, flagged=flagged),
    )


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
    prepare=prepare,
    notes=notes,
)

if __name__ == "__main__":
    command(STUDY)
