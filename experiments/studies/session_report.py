"""Tables and plot of the study of sessions.

Axes: S seeds, U test users.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.studies.post_report import compare
from experiments.studies.session_judge import HOW
from onerec_jax.evaluation.closed_loop import METRICS as LOOP
from onerec_jax.evaluation.report import markdown_table

HEADS = ("swt", "vtr", "wtr", "ltr")
PLATFORM = {
    "watch_s": "session watch time, s",
    "long_view": "long views",
    "like": "likes",
    "follow": "follows",
    "satisfaction": "satisfaction",
}
SHOWN = ("stay_s", "watch_s", "views", "variety", "return")
"""Metrics of the closed loop in the table."""
DIGITS = 4

Scores = Mapping[str, Mapping[str, np.ndarray]]
"""arm -> metric -> float `[S, U]`."""


def report_of(
    scores: Scores, *, base: str, seed_model: str, aligned: Sequence[str], resamples: int
) -> dict[str, Any]:
    """All that is compared.

    Args:
      base: the arm that all others are compared with.
      seed_model: the one that `aligned` arms start from, and are compared with as well.

    Returns:
      `means` (arm -> metric -> mean over users and seeds), `base` and `seed_model` (names),
      `compared` and `compared_aligned` (arm -> metric -> as `paired_over_seeds`, None where an arm
      has no such metric).
    """

    def against(first: str, others: Sequence[str]) -> dict:
        kept = {arm: scores[arm] for arm in (first, *others)}
        return compare(kept, resamples) if others and scores[first] else {}

    return {
        "means": {
            arm: {name: float(np.nanmean(x)) for name, x in found.items()}
            for arm, found in scores.items()
        },
        "base": base,
        "seed_model": seed_model,
        "compared": against(base, [arm for arm in scores if arm != base]),
        "compared_aligned": against(seed_model, [x for x in aligned if x in scores]),
    }


def paper_rows(report: Mapping) -> tuple[list[str], list[list[str]]]:
    """Table 1 of OneRec V0: a row an arm, mean / max by head of the judge."""
    return _mean_and_max(report, {f"{head} by the judge": head for head in HEADS})


def platform_rows(report: Mapping) -> tuple[list[str], list[list[str]]]:
    """The same of what the platform expects of a list."""
    return _mean_and_max(
        report, {f"{name} by the platform": title for name, title in PLATFORM.items()}
    )


def _mean_and_max(report: Mapping, metrics: Mapping[str, str]):
    means = report["means"]
    here = [m for m in metrics if any(f"{m}, mean" in found for found in means.values())]
    header = ["", *(f"{metrics[m]}, mean / max" for m in here)]
    rows = []
    for arm, found in means.items():
        cells = []
        for m in here:
            pair = [found.get(f"{m}, {how}", np.nan) for how in ("mean", "max")]
            cells.append(" / ".join(f"{x:.{DIGITS}f}" for x in pair))
        rows.append([arm, *cells])
    return header, rows


def gain_rows(compared: Mapping, names: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Header and a row a metric, a column an arm: `gain` over the base.

    Args:
      names: metric -> title.
    """
    here = [m for m in names if any(found.get(m) for found in compared.values())]
    rows = [[names[m], *(gain(m, found.get(m)) for found in compared.values())] for m in here]
    return ["", *compared], rows


def gain(metric: str, found: Mapping | None) -> str:
    """Per cent over the base (of a reward, which has no zero, as it is), 95% interval, ± where
    seeds disagree on the sign, and in how many of them it is that of the mean.

    Nothing where there is nothing to compare.
    """
    if found is None or not found["b"]:
        return ""
    absolute = metric.startswith("reward")
    scale, pattern = (1, "{:+.3f}") if absolute else (100 / found["b"], "{:+.1f}%")
    change, low, high = (scale * x for x in (found["difference"], *found["ci95"]))
    text = f"{pattern} [{pattern}, {pattern}]".format(change, low, high)
    if found["seeds"] == 1:
        return text
    same = sum(np.sign(x) == np.sign(found["difference"]) for x in found["by_seed"])
    return text + ("" if found["agrees"] else " ±") + f", {same} of {found['seeds']}"


def list_metrics() -> dict[str, str]:
    """Those that arms are compared in, by name, with titles."""
    names = {
        f"{name} by the platform, {how}": f"{title}, {how}"
        for name, title in PLATFORM.items()
        if name in ("watch_s", "satisfaction")
        for how in HOW
    }
    names |= {f"{head} by the judge, {how}": f"{head}, {how}" for head in HEADS for how in HOW[1:]}
    names |= {f"reward by the reward, {how}": f"reward, {how}" for how in HOW[1:]}
    return names | {
        "first codes": "different first codes in the first list",
        "different items": "different items in all lists",
    }


def markdown(report: Mapping, lines: Sequence[str]) -> str:
    """The whole report but for the plot."""
    base, parent = report["base"], report["seed_model"]
    parts = ["# Lists as a whole against lists item by item", *lines]
    parts += ["By the judge:", markdown_table(*paper_rows(report))]
    parts += ["By the platform, a list:", markdown_table(*platform_rows(report))]
    tables = {
        f"Over {base}:": (report["compared"], list_metrics()),
        f"Aligned, over {parent}:": (report["compared_aligned"], list_metrics()),
        f"Closed loop, over {base}:": (
            report["compared"],
            {f"loop {name}": LOOP[name] for name in SHOWN},
        ),
    }
    for title, (compared, names) in tables.items():
        header, rows = gain_rows(compared, names)
        if rows:
            parts += [title, markdown_table(header, rows)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def draw(path: pathlib.Path, report: Mapping) -> None:
    """Watch time by the platform over the base: points are seeds, bars the 95% intervals."""
    from matplotlib.figure import Figure  # no pyplot: a notebook keeps its backend

    compared = report["compared"]
    figure = Figure(figsize=(3.4 * len(HOW), 0.4 * len(compared) + 1.4), layout="constrained")
    axes = figure.subplots(1, len(HOW), sharey=True)
    for axis, how in zip(axes, HOW, strict=True):
        for row, arm in enumerate(compared.values()):
            found = arm[f"watch_s by the platform, {how}"]
            if found is None:
                continue
            scale = 100 / found["b"]
            axis.plot(scale * np.array(found["ci95"]), [row, row], color="tab:blue")
            gains = scale * np.array(found["by_seed"])
            axis.plot(gains, np.full(len(gains), row), "o", color="tab:blue", alpha=0.6)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(f"session watch time, {how}", fontsize=9)
        axis.set_xlabel(f"% over {report['base']}", fontsize=8)
        axis.set_yticks(range(len(compared)), list(compared), fontsize=8)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)
