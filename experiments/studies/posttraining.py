"""A study of post-training from its arms to its report; the studies are the files beside it.

rl, group_size, search, sampler, ecpo, format_reward, industrial and reward each say which arms they
compare and what OneRec Technical Report (arXiv 2506.13695) found; here is what they have in common.
See docs/posttrain.md.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import rich.console
import rich.table

from experiments import pretrain
from experiments.studies import post_report
from experiments.studies.arms import command_line
from experiments.studies.post_config import SMALL, StudyConfig
from experiments.studies.post_runs import (
    Arm,
    Ground,
    Measured,
    Start,
    ground_of,
    measure,
    starts_of,
)
from experiments.studies.study_config import Changes, changed
from onerec_jax.errors import InputError
from onerec_jax.evaluation.report import markdown_table
from onerec_jax.files import write_text

START = "start"
"""Name of the arm that is not post-trained."""
NO_RL: Changes = {
    "rollout.group": 2,
    "format.k": 0,
    "weights.preference": 0.0,
    "weights.format": 0.0,
}
"""Supervised fine-tuning alone."""
SHOWN = tuple(post_report.METRICS)


@dataclasses.dataclass(frozen=True)
class Study:
    """One question, its arms and what is shown of them."""

    name: str
    question: str
    paper: str
    """What the report found, with the table or section."""
    arms: Callable[[StudyConfig, list[Start]], Mapping[str, Arm]]
    """By name, in order; the first is the one that all others are compared with."""
    headline: tuple[str, ...] = ("watch_s", "satisfaction")
    """Metrics that the question is decided by."""
    metrics: tuple[str, ...] = ()
    """Of the table, beside those of all studies."""
    curves: tuple[str, ...] = ("reward", "legality", "entropy")
    post: Changes = dataclasses.field(default_factory=dict)
    """What the study changes in the defaults of --post."""
    judge: Changes = dataclasses.field(default_factory=dict)
    """What the study changes in the defaults of --judge."""
    prepare: Callable[[StudyConfig, list[Start]], StudyConfig] = lambda config, starts: config
    """What the starts are needed for before the arms are known."""
    notes: Callable[[Mapping[str, Measured]], list[str]] = lambda measured: []
    """Further lines of the report."""


def run_study(study: Study, config: StudyConfig) -> dict[str, Any]:
    """Trains and judges what is not there yet, compares, prints and writes.

    Returns:
      What is written to report.json.
    """
    name = f"{study.name}-{config.world.name}" + ("-small" if config.small else "")
    out = config.out or pretrain.RUNS / "studies" / name
    ground = ground_of(config)
    print(f"{ground.codes:,} IDs can be said, {ground.dataset.num_items:,} items have one")
    starts = starts_of(config, ground)
    config = study.prepare(config, starts)
    measured = measure(config, starts, chosen(study.arms(config, starts), config), config.judge)
    scores = {arm: found.scores for arm, found in measured.items()}
    base = next(iter(scores))
    if not scores[base]:
        raise InputError(f"{base}, with which all is compared, was stopped in every seed")
    compared = post_report.compare(scores, config.resamples)
    shown = [m for m in (*study.metrics, *SHOWN) if m in scores[base]]
    headline = [m for m in study.headline if m in scores[base]]  # --judge may leave some out
    header, rows = post_report.table(scores, compared, shown)
    lines = found_lines(study, config, ground, measured, compared, headline)
    show(study, header, rows, lines)

    out.mkdir(parents=True, exist_ok=True)
    post_report.draw_gains(out / "gains.png", compared, headline, base)
    curves = {arm: found.rows for arm, found in measured.items() if found.rows}
    post_report.draw_curves(out / "curves.png", curves, study.curves)
    text = "\n\n".join([f"# {study.question}", markdown_table(header, rows), *lines])
    write_text(out / "report.md", f"{text}\n\n![gains](gains.png)\n\n![curves](curves.png)\n")
    record = {
        "config": dataclasses.asdict(config),
        "command": " ".join(sys.argv),
        "question": study.question,
        "compared": compared,
        "base": {m: float(np.nanmean(x)) for m, x in scores[base].items()},
        "stopped": {arm: found.stopped for arm, found in measured.items()},
        "off_policy": {arm: found.off_policy for arm, found in measured.items()},
        "lines": lines,
    }
    write_text(out / "report.json", json.dumps(record, indent=1, default=str) + "\n")
    print(f"written to {out}")
    return record


def chosen(arms: Mapping[str, Arm], config: StudyConfig) -> dict[str, Arm]:
    """The arms that --arms names, in their own order, or all.

    Raises:
      InputError: an unknown arm, or fewer than two.
    """
    for arm in config.arms:
        if arm not in arms:
            raise InputError(f"--arms {arm!r}: choose of {', '.join(map(repr, arms))}")
    kept = {name: arms[name] for name in arms if not config.arms or name in config.arms}
    if len(kept) < 2:
        raise InputError("--arms needs two arms or more: they are compared")
    return kept


def found_lines(
    study: Study, config: StudyConfig, ground: Ground, measured, compared, headline
) -> list[str]:
    """What the report found and what was found here, a line each."""
    base, *_ = measured
    users, world = measured[base].scores["watch_s"].shape[1], ground.world
    lines = [f"The report: {study.paper}"]
    lines += [f"Here: {x}" for x in post_report.verdict(compared, headline, base)]
    lines += study.notes(measured)
    for arm, found in measured.items():
        for seed, why in enumerate(found.stopped):
            if why:
                lines.append(f"{arm}, seed {seed}, was stopped: {why}")
    lines.append(
        f"World {world.config.name} ({world.fingerprint}): {users} users, "
        f"{ground.dataset.num_items:,} items, {ground.codes:,} IDs; {config.seeds} seeds, "
        f"{config.post.train.steps} steps. In brackets 95% intervals over users and seeds of the "
        f"gain over '{base}'; ± where the seeds disagree on its sign."
    )
    return lines


def show(study: Study, header: list[str], rows: list[list[str]], lines: list[str]) -> None:
    """Print the table and what goes with it."""
    shown = rich.table.Table(*header, title=study.question)
    for row in rows:
        shown.add_row(*(text.replace("[", "\\[") for text in row))
    rich.console.Console(width=40 + 38 * len(header)).print(shown)
    print("\n".join(lines))


def command(study: Study, argv: list[str] | None = None) -> None:
    """The command line of a study; `argv` replaces the process's own flags."""
    argv = sys.argv[1:] if argv is None else argv
    default = StudyConfig(**(SMALL if "--small" in argv else {}))
    default = dataclasses.replace(
        default, post=changed(default.post, study.post), judge=changed(default.judge, study.judge)
    )
    command_line(
        lambda config: run_study(study, config),
        StudyConfig,
        study.name,
        default=default,
        argv=argv,
    )
