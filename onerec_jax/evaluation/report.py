"""Results as a table, as Markdown and as plots."""

import pathlib
from collections.abc import Iterable

import numpy as np

METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
NAMES = {
    "popularity": "popularity",
    "markov": "Markov chain",
    "sasrec_ce": "SASRec, full softmax",
}


def result_rows(report: dict, suffix: str = "") -> list[tuple[str, dict]]:
    """(name, metrics) of OneRec and the baselines; `suffix` "_exclude_seen" for that protocol."""
    test = report[f"test{suffix}"]
    rows = [("OneRec, items", test["item"])]
    if "id" in test:
        rows.append(("OneRec, semantic IDs", test["id"]))
    baselines = report.get(f"baselines{suffix}", {})
    return rows + [(NAMES[name], result) for name, result in baselines.items()]


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, the first column to the left."""
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(result: dict, name: str) -> str:
    low, high = result[f"{name}_ci95"]
    return f"{result[name]:.4f} [{low:.4f}, {high:.4f}]"


def rich_table(report: dict, suffix: str = ""):
    """The results as a table for the terminal."""
    import rich.table

    title = f"{report['dataset']['name']}: test, mean over users and 95% interval"
    table = rich.table.Table(title=title + (", seen items excluded" if suffix else ""))
    table.add_column("model", no_wrap=True)
    for name in ("recall@10", "ndcg@10"):
        table.add_column(name, justify="right")
        table.add_column("", no_wrap=True)  # its interval; 80 columns in all
    for model, result in result_rows(report, suffix):
        cells = []
        for name in ("recall@10", "ndcg@10"):
            low, high = result[f"{name}_ci95"]
            cells += [f"{result[name]:.4f}", f"\\[{low:.3f}, {high:.3f}]"]
        table.add_row(model, *cells)
    return table


def sasrec_budget(sasrec: dict) -> str:
    """One sentence on what the baseline was given."""
    rising = "was still rising" if sasrec["still_rising"] else "had stopped rising"
    return (
        f"SASRec's budget: {sasrec['epochs']} epochs, {sasrec['seconds']:.0f} s, best epoch "
        f"{sasrec['best_epoch']}; validation {rising} at the end."
    )


def markdown(report: dict) -> str:
    """The report in words, tables and plots."""
    data, model, test = report["dataset"], report["model"], report["test"]
    lines = [
        f"# OneRec on {data['name']}",
        "",
        f"`{report['command']}`",
        "",
        f"{data['users']:,} users, {data['items']:,} items, {data['interactions']:,} actions; "
        f"split {data['split']}. Preset {model['preset']}, {model['parameters']:,} parameters, "
        f"{model['train_flops'] / 1e6:,.0f} MFLOP a training example, {model['compute_dtype']}.",
        "",
    ]
    for suffix, heading in (("", "Test"), ("_exclude_seen", "Test, seen items excluded")):
        if f"test{suffix}" not in report:
            continue
        lines += [f"## {heading}", "", "| model | " + " | ".join(METRICS) + " |"]
        lines += ["| --- |" + " --- |" * len(METRICS)]
        for name, result in result_rows(report, suffix):
            cells = " | ".join(_cell(result, metric) for metric in METRICS)
            lines.append(f"| {name} | {cells} |")
        lines.append("")
    lines += [
        "Mean over users and 95% percentile bootstrap. Items: the whole catalogue is ranked; items "
        "that share an ID come by popularity, then id. Semantic IDs: a hit on the target's ID.",
        "",
        f"Of the {test['beam_width']} beams that each user gets without the trie "
        f"{test['legality_unmasked']:.1%} are IDs that exist. The top "
        f"tens of all users hold {test['coverage']:.1%} of the catalogue; the mean one has "
        f"{test['prefixes'][0]:.1f} different first codes and "
        f"{test['prefixes'][:2][-1]:.1f} different pairs of the first two.",
        "",
    ]
    if report.get("paired"):
        lines += [
            "## OneRec minus baseline, same users",
            "",
            "| baseline | Recall@10 | 95% interval |",
            "| --- | --- | --- |",
        ]
        for name, paired in report["paired"].items():
            low, high = paired["ci95"]
            lines.append(
                f"| {NAMES[name]} | {paired['difference']:+.4f} | [{low:+.4f}, {high:+.4f}] |"
            )
        lines.append("")
    if "sasrec" in report:
        lines += [sasrec_budget(report["sasrec"]), ""]
    lines += ["## Training", ""]
    lines += [f"![{name}]({name}.png)" for name in report["plots"]]
    lines += ["", "## Seconds", "", "| stage | s |", "| --- | --- |"]
    lines += [f"| {stage} | {seconds:.1f} |" for stage, seconds in report["seconds"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join([*lines, "", versions, ""])


def draw_plots(folder: pathlib.Path, report: dict, rows: list[dict], sids, codebook_size) -> list:
    """Writes loss, recall, code usage and expert load as PNG; returns their names.

    Args:
      rows: of `metrics.jsonl`.
      sids: int32 `[items, levels]`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = []

    def save(figure, name):
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)
        names.append(name)

    train = [row for row in rows if "loss_level" in row]
    steps = [row["step"] for row in train]
    figure, axis = plt.subplots(figsize=(6, 3.5))
    for level, values in enumerate(zip(*(row["loss_level"] for row in train), strict=True)):
        axis.plot(steps, values, label=f"level {level + 1}")
    axis.axhline(np.log(codebook_size), color="grey", linewidth=0.8, linestyle=":", label="uniform")
    axis.set(xlabel="step", ylabel="training loss (nats a code)", ylim=(0, None))
    axis.legend()
    save(figure, "loss")

    results = result_rows(report)
    figure, axis = plt.subplots(figsize=(6, 2.8))
    means = np.array([result["recall@10"] for _, result in results])
    bounds = np.array([result["recall@10_ci95"] for _, result in results])
    colors = ["tab:blue", "lightsteelblue", *["grey"] * len(results)][: len(results)]
    errors = np.abs(bounds - means[:, None]).T
    axis.barh([name for name, _ in results], means, xerr=errors, color=colors, capsize=3)
    axis.invert_yaxis()
    axis.set_xlabel("test Recall@10, 95% interval over users")
    save(figure, "recall")

    levels = sids.shape[1]
    figure, axes = plt.subplots(1, levels, figsize=(3 * levels, 2.8), sharey=True, squeeze=False)
    for level, axis in enumerate(axes[0]):
        counts = np.sort(np.bincount(sids[:, level], minlength=codebook_size))[::-1]
        axis.bar(np.arange(codebook_size), counts, width=1.0)
        axis.axhline(len(sids) / codebook_size, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=f"level {level + 1}", xlabel="codes by use")
    axes[0, 0].set_ylabel("items")
    save(figure, "codes")

    if train and "load" in train[-1]:
        loads = np.array([row["load"] for row in train])  # [rows, layers, experts]
        layers = loads.shape[1]
        figure, axes = plt.subplots(
            1, layers, figsize=(3.2 * layers, 2.8), sharey=True, squeeze=False
        )
        for layer, axis in enumerate(axes[0]):
            axis.plot(steps, loads[:, layer], linewidth=1)
            axis.axhline(1 / loads.shape[2], color="grey", linewidth=0.8, linestyle=":")
            axis.set(title=f"decoder layer {layer + 1}", xlabel="step", ylim=(0, None))
        axes[0, 0].set_ylabel("share of tokens an expert")
        save(figure, "experts")
    return names
