"""The report of a preference score, or of a session reward, as tables, Markdown and plots."""

import pathlib

import numpy as np

from onerec_jax.evaluation.report import markdown_table


def _number(value, digits=4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def without_nan(value):
    """JSON knows no NaN: what could not be measured is None."""
    if isinstance(value, dict):
        return {key: without_nan(x) for key, x in value.items()}
    if isinstance(value, list):
        return [without_nan(x) for x in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def objective_rows(report: dict, fused: str = "p") -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table, one row an objective; `fused` says all in one number."""
    oracle = "world" in report
    header = ["objective", "rate", "AUC of item rate", "AUC"]
    header += ["AUC of the world", "without mood"] if oracle else []
    header += [
        "GAUC",
        *(["GAUC of the world"] if oracle else []),
        f"AUC of {fused}",
        f"GAUC of {fused}",
        "ECE",
    ]
    rows = []
    for name, result in report["test"].items():
        world = report.get("world", {}).get("oracle", {}).get(name, {})
        row = [name, *(_number(result[x]) for x in ("rate", "item_rate_auc", "auc"))]
        row += [_number(world.get(x)) for x in ("auc", "auc_without_mood")] if oracle else []
        row += [_number(result["gauc"])] + ([_number(world.get("gauc"))] if oracle else [])
        row += [_number(result["p_auc"]), _number(result["p_gauc"])]
        rows.append([*row, _number(result["calibration"]["error"])])
    return header, rows


def weight_rows(report: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the search: AUC of p on validation exposures under each set of weights."""
    names, base = report["objectives"], report["search"]["auc"][0]
    header, rows = ["label weights", *names], []
    for i, candidate in enumerate(report["search"]["names"]):
        auc = report["search"]["auc"][i]
        cells = []
        for x, b in zip(auc, base, strict=True):
            cells.append(_number(x) + (f" ({x - b:+.4f})" if i and x is not None else ""))
        rows.append([candidate + (" (kept)" if i == report["search"]["kept"] else ""), *cells])
    return header, rows


def world_rows(report: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the correlations with what the world expects."""
    parts = report["world"]["correlation"]
    header = ["Spearman with the expected", *parts]
    names = next(iter(parts.values()))
    return header, [[name, *(_number(part[name]) for part in parts.values())] for name in names]


def world_part(report: dict) -> list[str]:
    """Lines of Markdown on what the world expects; none without a world."""
    if "world" not in report:
        return []
    return [
        "## Against the world",
        "",
        markdown_table(*world_rows(report)),
        "The AUC of the world is that of its own probabilities, which know each session's "
        "mood: nobody who has only seen the log can reach it. Without mood: of their mean over "
        "the moods that the user may be in then, with everything else known.",
        "",
    ]


def training_part(report: dict) -> list[str]:
    """Lines of Markdown on how long what took."""
    return [
        "## Training",
        "",
        f"![training]({report['plots'][1]}.png)",
        "",
        "| stage | s |",
        "| --- | ---: |",
        *(f"| {stage} | {seconds:.1f} |" for stage, seconds in report["seconds"].items()),
        "",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "",
    ]


def markdown(report: dict) -> str:
    """The report in words, tables and plots."""
    data, model, parts = report["dataset"], report["model"], report["exposures"]
    lines = [
        f"# Preference score on {data['name']}",
        "",
        f"`{report['command']}`",
        "",
        f"{data['users']:,} users, {data['items']:,} items; exposures in time order: "
        f"{parts['train']:,} to train on ({report['share']}), {parts['valid']:,} to choose by, "
        f"{parts['test']:,} to test. {model['parameters']:,} parameters, best step "
        f"{model['best_step']}, {model['compute_dtype']}.",
        "",
        *(line for note in report["notes"] for line in (note, "")),
        "## Test",
        "",
        markdown_table(*objective_rows(report)),
        "GAUC: AUC within a user, mean over users with both kinds of label, weighted by their "
        "exposures. AUC of item rate: by the item's share of positive labels in training, whoever "
        "the user is. ECE: mean distance of prediction and rate over bins of equal size. p is "
        "trained against every label at once.",
        "",
        f"![calibration]({report['plots'][0]}.png)",
        "",
    ]
    lines += world_part(report)
    weights = ", ".join(f"{k} {v:.3g}" for k, v in report["weights"].items())
    lines += [
        "## Label weights",
        "",
        markdown_table(*weight_rows(report)),
        "AUC of p on validation exposures. Kept: the highest mean among the weights under which no "
        f"objective falls below the first row. Now: {weights}.",
        "",
        *training_part(report),
    ]
    return "\n".join(lines)


def session_markdown(report: dict) -> str:
    """The report of a session reward in words, tables and plots."""
    data, model, parts = report["dataset"], report["model"], report["sessions"]
    scale = report["scale"]
    rows = [
        [name, *(_number(scale[k][name]) for k in ("mean", "deviation"))]
        for name in report["objectives"]
    ]
    swt = "" if report["watch_s"] is None else f"at least {report['watch_s']:.1f} s watched in all"
    rules = {
        "swt": swt,
        "vtr": f"effective views of {report['labels']['effective_view_s']:g} s, at least "
        f"{report['labels']['view_share']:.0%} of the items",
        "wtr": "a follow",
        "ltr": "a like",
    }
    return "\n".join(
        [
            f"# Session reward on {data['name']}",
            "",
            f"`{report['command']}`",
            "",
            f"{data['users']:,} users, {data['items']:,} items; lists of {report['items']} items "
            f"shown in one session, in time order: {parts['train']:,} to train on "
            f"({report['share']}), {parts['valid']:,} to choose by, {parts['test']:,} to test. "
            f"{model['parameters']:,} parameters, best step {model['best_step']}, "
            f"{model['compute_dtype']}.",
            "",
            *(line for note in report["notes"] for line in (note, "")),
            "## Test",
            "",
            markdown_table(*objective_rows(report, "the reward")),
            "; ".join(f"{name}: {rules[name]}" for name in report["objectives"])
            + ". The reward: sum of the heads, each less its mean and over its deviation, below. "
            "GAUC: AUC within a user, mean over users with both kinds of label, weighted by their "
            "lists. AUC of item rate: by the mean of the items' shares of positive lists in "
            "training, whoever the user is. ECE: mean distance of prediction and rate over bins of "
            "equal size.",
            "",
            f"![calibration]({report['plots'][0]}.png)",
            "",
            *world_part(report),
            "## Scale of the heads, validation",
            "",
            markdown_table(["head", "mean", "deviation"], rows),
            *training_part(report),
        ]
    )


def draw_plots(folder: pathlib.Path, report: dict, rows: list[dict]) -> list[str]:
    """Writes calibration and training curves as PNG; returns their names.

    Args:
      rows: of `metrics.jsonl`.
    """
    from matplotlib.figure import Figure  # no pyplot: a notebook keeps its backend

    names = report["objectives"]
    figure = Figure(figsize=(2.6 * len(names), 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        found = report["test"][name]["calibration"]
        top = 1.05 * max(*found["predicted"], *found["observed"], 1e-6)
        axis.plot([0, top], [0, top], color="grey", linewidth=0.8, linestyle=":")
        axis.plot(found["predicted"], found["observed"], "o-", markersize=3, linewidth=1)
        axis.set(title=name, xlabel="predicted", xlim=(0, top), ylim=(0, top))
    figure.axes[0].set_ylabel("observed")
    figure.savefig(folder / "calibration.png", dpi=120)

    figure = Figure(figsize=(8, 3), layout="constrained")
    loss, auc = figure.subplots(1, 2)
    train = [row for row in rows if "loss_objective" in row]
    checks = [row for row in rows if row.get("validation")]
    for i, name in enumerate(names):
        curve = np.array([row["loss_objective"][i] for row in train])
        # Rates differ by orders of magnitude: each curve against where it began.
        loss.plot([row["step"] for row in train], curve / curve[0], label=name)
        auc.plot([row["step"] for row in checks], [row.get(f"auc_{name}") for row in checks], "o-")
    loss.set(xlabel="step", ylabel="loss, against the first row")
    auc.set(xlabel="step", ylabel="validation AUC")
    loss.legend()
    figure.savefig(folder / "training.png", dpi=120)
    return ["calibration", "training"]
