"""What the commands that train a reward share: what it learns from, whose share, how it is run."""

import dataclasses
import importlib.metadata
import json
import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import Any

import jax
import rich.console
import rich.table

from experiments.evaluate import PACKAGES
from experiments.stage import RUNS, checked_mesh, seconds_of_training
from onerec_jax import cli
from onerec_jax.config import ModelConfig
from onerec_jax.data.exposures import has_exposures
from onerec_jax.data.features import build_feature_spec, positive_actions
from onerec_jax.data.schema import Dataset, load_dataset
from onerec_jax.data.splits import Split, make_split
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.evaluation import reward_report
from onerec_jax.files import read_json, write_text
from onerec_jax.inputs import FeatureConfig, FeatureSpec, PositiveRule
from onerec_jax.models.onerec import resolve_dtype
from onerec_jax.reward_run import ExposureRun
from onerec_jax.run import Run, settings_hash
from onerec_jax.sharding import MeshConfig
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.training.loop import LoopConfig
from onerec_jax.training.optimizer import OptimizerConfig

# ------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class RewardSourceConfig:
    """Settings of every reward; each has `model`, `labels` and `evaluation` of its own beside."""

    run: pathlib.Path | None = None
    """Run of experiments.pretrain whose data set, semantic IDs and features it shares."""
    data: pathlib.Path | None = None
    """Data set folder from experiments.prepare, in place of --run."""
    semantic_ids: pathlib.Path | None = None
    """Folder from experiments.tokenize, with --data."""
    out: pathlib.Path | None = None
    """Run folder to write; default: runs/DATA-KIND-HASH, one for each set of flags."""
    seed: int = 0
    judge: bool = False
    """Train the judge: from other exposures, another seed and another shape, to tell whether a
    policy gains with whom it is measured by or only with whom it was trained by."""
    judge_share: float = 0.25
    """Share of the training exposures that is the judge's and not the reward model's."""
    train: LoopConfig = LoopConfig(
        batch_size=32, steps=10_000, log_every=100, validate_every=500, patience=3
    )
    """A user of a step is what the command trains on: a block of exposures, or a list."""
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=4e-3, warmup_steps=200, weight_decay=0.05
    )
    positive: PositiveRule = PositiveRule()
    """With --data: what the features count as positive feedback."""
    features: FeatureConfig = FeatureConfig()
    """With --data: how columns of many values are embedded."""
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    """The latest exposures are the test, those before them choose the step and what else is to be
    chosen."""
    mesh: MeshConfig = MeshConfig()
    deterministic: bool = False
    """On a GPU: the same bits every time, by slower kernels."""

    def __post_init__(self):
        require_at_least(self, "", seed=0, judge_share=0)
        if self.judge_share >= 1 or (self.judge and self.judge_share == 0):
            whom = "the judge" if self.judge else "the reward model"
            raise InputError(
                f"--judge-share {self.judge_share} leaves {whom} no exposure: give more than 0 and "
                "less than 1"
            )
        held_out = self.valid_fraction + self.test_fraction
        if min(self.valid_fraction, self.test_fraction) <= 0 or held_out >= 1:
            raise InputError(
                f"--valid-fraction {self.valid_fraction} and --test-fraction {self.test_fraction} "
                "leave a part empty: both above 0, together below 1"
            )
        if self.train.accumulate > 1:
            raise InputError("--train.accumulate is not for the reward: lower --train.batch-size")

    @property
    def share(self) -> str:
        """Whose training exposures: "all", "reward" or "judge"."""
        if self.judge:
            return "judge"
        return "reward" if self.judge_share else "all"


JUDGE_MODEL: dict[str, Any] = {
    "d_model": 48,
    "num_heads": 3,
    "history_length": 128,
    "top_k": 16,
    "recent_length": 16,
    "shared_dims": (128, 64),
}
"""What --judge changes in the defaults of --model, for either reward."""
JUDGE_SEED = 1
"""Its default for --seed."""


# --------------------------------------------------------------------------------------- stages


@dataclasses.dataclass(frozen=True)
class Source:
    """What the reward model learns from."""

    data_folder: pathlib.Path
    ids_folder: pathlib.Path
    dataset: Dataset
    ids: SemanticIds
    spec: FeatureSpec
    targets: str
    """What the policy is tested on, "all" or "positive" actions; none of it is trained on here."""

    @property
    def split(self) -> Split:
        eligible = None
        if self.targets == "positive":
            eligible = positive_actions(self.dataset, self.spec.positive)
        return make_split(self.dataset, eligible)


def find_source(config: RewardSourceConfig) -> Source:
    """Data set, semantic IDs and features: those of a run, or as named."""
    if (config.run is None) == (config.data is None):
        raise InputError("give --run, or --data with --semantic-ids: what to learn from")
    if (config.data is None) != (config.semantic_ids is None):
        raise InputError("--data and --semantic-ids belong together: give both, or --run")
    if config.run is not None:
        run = Run.open(config.run)
        folders = (pathlib.Path(run.config[part]["folder"]) for part in ("data", "semantic_ids"))
        # The history is searched action by action: clusters would hide what is looked for.
        spec = dataclasses.replace(run.spec, clustered=False)
        targets = run.config["settings"].get("targets", "all")
        return Source(*folders, run.dataset, run.ids, spec, targets)
    dataset, ids = load_dataset(config.data), SemanticIds.load(config.semantic_ids)
    if ids.manifest["dataset_fingerprint"] != dataset.fingerprint:
        raise InputError(
            f"--semantic-ids {config.semantic_ids} were made for another data set than "
            f"{config.data}: run experiments.tokenize on it"
        )
    spec = build_feature_spec(dataset, make_split(dataset), ids, config.positive, config.features)
    return Source(config.data, config.semantic_ids, dataset, ids, spec, "all")


def settings(config: RewardSourceConfig, source: Source, *apart: str) -> dict:
    """All that the result depends on and that every reward has; the mesh may change between
    sessions.

    Args:
      apart: further fields that are left out.
    """
    values = dataclasses.asdict(config)
    # Where data and IDs lie and how they were made matters through fingerprints.
    made = ("run", "data", "semantic_ids", "out", "mesh", "evaluation", "positive", "features")
    for name in (*made, "judge", *apart):
        del values[name]
    return values | {
        "features": settings_hash(json.loads(source.spec.to_json())),
        "targets": source.targets,
        "share": config.share,
    }


def create(config: RewardSourceConfig, source: Source, kind: type[ExposureRun], name, values):
    """Creates or continues a run folder.

    Args:
      name: of the folder, between data set and hash.
      values: the settings, with `stage`.
    """
    values, dataset = json.loads(json.dumps(values)), source.dataset
    key = values | {"data": dataset.fingerprint, "semantic_ids": source.ids.fingerprint}
    return kind.create(
        config.out or RUNS / f"{dataset.name}-{name}-{settings_hash(key)}",
        settings=values,
        command=shlex.join(["python", "-m", f"experiments.{kind.stage}", *sys.argv[1:]]),
        data_folder=source.data_folder,
        ids_folder=source.ids_folder,
        dataset=dataset,
        ids=source.ids,
        spec=source.spec,
    )


def check_batch_size(config: RewardSourceConfig, number: int, what: str) -> None:
    """Refuses a batch larger than what there is to train on, before a folder is made."""
    if config.train.batch_size > number:
        raise InputError(
            f"--train.batch-size {config.train.batch_size} is larger than the {number} {what}: "
            f"lower it to {number} or less"
        )


def about(run: ExposureRun, variables) -> dict:
    """What the report of every reward begins with."""
    return {
        "command": run.config["command"],
        "dataset": {"name": run.dataset.name, **run.dataset.counts},
        "notes": notes(run),
        "share": run.config["settings"]["share"],
        "objectives": list(run.objectives),
        "model": {
            "parameters": sum(x.size for x in jax.tree.leaves(variables["params"])),
            "best_step": run.best_step,
            "compute_dtype": resolve_dtype(run.model_config.compute_dtype).name,
        },
    }


def notes(run: ExposureRun) -> list[str]:
    """What a reader has to know of the data."""
    if has_exposures(run.dataset):
        return []
    return [
        "**This data set holds no exposures, only items that users chose to act on (rate, buy).** "
        "What was shown and ignored is not in it, so the score tells liked from less liked among "
        "what somebody would pick anyway, and says little of an arbitrary item."
    ]


def write_report(run: ExposureRun, result: dict, markdown: Callable[[dict], str]) -> dict:
    """Completes a report and writes report.json, report.md and plots."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    result = reward_report.without_nan(result | {"versions": versions})
    result["plots"] = reward_report.draw_plots(run.folder, result, run.metrics.read())
    write_text(run.folder / "report.md", markdown(result))
    write_text(run.folder / "report.json", json.dumps(result, indent=1))
    return result


def show_tables(notes: list[str], tables: dict) -> None:
    """Prints tables, given as title -> (header, rows), and what they need to be read."""
    console = rich.console.Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # in a file nothing has to be squeezed
    for note in notes:
        console.print(note.replace("**", ""))
    for title, (header, rows) in tables.items():
        table = rich.table.Table(title=title)
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def run_stages(
    config: RewardSourceConfig, open_run: Callable, train: Callable, evaluate: Callable, show
) -> None:
    """Data, training, test.

    Args:
      open_run: config, source -> run.
      train: config, run, mesh -> as `fit` returns.
      evaluate: config, run, seconds -> report.
      show: prints a report.
    """
    if config.deterministic:
        cli.use_deterministic_kernels()
    sizes = ModelConfig(d_model=config.model.d_model, num_heads=config.model.num_heads)
    mesh = checked_mesh(config, sizes)
    run = open_run(config, find_source(config))
    path = run.folder / "report.json"
    result = read_json(path) if path.exists() else None
    if result is not None and result["evaluation"] == dataclasses.asdict(config.evaluation):
        print(f"{run.folder} is finished: showing its report")
    else:
        seconds = {"train": seconds_of_training(run, lambda: train(config, run, mesh))}
        result = evaluate(config, run, seconds)
    show(result)
    print(f"\neverything lies in {run.folder}: report.md, report.json, plots, checkpoints")


def command_line(main, config_type: type, judge: dict, name: str, argv: list[str] | None) -> None:
    """The command line of the stage `name`.

    Args:
      judge: what --judge changes in the defaults.
    """
    argv = sys.argv[1:] if argv is None else argv
    default = config_type(**(judge if "--judge" in argv else {}))
    cli.run(main, config_type, prog=f"python -m experiments.{name}", default=default, argv=argv)
