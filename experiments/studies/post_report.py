"""Tables and plots of the studies of post-training.

Axes: S seeds, U test users.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from onerec_jax.evaluation.closed_loop import METRICS as LOOP
from onerec_jax.evaluation.paired import paired_over_seeds


class Metric(NamedTuple):
    """How a metric is shown."""

    title: str
    relative: bool = True
    """Whether a gain is in per cent of the base, or as it is."""
    digits: int = 4


METRICS = {
    "watch_s": Metric("watch time, s"),
    "watch_ratio": Metric("watch ratio (vtr)"),
    "long_view": Metric("long view (lvtr)"),
    "like": Metric("like (ltr)", digits=5),
    "follow": Metric("follow (wtr)", digits=5),
    "comment": Metric("comment (cmtr)", digits=5),
    "forward": Metric("forward", digits=5),
    "hate": Metric("dislike", digits=5),
    "satisfaction": Metric("satisfaction"),
    "p, reward": Metric("p by the reward"),
    "p, judge": Metric("p by the judge"),
    "recall@10": Metric("Recall@10 of the log", relative=False),
    "NTP loss": Metric("NTP loss, nats", relative=False),
    "flagged": Metric("share of flagged items", relative=False),
    "legality, beam": Metric("legality of G beams", relative=False),
    "legality, sample": Metric("legality of G draws", relative=False),
}
"""Those of every study's table; others are named by `metric`."""


def metric(name: str) -> Metric:
    """How a name of `judged` is shown."""
    if name in METRICS:
        return METRICS[name]
    if name.startswith("loop "):
        key = name.removeprefix("loop ")
        return Metric(f"closed loop: {LOOP.get(key, key)}", relative=key != "flagged")
    if found := re.fullmatch(r"(\w+) (mean|best|chosen)@(\d+)", name):
        what, how, n = found.groups()
        how = {"mean": "mean of", "best": "best of", "chosen": "the reward's choice of"}[how]
        return Metric(f"{METRICS[what].title}, {how} {n}")
    return Metric(name, relative=False)


def paired(a_su: np.ndarray, b_su: np.ndarray, resamples: int) -> dict[str, Any] | None:
    """`paired_over_seeds` over the seeds that both arms came to the end of; None without any."""
    both = np.isfinite(a_su).any(1) & np.isfinite(b_su).any(1)
    if not both.any():
        return None
    found = paired_over_seeds(a_su[both], b_su[both], resamples=resamples)
    return found | {"seeds": int(both.sum())}


def compare(
    scores: Mapping[str, Mapping[str, np.ndarray]], resamples: int = 2000
) -> dict[str, dict[str, dict | None]]:
    """Every arm against the first: arm -> metric -> `paired`.

    Args:
      scores: arm -> metric -> float `[S, U]`; an arm that was stopped in all seeds may lack some.
      resamples: bootstrap samples.
    """
    base, *others = scores
    missing = np.full_like(next(iter(scores[base].values())), np.nan)
    return {
        arm: {
            m: paired(scores[arm].get(m, missing), values, resamples)
            for m, values in scores[base].items()
        }
        for arm in others
    }


def cell(name: str, found: dict | None) -> str:
    """An arm's mean, its gain over the base and the 95% interval; ± where seeds disagree."""
    if found is None:
        return "stopped"
    how = metric(name)
    scale = (1 / found["b"] if found["b"] else np.nan) if how.relative else 1.0
    pattern = "{:+.1%}" if how.relative else f"{{:+.{how.digits}f}}"
    gain, low, high = (pattern.format(scale * x) for x in (found["difference"], *found["ci95"]))
    mark = "" if found["agrees"] else " ±"
    return f"{found['a']:.{how.digits}f} {gain} [{low}, {high}]{mark}"


def table(
    scores: Mapping[str, Mapping[str, np.ndarray]], compared: dict, metrics: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a row a metric, a column an arm."""
    base = next(iter(scores))
    rows = []
    for name in metrics:
        mean = np.nanmean(scores[base][name])
        row = [metric(name).title, f"{mean:.{metric(name).digits}f}"]
        rows.append(row + [cell(name, compared[arm][name]) for arm in compared])
    return ["means over users and seeds", base, *compared], rows


def verdict(compared: dict, names: Sequence[str], base: str) -> list[str]:
    """One line a headline metric: the gains, and in how many seeds they have the mean's sign."""
    lines = []
    for name in names:
        parts = []
        for arm, found in compared.items():
            here = found[name]
            if here is None:
                parts.append(f"{arm}: stopped")
                continue
            same = sum(np.sign(x) == np.sign(here["difference"]) for x in here["by_seed"])
            parts.append(f"{arm} {cell(name, here).rstrip(' ±')}, {same} of {here['seeds']} seeds")
        lines.append(f"{metric(name).title}, over {base}: " + "; ".join(parts))
    return lines


def draw_gains(path: pathlib.Path, compared: dict, names: Sequence[str], base: str) -> None:
    """Gains over the first arm: points are seeds, bars the 95% intervals."""
    from matplotlib.figure import Figure  # no pyplot: a notebook keeps its backend

    figure = Figure(figsize=(3.4 * len(names), 0.5 * len(compared) + 1.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(names), sharey=True))
    for axis, name in zip(axes, names, strict=True):
        how = metric(name)
        for row, found in enumerate(x[name] for x in compared.values()):
            if found is None:
                continue
            scale = 100 / found["b"] if how.relative and found["b"] else 1.0
            axis.plot(scale * np.array(found["ci95"]), [row, row], color="tab:blue")
            gains = scale * np.array(found["by_seed"])
            axis.plot(gains, np.full(len(gains), row), "o", color="tab:blue", alpha=0.6)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.locator_params(axis="x", nbins=4)
        axis.set_title(how.title, fontsize=9)
        axis.set_xlabel(("% over " if how.relative else "over ") + base, fontsize=8)
        axis.set_yticks(range(len(compared)), list(compared), fontsize=8)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def curve(rows: Sequence[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric of metrics.jsonl; of a list by level its last, of entropy the
    sum."""
    steps, values = [], []
    for row in rows:
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, list):
            value = sum(value) if name == "entropy" else value[-1]
        steps.append(row["step"])
        values.append(np.nan if value is None else value)
    return steps, values


CURVES = {
    "reward": "reward of what is drawn",
    "legality": "legality of what is drawn",
    "entropy": "entropy of an item, nats",
    "grad_norm_policy": "gradient norm of the policy losses",
    "ratio_quantiles": "largest ratio to the sampler",
    "early_clipped": "share of early-clipped",
    "flagged": "share of flagged in what is drawn",
    "loss": "NTP loss, training",
}


def draw_curves(
    path: pathlib.Path, rows: Mapping[str, Sequence[Sequence[dict]]], names: Sequence[str]
) -> None:
    """Metrics over training, a colour an arm, a line a seed.

    Args:
      rows: arm -> metrics.jsonl of every seed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(names)))
    for axis, name in zip(axes, names, strict=True):
        for colour, (arm, seeds) in enumerate(rows.items()):
            for number, seed in enumerate(seeds):
                label = arm if number == 0 else None
                axis.plot(*curve(seed, name), color=f"C{colour}", alpha=0.7, label=label)
        axis.set_title(CURVES[name], fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        if name in ("grad_norm_policy", "ratio_quantiles"):
            axis.set_yscale("log")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
