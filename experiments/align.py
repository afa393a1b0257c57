"""Align a model of lists with a session reward: `python -m experiments.align RUN --reward REWARD`.

Iterative preference alignment (IPA) of OneRec V0 (arXiv 2502.18965). RUN is a finished run of
experiments.pretrain --targets sessions (or of this), REWARD one of
experiments.train_session_reward for the same items. Next-token prediction goes on while, for a
share of its users, a frozen copy of the model proposes lists, of which the best is to become more
probable than the worst; after each iteration the model takes the copy's place. A killed or
interrupted run goes on when the same command is given again; a finished one is shown. The result is
a run folder as of pretraining.

    python -m experiments.align runs/lists --reward runs/session-reward --loss dpo
    python -m experiments.align runs/lists --reward runs/session-reward --refresh-every 0
"""

import dataclasses
import pathlib
from typing import Annotated

import jax
import numpy as np
import tyro

from experiments import evaluate, from_run
from experiments.from_run import (
    FromRunConfig,
    create,
    finished,
    mesh_of,
    rollout_users,
    show,
    train_and_compare,
)
from experiments.pretrain import validation_examples
from experiments.stage import follow_up
from onerec_jax import cli
from onerec_jax.data.examples import check_batch_size, target_examples
from onerec_jax.data.pipeline import PipelineConfig, TrainStream
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.evaluation.lists import before_and_after, mean_of_lists
from onerec_jax.evaluation.session_lists import expected_of_sessions, mean_and_max
from onerec_jax.generation.session_generator import GeneratedLists, session_lists
from onerec_jax.losses.preference import PreferenceConfig
from onerec_jax.posttraining.pairs import AlignmentTrainer, BeamConfig, PairFiles, PairMaker
from onerec_jax.posttraining.preference_step import AlignmentConfig, PairBatch, alignment_step
from onerec_jax.posttraining.step import init_policy_state
from onerec_jax.posttraining.trainer import PolicyStream
from onerec_jax.run import Run
from onerec_jax.session_reward_run import SessionRewardRun, open_session_reward
from onerec_jax.sharding import replicated
from onerec_jax.training.loop import fit
from onerec_jax.training.optimizer import OptimizerConfig, make_optimizer
from onerec_jax.training.step import Trainer

# ------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When a collapsed policy is stopped, by the means since the last logged row."""

    chosen_loss: float = 50.0
    """Most nats that the chosen sessions may lose against the reference: preference losses may well
    lower both of a pair."""
    legality: float = 0.05
    """Least share of proposed IDs that exist; with --beams.no-masked."""

    def __post_init__(self):
        require_at_least(self, "guard.", chosen_loss=0, legality=0)

    def __call__(self, row: dict) -> str | None:
        """Why training must stop, or None."""
        remedy = "the policy has collapsed: lower --preference-weight or raise --beta"
        if -row["chosen_change"] > self.chosen_loss:
            return (
                f"chosen sessions have lost {-row['chosen_change']:.1f} nats against the "
                f"reference, more than --guard.chosen-loss {self.chosen_loss}, {remedy}"
            )
        if not row["legality"][-1] >= self.legality:
            return (
                f"legality {row['legality'][-1]:.3f} is below --guard.legality {self.legality}, "
                f"{remedy}"
            )
        return None


@dataclasses.dataclass(frozen=True)
class AlignConfig(FromRunConfig):
    """Align a model of lists, of pretrain --targets sessions, with a session reward, and compare
    before with after."""

    reward: pathlib.Path
    """Finished run of experiments.train_session_reward for the same data set and semantic IDs."""
    preference: Annotated[PreferenceConfig, tyro.conf.arg(name="")] = PreferenceConfig()
    preference_weight: float = 1.0
    """lambda, of the preference loss beside next-token prediction; the paper does not print it."""
    head_weights: tuple[float, ...] = ()
    """Of the reward's heads in the one number that ranks sessions, in the order that the reward's
    report has; default: 1 each."""
    dpo_share: float = 0.01
    """Share of the users of a step that get pairs (r_DPO), at least one a device; the paper's
    value."""
    refresh_every: int = 500
    """Steps of an iteration, after which the model becomes sampler and reference; 0: never, plain
    DPO against the model to start from."""
    beams: BeamConfig = BeamConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=2e-4, warmup_steps=100, decay="constant"
    )
    """The paper's initial learning rate; it does not print one for alignment."""
    guard: GuardConfig = GuardConfig()
    keep_pairs: int = 100
    """Every so many steps all that was drawn is written to pairs/; 0: never."""
    lists: int = 16
    """Lists a user that validation and comparison judge, by beam search."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, "", keep_pairs=0, lists=1)
        if not 0 < self.dpo_share <= 1:
            raise InputError(f"--dpo-share {self.dpo_share} must be above 0, at most 1")
        if self.beams.width <= self.preference.rejected:
            raise InputError(
                f"--rejected {self.preference.rejected} of --beams.width {self.beams.width} "
                "sessions: raise the width, for one is chosen"
            )
        self.alignment  # noqa: B018 (refuses what cannot be)

    @property
    def alignment(self) -> AlignmentConfig:
        return AlignmentConfig(self.preference, self.preference_weight, self.refresh_every)


class AlignRun(Run):
    """The run that is being made; finished, it opens as any `Run`."""

    stage, flag = "align", "--out"


def settings(config: AlignConfig, parent: Run, reward: SessionRewardRun) -> dict:
    """All that the result depends on; the mesh may change between sessions."""
    before = parent.config["settings"]
    values = from_run.settings(config, AlignRun, parent, reward)
    return values | {name: before[name] for name in ("targets", "sessions")}


# --------------------------------------------------------------------------------------- stages


def open_parent(config: AlignConfig) -> Run:
    """The run to start from."""
    run = finished(Run.open(config.run))
    if run.session_rule is None:
        raise InputError(
            f"{config.run} generates single items, and alignment is of lists: give a run of "
            "experiments.pretrain --targets sessions"
        )
    return run


def open_reward(config: AlignConfig, flag: str, parent: Run) -> SessionRewardRun:
    """The reward or the judge."""
    folder = getattr(config, flag)
    reward = finished(open_session_reward(folder, parent))
    reward.check_weights(config.head_weights)
    items = parent.model_config.session_items
    if reward.length != items:
        raise InputError(
            f"--{flag} {folder} judges lists of {reward.length} items, {parent.folder} generates "
            f"{items}: train it with --items {items}"
        )
    return reward


def open_run(config: AlignConfig, parent: Run, reward: SessionRewardRun) -> Run:
    """Creates or continues the run folder."""
    return create(AlignRun, config.out, settings(config, parent, reward), parent)


class ListTester:
    """Generates and judges the lists of unseen items that validation and comparison look at."""

    def __init__(self, config: AlignConfig, run: Run, reward, judge, mesh):
        self.run, self.n, self.mesh = run, config.lists, mesh
        users = config.evaluation.batch_size
        self.generator = run.generator(mesh, beam_width=1, batch_size=users)
        self.scorers = {
            name: x.scorer(users=users, weights=config.head_weights)
            for name, x in (("reward", reward), ("judge", judge))
            if x is not None
        }

    def lists(self, variables, examples, **options) -> GeneratedLists:
        """The n most probable lists of each user."""
        return session_lists(
            self.generator,
            variables,
            self.run.builder,
            examples,
            width=self.n,
            n=self.n,
            **options,
        )

    def items(self, variables, examples) -> np.ndarray:
        """Item rows int32 `[U, W, m]`, -1 = none."""
        return self.lists(variables, examples, seen=evaluate.seen_items(self.run, examples)).items

    def legality(self, variables, examples) -> np.ndarray:
        """Share of each user's unmasked lists whose IDs all exist, float `[U]`."""
        free = self.lists(variables, examples, masked=False)
        return mean_of_lists(np.where(np.isfinite(free.logp), (free.items >= 0).all(-1), np.nan))

    def loss(self, variables, examples) -> np.ndarray:
        """NTP loss of logged lists, float `[U]`, nats an item."""
        return self.generator.loss(variables, self.run.builder, examples).sum(-1)


def make_validation(config: AlignConfig, run: Run, tester: ListTester):
    """Validation on a fixed sample of lists: NTP loss, reward of what is generated, legality."""
    examples = validation_examples(run, config.validate_users, config.seed)

    def validate(variables) -> dict[str, float]:
        items = tester.items(variables, examples)
        mean, best = mean_and_max(tester.scorers["reward"](examples, items)["reward"])
        values = {
            "loss": float(tester.loss(variables, examples).mean()),
            "reward": float(np.nanmean(mean)),
            "best_reward": float(np.nanmean(best)),
            "legality": float(np.nanmean(tester.legality(variables, examples))),
        }
        score = -values["loss"] if config.select_by == "loss" else values["reward"]
        return values | {"score": score}

    return validate


def train(
    config: AlignConfig, parent: Run, run: Run, examples, tester: ListTester, mesh, validate=None
):
    """Trains to the end, from the latest checkpoint if there is one.

    Args:
      validate: in place of `make_validation`'s.
    """
    users = rollout_users(config.dpo_share, config.train.batch_size, mesh)
    stream = TrainStream(
        run.builder,
        examples,
        PipelineConfig(),
        config.train.batch_size,
        config.seed,
        run.split.train_end,
    )
    one = examples[:1]
    trainer = Trainer(
        run.model(train=True),
        make_optimizer(config.optimizer, config.train.steps),
        mesh,
        run.builder(one.user, one.position, rows=one.rows),
        seed=config.seed,
        step=alignment_step,
        init=init_policy_state,
        cfg=config.alignment,
        accumulate=config.train.accumulate,
    )
    maker = PairMaker(
        run,
        dataclasses.replace(tester.scorers["reward"], users=users),
        config.preference.rejected,
        config.beams.min_difference,
    )
    aligner = AlignmentTrainer(
        trainer,
        lambda abstract: parent.checkpoints.restore_model(abstract, parent.best_step),
        run,
        maker,
        config.beams,
        record=PairFiles(run.folder / "pairs", config.keep_pairs, maker),
    )
    every = config.refresh_every
    print(
        f"aligning {parent.folder} with {config.reward} by {config.preference.loss}: "
        f"{len(examples):,} lists, {users} of {config.train.batch_size} users a step with "
        f"{config.beams.width} proposed lists, "
        f"{f'iterations of {every} steps' if every else 'a fixed reference'}, in {run.folder}"
    )
    return fit(
        aligner,
        PolicyStream(stream, users, PairBatch),
        run.checkpoints,
        run.metrics,
        config.train,
        seed=config.seed,
        validate=validate or make_validation(config, run, tester),
        guard=config.guard,
    )


# --------------------------------------------------------------------------------------- results


def compare(config: AlignConfig, parent: Run, run: Run, tester: ListTester) -> dict:
    """Test users before and after: rewards of their lists, mean and best of each user's, legality.

    Where a world made the data, also what it expects of the lists at each user's test request; and
    the NTP loss of the test lists of the log.
    """
    test, logged = target_examples(run.split.test_at), run.session_lists("test")
    values = {}
    for name, source in (("before", parent), ("after", run)):
        variables = jax.device_put(source.load_best(), replicated(tester.mesh))
        items = tester.items(variables, test)
        scores = {
            f"{kind} by the {who}": score
            for who, scorer in tester.scorers.items()
            for kind, score in scorer(test, items).items()
        }
        if "world" in run.dataset.meta:
            expected = expected_of_sessions(run.dataset, test, items)
            scores |= {f"{kind} expected by the world": x for kind, x in expected.items()}
        here = values[name] = {}
        for kind, score in scores.items():
            here[f"{kind}, mean"], here[f"{kind}, max"] = mean_and_max(score)
        here["legality"] = tester.legality(variables, test)
        if len(logged):  # a short log may hold no good session in its test part
            here["NTP loss of the log, an item"] = tester.loss(variables, logged)
    rows = before_and_after(**values, seed=config.seed, resamples=config.evaluation.resamples)
    return {"users": len(test), "lists": config.lists, "metrics": rows}


# ----------------------------------------------------------------------------------------- main


def main(config: AlignConfig) -> None:
    """Alignment, comparison, test."""
    parent = open_parent(config)
    reward = open_reward(config, "reward", parent)
    judge = None if config.judge is None else open_reward(config, "judge", parent)
    mesh = mesh_of(config, parent)
    examples = parent.session_lists("train")
    check_batch_size(config.train.batch_size, examples)
    run = open_run(config, parent, reward)
    tester = ListTester(config, run, reward, judge, mesh)
    result = train_and_compare(
        run,
        config.evaluation,
        lambda: train(config, parent, run, examples, tester, mesh),
        lambda: compare(config, parent, run, tester),
    )
    show(result, f"{result['users']} test users, {result['lists']} lists of unseen items each")
    print(f"\neverything lies in {run.folder}: comparison.json, report.md, pairs, checkpoints")
    print(f"more: {follow_up('evaluate', run.folder)}")


def run_command(argv: list[str] | None = None) -> None:
    """The command line; `argv` replaces the process's own flags."""
    cli.run(main, AlignConfig, prog="python -m experiments.align", argv=argv)


if __name__ == "__main__":
    run_command()
