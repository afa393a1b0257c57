"""What each pathway of the user encoder buys: `python -m experiments.studies.pathways`.

The comparison of OneRec Technical Report (arXiv 2506.13695), Table 2, on the simulated platform:
a plain history of the items one liked, against the four pathways and all their features. Every
arm is trained the same way on the same log; then each generates a list for every test user, and
the platform says what that user is expected to do with each item of the list, there and then.

    python -m experiments.studies.pathways
    python -m experiments.studies.pathways --world.name b \\
        --arms "positive, item" "all four, item" "all four, semantic ID"
"""

import dataclasses
import json
import os
import pathlib

import numpy as np
import rich.console
import rich.table

from experiments import pretrain
from experiments.evaluate import seen_items
from experiments.studies.arms import command_line, run_tasks, trained, world_data
from onerec_jax.config import FEATURES, PATHWAYS, PRESETS
from onerec_jax.data.examples import target_examples
from onerec_jax.data.lifelong import LifelongConfig
from onerec_jax.data.pipeline import PipelineConfig
from onerec_jax.data.schema import Dataset, load_dataset
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.data.world.response import World
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.evaluation.lists import expected_of_lists
from onerec_jax.evaluation.paired import paired_over_seeds
from onerec_jax.evaluation.report import markdown_table
from onerec_jax.files import write_npz, write_text
from onerec_jax.run import Run
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.training.loop import LoopConfig
from onerec_jax.training.optimizer import OptimizerConfig

BASE = "positive, item"
ARMS = {
    BASE: {"pathways": ("positive",), "features": ()},
    "+ features": {"pathways": ("positive",)},
    "+ features, static": {"pathways": ("static", "positive")},
    "+ features, short": {"pathways": ("short", "positive")},
    "+ features, lifelong": {"pathways": ("positive", "lifelong")},
    "all four, item": {},
    "all four, semantic ID": {"history_item": "sid"},
}
"""What an arm changes of a model with all pathways, all features and items by their embeddings."""

METRICS = {
    "watch_s": "watch time, s",
    "watch_ratio": "watch ratio (vtr)",
    "long_view": "long view (lvtr)",
    "like": "like (ltr)",
    "follow": "follow (wtr)",
    "comment": "comment (cmtr)",
    "forward": "forward",
    "hate": "dislike",
    "satisfaction": "satisfaction",
    "recall@10": "Recall@10 of the log",
}
RARE = ("like", "follow", "comment", "forward", "hate")


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Compare user encoders on the simulated platform."""

    world: WorldConfig = WorldConfig(users=2000, items=3000, actions=250)
    """The platform, simulated if its log is not there yet."""
    data: pathlib.Path | None = None
    """Its log from experiments.prepare, in place of --world."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Which to compare; the first is the one that all others are compared with."""
    seeds: int = 3
    list_length: int = 10
    """Items that a user is shown; those of the user's history are left out."""
    runs: pretrain.PretrainConfig = pretrain.PretrainConfig(
        model=dataclasses.replace(
            PRESETS["tiny"], positive_length=128, lifelong_length=64, lifelong_queries=8
        ),
        targets="positive",
        pipeline=PipelineConfig(targets_per_user=8),
        train=LoopConfig(batch_size=32, steps=1500, log_every=250, validate_every=500, patience=0),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=200),
        compression=LifelongConfig(chunk_actions=16),
        validate_users=500,
    )
    """Of every arm, but for what the arm changes."""
    parallel: int = os.cpu_count() or 1
    """Runs at a time, each with its share of the CPU cores."""
    gpus: int = 0
    """GPUs to deal the runs out to; 0: they run where JAX puts them."""
    out: pathlib.Path | None = None
    """Folder of runs and results; default: runs/studies/pathways-NAME."""

    def __post_init__(self):
        require_at_least(self, "", seeds=1, list_length=1, parallel=1, gpus=0)
        for arm in self.arms:
            if arm not in ARMS:
                raise InputError(f"--arms {arm!r}: choose of {', '.join(map(repr, ARMS))}")
        if len(self.arms) < 2:
            raise InputError("--arms needs two arms or more: they are compared")


def find_data(config: StudyConfig) -> pathlib.Path:
    """The folder of the platform's log; simulated if it is not there."""
    if config.data is not None:
        return config.data
    return world_data(config.world)


def arm_config(config: StudyConfig, arm: str, seed: int) -> pretrain.PretrainConfig:
    """Settings of one run."""
    whole = {"pathways": PATHWAYS, "features": FEATURES, "history_item": "item"}
    return dataclasses.replace(
        config.runs,
        model=dataclasses.replace(config.runs.model, **(whole | ARMS[arm])),
        seed=seed,
        data=find_data(config),
        run=config.out / f"{list(ARMS).index(arm)}-{seed}",
    )


def run_arm(config: pretrain.PretrainConfig, list_length: int) -> None:
    """Trains and judges one run; writes `scores.npz` into its folder."""
    run = trained(config)
    scores = judge(run, list_length, batch_size=config.evaluation.batch_size)
    for name, values in scores.items():
        print(f"{name}: {np.nanmean(values):.4f}")
    write_npz(run.folder / "scores.npz", scores)


def judge(run: Run, list_length: int, *, batch_size: int) -> dict[str, np.ndarray]:
    """What the platform expects each test user to do with what the run recommends.

    A user is asked at the test action: in its session, at its place and time.

    Returns:
      METRICS, float64 `[U]`: means over the user's list; NaN where it is empty.
    """
    dataset, test = run.dataset, target_examples(run.split.test_at)
    generator = run.generator(make_mesh(data=1), beam_width=8 * list_length, batch_size=batch_size)
    found = generator.rank(
        run.load_best(), run.builder, test, n=list_length, seen=seen_items(run, test)
    )
    scores = expected_of_lists(dataset, test, found.lists)
    return scores | {"recall@10": (found.item_ranks < min(10, list_length)).astype(float)}


def references(config: StudyConfig, dataset: Dataset, run: Run) -> dict[str, dict[str, float]]:
    """Means of lists that need no model: random and popular items that a user has not seen."""
    test = target_examples(run.split.test_at)
    rng = np.random.default_rng(0)
    popular = np.argsort(run.tie_order)
    lists = {"random": [], "popular": []}
    for seen in seen_items(run, test):
        for name, order in (("random", rng.permutation(dataset.num_items)), ("popular", popular)):
            lists[name].append(order[~np.isin(order, seen)][: config.list_length])
    result = {}
    for name, rows in lists.items():
        scores = expected_of_lists(dataset, test, np.array(rows))
        result[name] = {k: float(np.nanmean(v)) for k, v in scores.items()}
    return result


# --------------------------------------------------------------------------------------- results


def compare(scores: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, dict]]:
    """Every arm against the first: arm -> metric -> `paired_over_seeds`.

    Args:
      scores: arm -> metric -> float `[S, U]`.
    """
    base, *others = scores
    return {
        arm: {m: paired_over_seeds(scores[arm][m], scores[base][m]) for m in METRICS}
        for arm in others
    }


def tables(scores, compared, reference) -> tuple[rich.table.Table, str]:
    """The table for the terminal and for report.md: a row a metric, a column an arm."""
    base = next(iter(scores))
    header = ["expected of the list", *reference, base, *compared]
    rows = []
    for metric, title in METRICS.items():
        digits = 5 if metric in RARE else 4
        row = [title]
        row += [f"{r[metric]:.{digits}f}" if metric in r else "" for r in reference.values()]
        row.append(f"{np.nanmean(scores[base][metric]):.{digits}f}")
        for arm in compared:
            found = compared[arm][metric]
            low, high = (x / found["b"] for x in found["ci95"])
            gain = found["difference"] / found["b"]
            row.append(
                f"{found['a']:.{digits}f} {gain:+.1%} [{low:+.1%}, {high:+.1%}]"
                + ("" if found["agrees"] else " ±")
            )
        rows.append(row)
    table = rich.table.Table(*header)
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    return table, markdown_table(header, rows)


def draw(path: pathlib.Path, compared, base: str) -> None:
    """Gains over the first arm: points are seeds, bars the 95% intervals."""
    from matplotlib.figure import Figure  # no pyplot: a notebook keeps its backend

    shown = ("watch_s", "long_view", "like", "satisfaction")
    figure = Figure(figsize=(3.2 * len(shown), 0.5 * len(compared) + 1.2), layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
        for row, arm in enumerate(compared):
            found = compared[arm][metric]
            low, high = (100 * x / found["b"] for x in found["ci95"])
            axis.plot([low, high], [row, row], color="tab:blue")
            gains = 100 * np.array(found["by_seed"]) / found["b"]
            axis.plot(gains, np.full(len(gains), row), "o", color="tab:blue", alpha=0.6)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(METRICS[metric])
        axis.set_xlabel(f"% over {base}")
        axis.set_yticks(range(len(compared)), list(compared))
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main(config: StudyConfig) -> None:
    """Data, runs, table, plot."""
    data = find_data(config)
    dataset = load_dataset(data)
    world = World.from_meta(dataset.meta)
    out = config.out or pretrain.RUNS / "studies" / f"pathways-{world.config.name}"
    config = dataclasses.replace(config, data=data, out=out)
    # What all runs share is made once, here.
    whole = arm_config(config, "all four, item", 0)
    mesh = make_mesh(data=1)
    ids_folder = pretrain.find_semantic_ids(whole, dataset, mesh)
    pretrain.find_lifelong(whole, dataset, SemanticIds.load(ids_folder))
    runs = {
        (arm, seed): arm_config(config, arm, seed)
        for seed in range(config.seeds)
        for arm in config.arms
    }
    todo = {
        run.run.name: (run, config.list_length)
        for run in runs.values()
        if not (run.run / "scores.npz").exists()
    }
    print(f"{len(todo)} of {len(runs)} runs to do, {config.parallel} at a time; logs in {out}")
    run_tasks(run_arm, todo, parallel=config.parallel, gpus=config.gpus, logs=out / "logs")

    loaded = {key: np.load(run.run / "scores.npz") for key, run in runs.items()}
    scores = {
        arm: {m: np.stack([loaded[arm, s][m] for s in range(config.seeds)]) for m in METRICS}
        for arm in config.arms
    }
    reference = references(config, dataset, Run.open(runs[config.arms[0], 0].run))
    compared = compare(scores)
    table, markdown = tables(scores, compared, reference)
    rich.console.Console(width=60 + 34 * len(compared)).print(table)
    users = scores[config.arms[0]]["like"].shape[1]
    note = (
        f"World {world.config.name} ({world.fingerprint}): {users} users, {config.seeds} seeds. "
        "In brackets 95% intervals over users and seeds of the gain over "
        f"'{config.arms[0]}'; ± where the seeds disagree on its sign."
    )
    print(note)
    record = {
        "config": dataclasses.asdict(config),
        "world": world.meta,
        "references": reference,
        "compared": compared,
    }
    write_text(out / "report.json", json.dumps(record, indent=1, default=str) + "\n")
    write_text(out / "report.md", f"{markdown}\n{note}\n")
    draw(out / "gains.png", compared, config.arms[0])
    print(f"written to {out}")


if __name__ == "__main__":
    command_line(main, StudyConfig, "pathways")
