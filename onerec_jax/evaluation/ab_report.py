"""An A/B test as tables and as a plot."""

import pathlib
from collections.abc import Mapping

import numpy as np

from onerec_jax.evaluation.closed_loop import METRICS
from onerec_jax.evaluation.report import markdown_table

PUBLISHED = {
    "stay_s": "App Stay",
    "watch_s": "Watch",
    "views": "View",
    "like": "Like",
    "follow": "Follow",
    "comment": "Comment",
    "forward": "Forward",
    "return": "Return",
}
"""Columns of OneRec Technical Report (arXiv 2506.13695), Table 12, as far as a world has them;
`return` stands in place of LT7."""
MILLION = 1e6


def in_per_cent(row: Mapping) -> tuple[float, float, float]:
    """Change and its interval in per cent of the base's mean; NaN where that is 0."""
    scale = 100 / row["base"] if row["base"] else float("nan")
    return tuple(scale * x for x in (row["difference"], *row["ci95"]))


def effect(row: Mapping) -> str:
    """Change of a metric in words: per cent, 95% interval, ± where seeds disagree on the sign.

    Nothing where the base's mean is 0.
    """
    if not row["base"]:
        return ""
    change, low, high = in_per_cent(row)
    disagree = len(row["by_seed"]) > 1 and not row["agrees"]
    return f"{change:+.1f} [{low:+.1f}, {high:+.1f}]" + (" ±" if disagree else "")


def effect_rows(result: Mapping) -> tuple[list[str], list[list[str]]]:
    """Header and a row a metric: the base's mean, and what every other arm changes in per cent."""
    (base, first), *others = result.items()
    header = ["a user", base, *(name for name, _ in others)]
    rows = [
        [label, f"{first[metric]['mean']:.4g}", *(effect(arm[metric]) for _, arm in others)]
        for metric, label in METRICS.items()
    ]
    return header, rows


def published_rows(result: Mapping) -> tuple[list[str], list[list[str]]]:
    """Header and a row an arm, in the columns of the report."""
    (base, _), *others = result.items()
    header = [f"% over {base}", *PUBLISHED.values()]
    return header, [[name, *(effect(arm[metric]) for metric in PUBLISHED)] for name, arm in others]


def cost_rows(costs: Mapping) -> tuple[list[str], list[list[str]]]:
    """Header and a row an arm: TFLOP by part and seconds of a million lists."""
    parts = list(dict.fromkeys(part for cost in costs.values() for part in cost["flops"] or ()))
    header = ["a million lists", "items scored a list", *(f"{part}, TFLOP" for part in parts)]
    header += ["TFLOP", "seconds"]
    rows = []
    for name, cost in costs.items():
        flops = cost["flops"]
        tera = [MILLION / 1e12 * (flops or {}).get(part, np.nan) for part in parts]
        total = np.nansum(tera) if flops is not None else np.nan
        cells = ["" if np.isnan(x) else f"{x:,.4g}" for x in (*tera, total)]
        scored = f"{cost['scored']:.1f}" if cost["scored"] else ""
        rows.append([name, scored, *cells, f"{MILLION * cost['seconds']:,.0f}"])
    return header, rows


def markdown(result: Mapping, costs: Mapping, *, command: str, note: str, plot: str) -> str:
    """The whole report.

    Args:
      result: of `closed_loop.compare`.
      costs: arm -> `Metered.cost`.
      plot: the plot's file name.
    """
    tables = [markdown_table(*f(x)) for f, x in ((published_rows, result), (effect_rows, result))]
    return "\n".join(
        [
            f"# A/B test\n\n`{command}`\n\n{note}\n",
            f"{tables[0]}\n![]({plot})\n",
            f"All metrics, and the base's means:\n\n{tables[1]}",
            f"Cost:\n\n{markdown_table(*cost_rows(costs))}",
        ]
    )


def draw(path: pathlib.Path, result: Mapping) -> None:
    """Changes over the first arm in per cent: bars with their intervals, points are seeds."""
    from matplotlib.figure import Figure  # no pyplot: a notebook keeps its backend

    (base, _), *others = result.items()
    figure = Figure(figsize=(12, 1.6 + 0.7 * len(others)), layout="constrained")
    axes = figure.subplots(2, -(-len(PUBLISHED) // 2), sharey=True)
    place = np.arange(len(others))
    for axis, (metric, title) in zip(axes.ravel(), PUBLISHED.items(), strict=True):
        rows = [arm[metric] for _, arm in others]
        change, low, high = np.array([in_per_cent(row) for row in rows]).T
        axis.barh(place, change, color="tab:blue", alpha=0.5)
        axis.hlines(place, low, high, color="black", linewidth=1)
        for y, row in zip(place, rows, strict=True):
            if len(row["by_seed"]) > 1 and row["base"]:
                x = 100 * np.array(row["by_seed"]) / row["base"]
                axis.plot(x, np.full(len(x), y), ".", color="tab:red")
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(title=title, yticks=place)
        axis.set_yticks(place, [name for name, _ in others])
    axes[0, 0].invert_yaxis()
    figure.supxlabel(f"% over {base}, 95% intervals")
    figure.savefig(path, dpi=110)
