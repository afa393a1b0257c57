"""Train the preference score (P-Score): `python -m experiments.train_reward --run RUN`.

Learns from the exposures of a data set how users respond, tests that on the latest of them and
chooses the label weights. A killed or interrupted run goes on when the same command is given again;
a finished one is shown.

    python -m experiments.train_reward --run runs/world-tiny-1a2b3c
    python -m experiments.train_reward --data runs/data/world --semantic-ids runs/ids
    python -m experiments.train_reward --run runs/world-tiny-1a2b3c --judge
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shlex
import sys
import time

import jax
import numpy as np
import rich.console
import rich.table

from experiments.evaluate import PACKAGES
from experiments.pretrain import RUNS
from onerec_jax import cli
from onerec_jax.config import ModelConfig
from onerec_jax.data.examples import Examples
from onerec_jax.data.exposures import (
    ExposureStream,
    LabelRule,
    check_labels,
    exposure_parts,
    has_exposures,
    make_blocks,
    objective_labels,
    share_of,
)
from onerec_jax.data.features import build_feature_spec, positive_actions
from onerec_jax.data.schema import Dataset, load_dataset
from onerec_jax.data.splits import make_split
from onerec_jax.data.world.response import World
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.evaluation import preference, reward_report
from onerec_jax.evaluation.classification import auc, gauc
from onerec_jax.files import read_json, write_text
from onerec_jax.inputs import FeatureConfig, FeatureSpec, PositiveRule
from onerec_jax.models.onerec import resolve_dtype
from onerec_jax.models.reward import RewardConfig
from onerec_jax.reward_run import RewardRun
from onerec_jax.rewards.weights import choose_weights, weight_candidates
from onerec_jax.run import Run, settings_hash
from onerec_jax.sharding import MeshConfig, check_mesh, make_mesh
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.training.loop import Interrupted, LoopConfig, fit
from onerec_jax.training.optimizer import OptimizerConfig, make_optimizer
from onerec_jax.training.reward_step import reward_step
from onerec_jax.training.step import Trainer

# ------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Budget of the test."""

    batch_size: int = 64
    """Blocks of exposures, or users, at once."""
    requests: int = 500
    """Users whose unexposed items are judged against a world, if a world made the data."""
    candidates: int = 64
    """Random items of each that the user was never shown."""

    def __post_init__(self):
        require_at_least(self, "evaluation.", batch_size=1, requests=1, candidates=2)


@dataclasses.dataclass(frozen=True)
class TrainRewardConfig:
    """Train the preference score on a data set's exposures and test it."""

    run: pathlib.Path | None = None
    """Run of experiments.pretrain whose data set, semantic IDs and features it shares."""
    data: pathlib.Path | None = None
    """Data set folder from experiments.prepare, in place of --run."""
    semantic_ids: pathlib.Path | None = None
    """Folder from experiments.tokenize, with --data."""
    out: pathlib.Path | None = None
    """Run folder to write; default: runs/DATA-reward-HASH, one for each set of flags."""
    seed: int = 0
    judge: bool = False
    """Train the judge: from other exposures, another seed and another shape, to tell whether a
    policy gains with whom it is measured by or only with whom it was trained by."""
    judge_share: float = 0.25
    """Share of the training exposures that is the judge's and not the reward model's."""
    objectives: tuple[str, ...] = ()
    """Among ctr, lvtr, vtr, ltr, wtr and cmtr; default: all that the data has."""
    weights: tuple[float, ...] = ()
    """Label weights of p to start the search from, in the order of the objectives above; default: 1
    each. Only ratios matter."""
    weight_factor: float = 4.0
    """What the search raises one objective's weight by; 1 = no search."""
    labels: LabelRule = LabelRule()
    model: RewardConfig = RewardConfig()
    train: LoopConfig = LoopConfig(
        batch_size=32, steps=10_000, log_every=100, validate_every=500, patience=3
    )
    """A user of a step is a block of up to 16 exposures of one."""
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=4e-3, warmup_steps=200, weight_decay=0.05
    )
    positive: PositiveRule = PositiveRule()
    """With --data: what the features count as positive feedback."""
    features: FeatureConfig = FeatureConfig()
    """With --data: how columns of many values are embedded."""
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    """The latest exposures are the test, those before them choose step and weights."""
    validate_blocks: int = 1000
    """Blocks of exposures in each validation, drawn once by the seed; 0 = all."""
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()
    deterministic: bool = False
    """On a GPU: the same bits every time, by slower kernels."""

    def __post_init__(self):
        require_at_least(self, "", seed=0, validate_blocks=0, weight_factor=1, judge_share=0)
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
        if any(not weight > 0 for weight in self.weights):
            raise InputError(f"--weights {self.weights}: all must be above 0")


JUDGE = {
    "seed": 1,
    "model": RewardConfig(
        d_model=48,
        num_heads=3,
        history_length=128,
        top_k=16,
        recent_length=16,
        shared_dims=(128, 64),
    ),
}
"""What --judge changes in the defaults."""


def settings(config: TrainRewardConfig, source: "Source", objectives, candidates: dict) -> dict:
    """All that the result depends on, as JSON; the mesh may change between sessions."""
    values = dataclasses.asdict(config)
    # Where data and IDs lie and how they were made matters through fingerprints.
    apart = ("run", "data", "semantic_ids", "out", "mesh", "evaluation", "positive", "features")
    for name in (*apart, "judge", "weights", "weight_factor"):
        del values[name]
    values |= {
        "stage": RewardRun.stage,
        "features": settings_hash(json.loads(source.spec.to_json())),
        "targets": source.targets,
        "share": share(config),
        "objectives": list(objectives),
        "weight_names": list(candidates),
        "weights": [weights.tolist() for weights in candidates.values()],
    }
    return json.loads(json.dumps(values))


def share(config: TrainRewardConfig) -> str:
    """Whose training exposures: "all", "reward" or "judge"."""
    if config.judge:
        return "judge"
    return "reward" if config.judge_share else "all"


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


def find_source(config: TrainRewardConfig) -> Source:
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


def open_run(config: TrainRewardConfig, source: Source) -> RewardRun:
    """Creates or continues the run folder."""
    dataset = source.dataset
    labels = objective_labels(dataset, config.labels, config.objectives)
    eligible = None
    if source.targets == "positive":
        eligible = positive_actions(dataset, source.spec.positive)
    split = make_split(dataset, eligible)
    parts = exposure_parts(dataset, split, config.valid_fraction, config.test_fraction)
    blocks = share_of(make_blocks(*parts.train), share(config), config.judge_share)
    if config.train.batch_size > len(blocks):
        raise InputError(
            f"--train.batch-size {config.train.batch_size} is larger than the {len(blocks)} blocks "
            f"of training exposures: lower it to {len(blocks)} or less"
        )
    training = blocks.rows(dataset.offsets)
    labels, left_out = check_labels(labels, training, config.objectives)
    if left_out:
        print(f"left out, for all training labels are alike: {', '.join(left_out)}")
    if config.weights and len(config.weights) != len(labels):
        raise InputError(
            f"--weights has {len(config.weights)} numbers for the {len(labels)} objectives "
            f"{', '.join(labels)}: give one each"
        )
    rates = [label[training][label[training] >= 0].mean() for label in labels.values()]
    base = config.weights or [1.0] * len(labels)
    candidates = weight_candidates(list(labels), base, rates, config.weight_factor)
    values = settings(config, source, labels, candidates)
    key = values | {"data": dataset.fingerprint, "semantic_ids": source.ids.fingerprint}
    kind = "judge" if config.judge else "reward"
    return RewardRun.create(
        config.out or RUNS / f"{dataset.name}-{kind}-{settings_hash(key)}",
        settings=values,
        command=shlex.join(["python", "-m", "experiments.train_reward", *sys.argv[1:]]),
        data_folder=source.data_folder,
        ids_folder=source.ids_folder,
        dataset=dataset,
        ids=source.ids,
        spec=source.spec,
    )


def make_validation(config: TrainRewardConfig, run: RewardRun):
    """Validation on a fixed sample of blocks: losses, and AUC by objective."""
    blocks = run.blocks("valid")
    if 0 < config.validate_blocks < len(blocks):
        rng = np.random.default_rng(config.seed)
        blocks = blocks[np.sort(rng.choice(len(blocks), config.validate_blocks, replace=False))]
    predict = run.predictor(config.evaluation.batch_size)

    def validate(variables) -> dict[str, float]:
        rows, tower_no, p_nn = predict(variables, blocks)
        label_no, found = run.labels_no[rows], {"loss": 0.0}
        for i, name in enumerate(run.objectives):
            known = label_no[:, i] >= 0
            label, logit = label_no[known, i], tower_no[known, i].astype(float)
            found["loss"] += float(np.mean(np.logaddexp(0, logit) - label * logit))
            for kind, score in (("auc", logit), ("auc_p", p_nn[known, 0])):
                if (value := auc(label, score)) == value:  # there may be one kind of label only
                    found[f"{kind}_{name}"] = value
        return found | {"score": -found["loss"]}

    return validate


def train(config: TrainRewardConfig, run: RewardRun, mesh):
    """Trains to the end or to the early stop, from the latest checkpoint if there is one."""
    blocks = run.blocks("train")
    stream = ExposureStream(
        run.builder, blocks, run.labels_no, config.train.batch_size, config.seed
    )
    trainer = Trainer(
        run.model(train=True),
        make_optimizer(config.optimizer, config.train.steps),
        mesh,
        run.example,
        seed=config.seed,
        step=reward_step,
        weight_no=run.weight_no,
    )
    parameters = sum(x.size for x in jax.tree.leaves(trainer.abstract_state.params))
    print(
        f"training on {', '.join(run.objectives)}: {parameters:,} parameters, "
        f"{blocks.count.sum():,} exposures in {len(blocks):,} blocks, in {run.folder}"
    )
    return fit(
        trainer,
        stream,
        run.checkpoints,
        run.metrics,
        config.train,
        seed=config.seed,
        validate=make_validation(config, run),
    )


# --------------------------------------------------------------------------------------- results


def evaluate(config: TrainRewardConfig, run: RewardRun, seconds: dict) -> dict:
    """Chooses the label weights, tests, writes report.json, report.md and plots."""
    start, data = time.perf_counter(), run.dataset
    variables, predict = run.load_best(), run.predictor(config.evaluation.batch_size)
    rows, _, p_nn = predict(variables, run.blocks("valid"))
    auc_no = preference.auc_by_weights(run.labels_no[rows], p_nn)
    kept = choose_weights(auc_no)
    run.choose(kept)

    rows, tower_no, p_nn = predict(variables, run.blocks("test"))
    user = data.interactions["user_row"].to_numpy()[rows]
    scores = {name: _sigmoid(tower_no[:, i]) for i, name in enumerate(run.objectives)}
    scores["p"] = _sigmoid(p_nn[:, kept])
    labels = dict(zip(run.objectives, run.labels_no[rows].T, strict=True))
    training = run.blocks("train").rows(data.offsets)
    tests = {}
    for i, (name, label) in enumerate(labels.items()):
        tests[name] = preference.objective_metrics(user, label, scores[name], scores["p"])
        rates = preference.item_rates(
            data.item_rows[training], run.labels_no[training, i], data.num_items
        )
        known = label >= 0
        tests[name]["item_rate_auc"] = auc(label[known], rates[data.item_rows[rows[known]]])
    result = {
        "command": run.config["command"],
        "dataset": {"name": data.name, **data.counts},
        "notes": notes(run),
        "share": run.config["settings"]["share"],
        "exposures": {
            part: int(run.blocks(part).count.sum()) for part in ("train", "valid", "test")
        },
        "objectives": list(run.objectives),
        "model": {
            "parameters": sum(x.size for x in jax.tree.leaves(variables["params"])),
            "best_step": run.best_step,
            "compute_dtype": resolve_dtype(run.model_config.compute_dtype).name,
        },
        "test": tests,
        "weights": dict(zip(run.objectives, run.weight_no[kept].tolist(), strict=True)),
        "search": {
            "names": run.config["settings"]["weight_names"],
            "auc": auc_no.tolist(),
            "kept": kept,
        },
        "evaluation": dataclasses.asdict(config.evaluation),
    }
    if "world" in data.meta:
        result["world"] = against_world(config, run, rows, user, labels, scores)
    result["seconds"] = seconds | {"test": time.perf_counter() - start}
    result["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    result = reward_report.without_nan(result)
    result["plots"] = reward_report.draw_plots(run.folder, result, run.metrics.read())
    write_text(run.folder / "report.md", reward_report.markdown(result))
    write_text(run.folder / "report.json", json.dumps(result, indent=1))
    return result


def _sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def notes(run: RewardRun) -> list[str]:
    """What a reader has to know of the data."""
    if has_exposures(run.dataset):
        return []
    return [
        "**This data set holds no exposures, only items that users chose to act on (rate, buy).** "
        "What was shown and ignored is not in it, so the score tells liked from less liked among "
        "what somebody would pick anyway, and says little of an arbitrary item."
    ]


def against_world(config: TrainRewardConfig, run: RewardRun, rows, user, labels, scores) -> dict:
    """The score beside the probabilities of the world that made the data.

    Of test exposures, and of random items that test users were never shown, in the situation of
    each one's first test exposure.
    """
    data, cfg = run.dataset, config.evaluation
    world = World.from_meta(data.meta)
    items = data.item_rows[rows]
    expected = preference.world_expectations(data, world, user, items, rows)
    blind = preference.world_expectations(data, world, user, items, rows, moods=MOODS)
    oracle = {}
    for name in set(labels) & set(expected):
        known = labels[name] >= 0
        label, who = labels[name][known], user[known]
        truth, guess = expected[name][known], blind[name][known]
        oracle[name] = {"auc": auc(label, truth), "gauc": gauc(who, label, truth)[0]}
        oracle[name]["auc_without_mood"] = auc(label, guess)

    start, end = run.parts.test
    users = np.flatnonzero(end > start)
    rng = np.random.default_rng(config.seed)
    users = np.sort(rng.choice(users, min(cfg.requests, len(users)), replace=False))
    items = preference.unexposed_items(data, users, cfg.candidates, config.seed)
    examples = Examples(users.astype(np.int32), start[users].astype(np.int32))
    found = run.scorer(users=min(cfg.batch_size, len(users)))(examples, items)
    grid = np.broadcast_to(users[:, None], items.shape).ravel()
    at = np.broadcast_to((data.offsets[users] + start[users])[:, None], items.shape).ravel()
    truth = preference.world_expectations(data, world, grid, items.ravel(), at)
    return {
        "oracle": oracle,
        "correlation": {
            "test exposures": preference.against_world(expected, scores),
            "unexposed items": preference.against_world(
                truth, {name: x.ravel() for name, x in found.items()}
            ),
            "unexposed, within a user": preference.within_users(
                {name: x.reshape(items.shape) for name, x in truth.items()}, found
            ),
        },
    }


MOODS = 16
"""Sessions whose moods stand for any mood that a user may be in."""


def show(result: dict) -> None:
    """Print the tables and what they need to be read."""
    console = rich.console.Console(soft_wrap=True, highlight=False)
    for note in result["notes"]:
        console.print(note.replace("**", ""))
    tables = {
        f"{result['dataset']['name']}: {result['exposures']['test']:,} test exposures": (
            reward_report.objective_rows(result)
        ),
        "AUC of p by label weights, validation": reward_report.weight_rows(result),
    }
    if "world" in result:
        tables["against what the world expects"] = reward_report.world_rows(result)
    for title, (header, rows) in tables.items():
        table = rich.table.Table(title=title)
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


# ----------------------------------------------------------------------------------------- main


def main(config: TrainRewardConfig) -> None:
    """Data, training, label weights, test."""
    if config.deterministic:
        # Read once, when the backend starts: nothing above may have touched a device.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    sizes = ModelConfig(d_model=config.model.d_model, num_heads=config.model.num_heads)
    check_mesh(mesh, sizes, batch_size=config.train.batch_size)
    run = open_run(config, find_source(config))
    path = run.folder / "report.json"
    result = read_json(path) if path.exists() else None
    if result is not None and result["evaluation"] == dataclasses.asdict(config.evaluation):
        print(f"{run.folder} is finished: showing its report")
    else:
        try:
            _, progress = train(config, run, mesh)
        except Interrupted as interrupted:
            print(f"{interrupted}; the same command goes on from there: {run.config['command']}")
            raise SystemExit(130) from None
        result = evaluate(config, run, {"train": progress.seconds})
    show(result)
    print(f"\neverything lies in {run.folder}: report.md, report.json, plots, checkpoints")


def run_command(argv: list[str] | None = None) -> None:
    """The command line; `argv` replaces the process's own flags."""
    argv = sys.argv[1:] if argv is None else argv
    default = TrainRewardConfig(**(JUDGE if "--judge" in argv else {}))
    prog = "python -m experiments.train_reward"
    cli.run(main, TrainRewardConfig, prog=prog, default=default, argv=argv)


if __name__ == "__main__":
    run_command()
