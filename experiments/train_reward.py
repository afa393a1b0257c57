"""Train the preference score (P-Score): `python -m experiments.train_reward --run RUN`.

Learns from the exposures of a data set how users respond, tests that on the latest of them and
chooses the label weights. A killed or interrupted run goes on when the same command is given again;
a finished one is shown.

    python -m experiments.train_reward --run runs/world-tiny-1a2b3c
    python -m experiments.train_reward --data runs/data/world --semantic-ids runs/ids
    python -m experiments.train_reward --run runs/world-tiny-1a2b3c --judge
"""

import dataclasses
import time

import jax
import numpy as np
from scipy.special import expit

from experiments.reward_source import (
    JUDGE_MODEL,
    JUDGE_SEED,
    RewardSourceConfig,
    Source,
    about,
    check_batch_size,
    command_line,
    create,
    run_stages,
    settings,
    show_tables,
    write_report,
)
from onerec_jax.data.examples import Examples
from onerec_jax.data.exposures import (
    ExposureStream,
    LabelRule,
    check_labels,
    exposure_parts,
    make_blocks,
    objective_labels,
    share_of,
)
from onerec_jax.data.world.response import World
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.evaluation import preference, reward_report
from onerec_jax.models.reward import RewardConfig
from onerec_jax.reward_run import RewardRun
from onerec_jax.rewards.weights import choose_weights, weight_candidates
from onerec_jax.training.loop import fit
from onerec_jax.training.optimizer import make_optimizer
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
class TrainRewardConfig(RewardSourceConfig):
    """Train the preference score on a data set's exposures and test it."""

    objectives: tuple[str, ...] = ()
    """Among ctr, lvtr, vtr, ltr, wtr and cmtr; default: all that the data has."""
    weights: tuple[float, ...] = ()
    """Label weights of p to start the search from, in the order of the objectives above; default: 1
    each. Only ratios matter."""
    weight_factor: float = 4.0
    """What the search raises one objective's weight by; 1 = no search."""
    labels: LabelRule = LabelRule()
    model: RewardConfig = RewardConfig()
    validate_blocks: int = 1000
    """Blocks of exposures in each validation, drawn once by the seed; 0 = all."""
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, "", validate_blocks=0, weight_factor=1)
        if any(not weight > 0 for weight in self.weights):
            raise InputError(f"--weights {self.weights}: all must be above 0")


JUDGE = {"seed": JUDGE_SEED, "model": RewardConfig(**JUDGE_MODEL)}
"""What --judge changes in the defaults."""


# --------------------------------------------------------------------------------------- stages


def open_run(config: TrainRewardConfig, source: Source) -> RewardRun:
    """Creates or continues the run folder."""
    dataset = source.dataset
    labels = objective_labels(dataset, config.labels, config.objectives)
    parts = exposure_parts(dataset, source.split, config.valid_fraction, config.test_fraction)
    blocks = share_of(make_blocks(*parts.train), config.share, config.judge_share)
    check_batch_size(config, len(blocks), "blocks of training exposures")
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
    values = settings(config, source, "weights", "weight_factor") | {
        "stage": RewardRun.stage,
        "objectives": list(labels),
        "weight_names": list(candidates),
        "weights": [weights.tolist() for weights in candidates.values()],
    }
    return create(config, source, RewardRun, "judge" if config.judge else "reward", values)


def make_validation(config: TrainRewardConfig, run: RewardRun):
    """Validation on a fixed sample of blocks: losses, and AUC by objective."""
    blocks = run.blocks("valid")
    if 0 < config.validate_blocks < len(blocks):
        rng = np.random.default_rng(config.seed)
        blocks = blocks[np.sort(rng.choice(len(blocks), config.validate_blocks, replace=False))]
    predict = run.predictor(config.evaluation.batch_size)

    def validate(variables) -> dict[str, float]:
        rows, tower_no, p_nn = predict(variables, blocks)
        return preference.validation_metrics(
            run.objectives, run.labels_no[rows], tower_no, {"auc_p": p_nn[:, 0]}
        )

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
    scores = {name: expit(tower_no[:, i].astype(float)) for i, name in enumerate(run.objectives)}
    scores["p"] = expit(p_nn[:, kept].astype(float))
    labels = dict(zip(run.objectives, run.labels_no[rows].T, strict=True))
    training = run.training_rows
    history = data.item_rows[training], run.labels_no[training]
    tests = preference.held_out_metrics(
        user, data.item_rows[rows], labels, scores, history, data.num_items
    )
    result = about(run, variables) | {
        "exposures": {
            part: int(run.blocks(part).count.sum()) for part in ("train", "valid", "test")
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
    return write_report(run, result, reward_report.markdown)


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
    oracle = preference.oracle_metrics(user, labels, expected, blind)

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
    tables = {
        f"{result['dataset']['name']}: {result['exposures']['test']:,} test exposures": (
            reward_report.objective_rows(result)
        ),
        "AUC of p by label weights, validation": reward_report.weight_rows(result),
    }
    if "world" in result:
        tables["against what the world expects"] = reward_report.world_rows(result)
    show_tables(result["notes"], tables)


# ----------------------------------------------------------------------------------------- main


def main(config: TrainRewardConfig) -> None:
    """Data, training, label weights, test."""
    run_stages(config, open_run, train, evaluate, show)


def run_command(argv: list[str] | None = None) -> None:
    """The command line; `argv` replaces the process's own flags."""
    command_line(main, TrainRewardConfig, JUDGE, "train_reward", argv)


if __name__ == "__main__":
    run_command()
