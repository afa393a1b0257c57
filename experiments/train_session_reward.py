"""Train the session reward: `python -m experiments.train_session_reward --run RUN`.

Learns from the lists that a platform showed, good and bad, how users respond to a whole session
(OneRec V0's R(u, S)), and tests that on the latest of them. A killed or interrupted run goes on
when the same command is given again; a finished one is shown.

    python -m experiments.train_session_reward --run runs/world-tiny-1a2b3c
    python -m experiments.train_session_reward --run runs/world-tiny-1a2b3c --judge
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
from experiments.train_reward import MOODS
from onerec_jax.data.examples import Examples
from onerec_jax.data.exposures import (
    check_labels,
    exposure_parts,
    objective_labels,
    share_of,
)
from onerec_jax.data.session_windows import (
    ListStream,
    SessionLabelRule,
    check_windows,
    make_windows,
    watch_seconds,
    window_labels,
)
from onerec_jax.data.world.response import World
from onerec_jax.errors import require_at_least
from onerec_jax.evaluation import preference, reward_report
from onerec_jax.models.session_reward import SessionRewardConfig
from onerec_jax.rewards.session import Scale, scalar_reward
from onerec_jax.session_reward_run import SessionRewardRun
from onerec_jax.training.loop import fit
from onerec_jax.training.optimizer import make_optimizer
from onerec_jax.training.reward_step import session_reward_step
from onerec_jax.training.step import Trainer

# ------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Budget of the test."""

    batch_size: int = 64
    """Lists, or users, at once."""
    requests: int = 500
    """Users for whom lists of unexposed items are judged against a world, if one made the data."""
    candidates: int = 32
    """Random lists of each, of items that the user was never shown."""

    def __post_init__(self):
        require_at_least(self, "evaluation.", batch_size=1, requests=1, candidates=2)


@dataclasses.dataclass(frozen=True)
class TrainSessionRewardConfig(RewardSourceConfig):
    """Train the session reward on the lists that were shown, and test it."""

    items: int = 5
    """Items of a list; those of the policy's sessions."""
    heads: tuple[str, ...] = ()
    """Among swt, vtr, wtr and ltr; default: all that the data has."""
    labels: SessionLabelRule = SessionLabelRule()
    item_weight: float = 1.0
    """Of the cross-entropies of the single items' objectives (ctr, lvtr, …; all that the data has),
    learned along; the paper has none: 0."""
    model: SessionRewardConfig = SessionRewardConfig()
    validate_sessions: int = 2000
    """Lists in each validation, drawn once by the seed; 0 = all."""
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, "", items=1, validate_sessions=0, item_weight=0)


JUDGE = {"seed": JUDGE_SEED, "model": SessionRewardConfig(**JUDGE_MODEL)}
"""What --judge changes in the defaults."""

# --------------------------------------------------------------------------------------- stages


def open_run(config: TrainSessionRewardConfig, source: Source) -> SessionRewardRun:
    """Creates or continues the run folder."""
    dataset = source.dataset
    parts = exposure_parts(dataset, source.split, config.valid_fraction, config.test_fraction)
    found = {name: make_windows(dataset, *x, config.items) for name, x in vars(parts).items()}
    check_windows(dataset, found)
    watch_s = watch_seconds(dataset, found["train"], config.labels)
    windows = share_of(found["train"], config.share, config.judge_share)
    check_batch_size(config, len(windows), "training lists")
    labels = window_labels(dataset, windows, config.labels, watch_s, config.heads)
    every = np.arange(len(windows))
    labels, left_out = check_labels(labels, every, config.heads, flag="--heads")
    if left_out:
        print(f"left out, for all training labels are alike: {', '.join(left_out)}")
    values = settings(config, source, "heads") | {
        "stage": SessionRewardRun.stage,
        "objectives": list(labels),
        "watch_s": watch_s,
        "item_objectives": item_objectives(config, dataset, windows),
    }
    name = "session-judge" if config.judge else "session-reward"
    return create(config, source, SessionRewardRun, name, values)


def item_objectives(config: TrainSessionRewardConfig, dataset, windows) -> list[str]:
    """What is learned of single items beside."""
    if not config.item_weight:
        return []
    labels = objective_labels(dataset, config.labels)
    return list(check_labels(labels, windows.rows(dataset.offsets).ravel())[0])


def make_validation(config: TrainSessionRewardConfig, run: SessionRewardRun):
    """Validation on a fixed sample of lists: loss, and AUC by head."""
    lists, predict = run.lists("valid"), run.predictor(config.evaluation.batch_size)
    if 0 < config.validate_sessions < len(lists):
        rng = np.random.default_rng(config.seed)
        chosen = rng.choice(len(lists), config.validate_sessions, replace=False)
        lists = lists[np.sort(chosen)]

    def validate(variables) -> dict[str, float]:
        logit_no = predict(variables, lists)
        return preference.validation_metrics(run.objectives, lists.label_no, logit_no)

    return validate


def train(config: TrainSessionRewardConfig, run: SessionRewardRun, mesh):
    """Trains to the end or to the early stop, from the latest checkpoint if there is one."""
    lists = run.lists("train")
    stream = ListStream(run.builder, lists, config.train.batch_size, config.seed)
    trainer = Trainer(
        run.model(train=True),
        make_optimizer(config.optimizer, config.train.steps),
        mesh,
        run.example,
        seed=config.seed,
        step=session_reward_step,
        item_weight=config.item_weight,
    )
    parameters = sum(x.size for x in jax.tree.leaves(trainer.abstract_state.params))
    print(
        f"training on {', '.join(run.objectives)}: {parameters:,} parameters, "
        f"{len(lists):,} lists of {run.length} items, in {run.folder}"
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


def evaluate(config: TrainSessionRewardConfig, run: SessionRewardRun, seconds: dict) -> dict:
    """Measures the heads' scale, tests, writes report.json, report.md and plots."""
    start, data, values = time.perf_counter(), run.dataset, run.config["settings"]
    variables, predict = run.load_best(), run.predictor(config.evaluation.batch_size)
    parts = {name: run.lists(name) for name in ("train", "valid", "test")}
    scale = Scale.of(expit(predict(variables, parts["valid"]).astype(float)))
    run.keep_scale(scale)

    test, rows = parts["test"].windows, parts["test"].windows.rows(data.offsets)
    rate_no = expit(predict(variables, parts["test"]).astype(float))
    scores = {name: rate_no[:, i] for i, name in enumerate(run.objectives)}
    scores["reward"] = scalar_reward(rate_no, scale, np.ones(len(run.objectives)))
    by_head = dict(zip(run.objectives, parts["test"].label_no.T, strict=True))
    trained = parts["train"]
    history = data.item_rows[trained.windows.rows(data.offsets)], trained.label_no
    result = about(run, variables) | {
        "items": run.length,
        "labels": values["labels"],
        "watch_s": values["watch_s"],
        "sessions": {name: len(lists) for name, lists in parts.items()},
        "test": preference.held_out_metrics(
            test.user, data.item_rows[rows], by_head, scores, history, data.num_items, "reward"
        ),
        "scale": {
            name: dict(zip(run.objectives, x.tolist(), strict=True))
            for name, x in vars(scale).items()
        },
        "evaluation": dataclasses.asdict(config.evaluation),
    }
    if "world" in data.meta:
        result["world"] = against_world(config, run, test, by_head, scores)
    result["seconds"] = seconds | {"test": time.perf_counter() - start}
    return write_report(run, result, reward_report.session_markdown)


def against_world(config, run: SessionRewardRun, windows, labels, scores) -> dict:
    """The reward beside what the world that made the data expects.

    Of test lists, and of random lists of items that test users were never shown, in the situation
    of each one's first test list.
    """
    data, cfg, world = run.dataset, config.evaluation, World.from_meta(run.dataset.meta)
    rows = windows.rows(data.offsets)
    seen = data.item_rows[rows]
    expected, blind = (
        preference.session_expectations(data, world, windows.user, seen, rows, moods=moods)
        for moods in (0, MOODS)
    )
    users, first = np.unique(windows.user, return_index=True)
    rng = np.random.default_rng(config.seed)
    chosen = np.sort(rng.choice(len(users), min(cfg.requests, len(users)), replace=False))
    asked = windows[first[chosen]]
    items = preference.unexposed_items(data, asked.user, cfg.candidates * run.length, config.seed)
    items = items.reshape(len(asked), cfg.candidates, run.length)
    scorer = run.scorer(users=min(cfg.batch_size, len(asked)))
    found = scorer(Examples(asked.user, asked.position), items)
    at = np.repeat(rows[first[chosen]], cfg.candidates, axis=0)
    truth = preference.session_expectations(
        data, world, np.repeat(asked.user, cfg.candidates), items.reshape(at.shape), at
    )
    return {
        "oracle": preference.oracle_metrics(windows.user, labels, expected, blind),
        "correlation": {
            "test lists": preference.against_world(expected, scores, "reward"),
            "unexposed items": preference.against_world(
                truth, {name: x.ravel() for name, x in found.items()}, "reward"
            ),
            "unexposed, within a user": preference.within_users(
                {name: x.reshape(items.shape[:2]) for name, x in truth.items()}, found, "reward"
            ),
        },
    }


def show(result: dict) -> None:
    """Print the tables and what they need to be read."""
    tables = {
        f"{result['dataset']['name']}: {result['sessions']['test']:,} test lists of "
        f"{result['items']} items": reward_report.objective_rows(result, "the reward"),
    }
    if "world" in result:
        tables["against what the world expects"] = reward_report.world_rows(result)
    show_tables(result["notes"], tables)


# ----------------------------------------------------------------------------------------- main


def main(config: TrainSessionRewardConfig) -> None:
    """Data, training, scale, test."""
    run_stages(config, open_run, train, evaluate, show)


def run_command(argv: list[str] | None = None) -> None:
    """The command line; `argv` replaces the process's own flags."""
    command_line(main, TrainSessionRewardConfig, JUDGE, "train_session_reward", argv)


if __name__ == "__main__":
    run_command()
