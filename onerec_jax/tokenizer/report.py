"""How good semantic IDs are: numbers, plots, and what the codes mean in words.

Measures of OneRec Technical Report (arXiv 2506.13695), section 4.4 and Table 11, and those that
users of tokenizers ask for: collisions, fan-out, neighbours kept, stability, readable codes.

Axes: N items, D width, L levels, K codes a level.
"""

import collections
import pathlib
import re

import numpy as np

from onerec_jax.tokenizer.semantic_ids import SemanticIds, sid_keys

BLOCK = 1 << 16
"""Items whose reconstruction is made at once."""
NEIGHBOURS = 10
QUERIES, CANDIDATES = 1000, 100_000
"""Items, drawn by a fixed seed, whose neighbours are compared, and among how many."""
EXAMPLE_LENGTH = 80
"""Letters of an example's title or text."""


# --------------------------------------------------------------------------------------- numbers


def code_usage(codes_nl, codebook_size: int) -> dict:
    """How evenly the codes of every level are used; lists have one value a level.

    Returns:
      `utilisation` (share of the codebook in use), `entropy` (nats), `normalised_entropy` (of the
      largest possible, ln K), `gini` (0: all codes alike; 1: one code has all), `largest_code`
      (share of the items under the commonest code).
    """
    usage = collections.defaultdict(list)
    for level in range(codes_nl.shape[1]):
        count = np.sort(np.bincount(codes_nl[:, level], minlength=codebook_size))
        share = count / count.sum()
        used = share[share > 0]
        entropy = float(-(used * np.log(used)).sum())
        rank = 2 * np.arange(1, len(share) + 1) - len(share) - 1
        usage["utilisation"].append(float(len(used) / codebook_size))
        usage["entropy"].append(entropy)
        usage["normalised_entropy"].append(float(entropy / max(np.log(codebook_size), 1e-9)))
        usage["gini"].append(float((rank * share).sum() / len(share)))
        usage["largest_code"].append(float(share[-1]))
    return dict(usage)


def id_usage(sids_nl, codebook_size: int) -> dict:
    """How many items share an ID, and how the tree of prefixes branches.

    Returns:
      `distinct_ids`, `collision_rate` (1 - distinct / items), `largest_collision` (items on one
      ID), and a level `fan_out_mean` and `fan_out_max`: codes that follow a prefix.
    """
    mean, most, parents = [], [], 1
    for level in range(sids_nl.shape[1]):
        nodes = np.unique(sid_keys(sids_nl[:, : level + 1], codebook_size))
        children = np.unique(nodes // codebook_size, return_counts=True)[1]
        mean.append(float(len(nodes) / parents))
        most.append(int(children.max()))
        parents = len(nodes)
    count = np.unique(sid_keys(sids_nl, codebook_size), return_counts=True)[1]
    return {
        "distinct_ids": len(count),
        "collision_rate": float(1 - len(count) / len(sids_nl)),
        "largest_collision": int(count.max()),
        "fan_out_mean": mean,
        "fan_out_max": most,
    }


def reconstruction(x_nd, codes_nl, decode) -> dict:
    """Mean squared error of the vectors that codes stand for.

    Args:
      decode: int32 `[B, L]` -> float32 `[B, D]`.

    Returns:
      `reconstruction_loss` (a dimension, of the vectors as given) and
      `reconstruction_loss_normalised` (of the error of saying the mean for every item: 0 is
      perfect, 1 is no better than the mean).
    """
    error = spread = 0.0
    mean_d = np.mean(x_nd, axis=0, dtype=np.float64)
    for begin in range(0, len(x_nd), BLOCK):
        x_bd = np.asarray(x_nd[begin : begin + BLOCK], np.float32)
        rest_bd = x_bd - decode(codes_nl[begin : begin + BLOCK])
        error += float((rest_bd.astype(np.float64) ** 2).sum())
        spread += float(((x_bd - mean_d) ** 2).sum())
    return {
        "reconstruction_loss": error / np.size(x_nd),
        "reconstruction_loss_normalised": error / max(spread, 1e-30),
    }


def neighbours_kept(x_nd, codes_nl, decode, seed: int = 0) -> float:
    """Share of an item's 10 nearest neighbours by vector that are so by reconstruction too.

    Up to 1,000 items, among up to 100,000 candidates, by Euclidean distance.
    """
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(x_nd), min(len(x_nd), CANDIDATES), replace=False))
    queries = np.sort(rng.choice(len(rows), min(len(rows), QUERIES), replace=False))
    most = min(NEIGHBOURS, len(rows) - 1)
    if most < 1:
        return 1.0
    near = [
        nearest_rows(y, queries, most)
        for y in (np.asarray(x_nd[rows], np.float32), decode(codes_nl[rows]))
    ]
    same = [len(np.intersect1d(a, b)) for a, b in zip(*near, strict=True)]
    return float(np.mean(same) / most)


def nearest_rows(x_nd, queries, most: int, *, ordered: bool = False) -> np.ndarray:
    """The `most` nearest other rows of some rows, by Euclidean distance. `[len(queries), most]`.

    Args:
      ordered: nearest first.
    """
    norm_n = (x_nd**2).sum(-1)
    near = np.empty((len(queries), most), np.int64)
    for begin in range(0, len(queries), 256):
        block = queries[begin : begin + 256]
        distance = norm_n - 2 * x_nd[block] @ x_nd.T
        distance[np.arange(len(block)), block] = np.inf
        found = np.argpartition(distance, most - 1, axis=1)[:, :most]
        if ordered:
            order = np.argsort(np.take_along_axis(distance, found, axis=1), axis=1)
            found = np.take_along_axis(found, order, axis=1)
        near[begin : begin + 256] = found
    return near


def quality(x_nd, sids_nl, codes_nl, codebook_size: int, decode) -> dict:
    """All numbers of one reading of the codes.

    Args:
      x_nd: float `[N, D]`, the vectors that were quantised.
      sids_nl: int32 `[N, L]` or, with an appended code, `[N, L + 1]`: the IDs.
      codes_nl: int32 `[N, L]`: the codes whose use and reconstruction is measured.
      decode: int32 `[B, L]` -> float32 `[B, D]`, the vectors that codes stand for.
    """
    return {
        **reconstruction(x_nd, codes_nl, decode),
        **code_usage(codes_nl, codebook_size),
        **id_usage(sids_nl, codebook_size),
        "neighbours_kept": neighbours_kept(x_nd, codes_nl, decode),
    }


def agreement(first_n, second_n) -> float:
    """How far two ways to group the same items agree: adjusted mutual information, 1 = the same."""
    from sklearn.metrics import adjusted_mutual_info_score

    return float(adjusted_mutual_info_score(first_n, second_n))


# ----------------------------------------------------------------------------------------- words


def readable_codes(ids: SemanticIds, texts, titles=None, codes: int = 8, items: int = 4) -> list:
    """What the commonest first codes are about.

    Args:
      texts: text of every item, None where it has none.
      titles: what to show of an item; its text if there is no title.

    Returns:
      A list of `code`, `items` (how many), `words` (those that tell the code from the others, by
      how much commoner they are in it) and `examples`.
    """
    rng = np.random.default_rng(0)
    sample = np.sort(rng.choice(len(texts), min(len(texts), CANDIDATES), replace=False))
    words_of = {
        row: frozenset(re.findall(r"\w\w+", (texts[row] or "").lower())) for row in sample.tolist()
    }
    overall = collections.Counter(word for words in words_of.values() for word in words)
    first_n = ids.sids[:, 0]
    commonest = np.argsort(-np.bincount(first_n, minlength=ids.codebook_size), kind="stable")
    shown = []
    for code in commonest[:codes]:
        rows = np.flatnonzero(first_n == code)
        if not len(rows):
            break
        known = [words_of[row] for row in rows.tolist() if row in words_of]
        here = collections.Counter(word for words in known for word in words)
        expected = len(known) / len(sample)
        score = {
            word: count / len(known) * np.log(count / (overall[word] * expected))
            for word, count in here.items()
        }
        best = sorted(score, key=lambda word: (-score[word], word))[:6]
        # Examples spread over the second code, so that they show what the first one holds.
        spread = rows[np.argsort(ids.sids[rows, min(1, ids.levels - 1)], kind="stable")]
        chosen = spread[np.linspace(0, len(spread) - 1, min(items, len(spread))).astype(int)]
        lines = {}
        for row in chosen.tolist():
            text = (titles is not None and titles[row]) or texts[row] or "(no text)"
            lines[row] = " ".join(text.split())[:EXAMPLE_LENGTH]
        shown.append(
            {
                "code": int(code),
                "items": len(rows),
                "words": best,
                "examples": [
                    {"id": "-".join(map(str, ids.sids[row])), "text": line}
                    for row, line in lines.items()
                ],
            }
        )
    return shown


# ---------------------------------------------------------------------------------------- output


def level_table(reading: dict, codebook_size: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the numbers by level."""
    header = ["level", "codes used", "entropy", "of ln K", "Gini", "largest", "fan-out", "most"]
    rows = []
    for level in range(len(reading["fan_out_mean"])):
        cells = ["appended"] + [""] * 5
        if level < len(reading["entropy"]):
            cells = [
                f"{level + 1}",
                f"{reading['utilisation'][level]:.1%} of {codebook_size}",
                f"{reading['entropy'][level]:.3f}",
                f"{reading['normalised_entropy'][level]:.3f}",
                f"{reading['gini'][level]:.3f}",
                f"{reading['largest_code'][level]:.2%}",
            ]
        fan_out = f"{reading['fan_out_mean'][level]:.1f}", f"{reading['fan_out_max'][level]}"
        rows.append([*cells, *fan_out])
    return header, rows


def sentences(reading: dict, items: int) -> list[str]:
    """The other numbers of one reading, a line each."""
    return [
        f"{reading['distinct_ids']:,} IDs for {items:,} items; collision rate "
        f"{reading['collision_rate']:.2%}, largest {reading['largest_collision']} items on one ID",
        f"reconstruction loss {reading['reconstruction_loss']:.6g} a dimension, "
        f"{reading['reconstruction_loss_normalised']:.4f} of the variance; "
        f"{reading['neighbours_kept']:.1%} of the 10 nearest neighbours kept",
    ]


READINGS = {
    "stored": "IDs as stored",
    "fitted": "before collisions are resolved",
    "nearest": "nearest centres, as new items are coded",
}


def show(report: dict) -> None:
    """Prints a report."""
    import rich.console
    import rich.table

    console = rich.console.Console(soft_wrap=True, highlight=False, markup=False)
    for name, words in READINGS.items():
        if name not in report["quality"]:
            continue
        reading = report["quality"][name]
        header, rows = level_table(reading, report["codebook_size"])
        table = rich.table.Table(title=f"semantic IDs of {report['dataset']}: {words}")
        for column in header:
            table.add_column(column, justify="left" if column == "level" else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for line in sentences(reading, report["items"]):
            console.print(line)
    if "stability" in report:
        console.print(f"first codes of another seed agree to {report['stability']:.3f} (AMI)")
    for code in report.get("readable", ()):
        console.print(f"\ncode {code['code']}, {code['items']} items: {', '.join(code['words'])}")
        for example in code["examples"]:
            console.print(f"  {example['id']:<16} {example['text']}")


def markdown(report: dict) -> str:
    """The report in words, tables and a plot."""
    lines = [f"# Semantic IDs of {report['dataset']}", ""]
    lines += [f"{report['items']:,} items, {report['vectors']}.", ""]
    for name, words in READINGS.items():
        if name not in report["quality"]:
            continue
        reading = report["quality"][name]
        header, rows = level_table(reading, report["codebook_size"])
        lines += [f"## {words[0].upper()}{words[1:]}", ""]
        lines += ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines += ["", *(f"- {line}" for line in sentences(reading, report["items"])), ""]
    if "stability" in report:
        lines += [
            f"First codes of another seed agree to {report['stability']:.3f} (adjusted mutual "
            "information, 1 = the same groups).",
            "",
        ]
    lines += ["![use of the codes](codes.png)", ""]
    if report.get("readable"):
        lines += ["## What the commonest first codes hold", ""]
    for code in report.get("readable", ()):
        lines += [f"**{code['code']}**, {code['items']} items: {', '.join(code['words'])}", ""]
        lines += [f"- `{example['id']}` {example['text']}" for example in code["examples"]] + [""]
    return "\n".join(lines)


def draw(path: pathlib.Path, ids: SemanticIds, report: dict) -> None:
    """Use of the codes by level, sorted, beside even use; and how many items share an ID."""
    from matplotlib.figure import Figure  # no pyplot: a notebook keeps its backend

    levels, size = len(ids.codebooks), ids.codebook_size
    figure = Figure(figsize=(3 * (levels + 1), 2.8))
    axes = figure.subplots(1, levels + 1, squeeze=False)
    for level, axis in enumerate(axes[0, :levels]):
        count = np.sort(np.bincount(ids.sids[:, level], minlength=size))[::-1]
        axis.fill_between(np.arange(size), count, step="mid")
        axis.axhline(len(ids.sids) / size, color="grey", linewidth=0.8, linestyle=":")
        entropy = report["quality"]["stored"]["normalised_entropy"][level]
        axis.set(title=f"level {level + 1}, entropy {entropy:.3f} ln K", xlabel="codes by use")
        axis.set_ylim(0, None)
    axes[0, 0].set_ylabel("items")
    shared = np.bincount(np.bincount(ids.leaf_of_item))[1:]
    axis = axes[0, levels]
    axis.bar(np.arange(1, len(shared) + 1), shared)
    axis.set(title="collisions", xlabel="items on one ID", ylabel="IDs", yscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
