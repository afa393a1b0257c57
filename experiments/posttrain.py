"""Post-train a policy on rewards: `python -m experiments.posttrain RUN --reward REWARD`.

RUN is a finished run of experiments.pretrain (or of this), REWARD one of experiments.train_reward
for the same items. Supervised fine-tuning on the better sessions (RSFT) goes on while groups of
items, drawn for a share of its users, are scored and pushed up or down. A killed or interrupted run
goes on when the same command is given again; a finished one is shown. The result is a run folder
as of pretraining.

    python -m experiments.posttrain runs/world --reward runs/reward --judge runs/judge
"""

import dataclasses
import pathlib

import numpy as np

from experiments import evaluate, from_run, sample
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
from onerec_jax.data.examples import Examples, check_batch_size, target_examples, train_examples
from onerec_jax.data.pipeline import PipelineConfig, TrainStream
from onerec_jax.data.sessions import well_played
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.evaluation.lists import before_and_after, expected_of_lists, mean_of_lists
from onerec_jax.evaluation.ranking import ranking_metrics
from onerec_jax.generation.rollout import RolloutConfig
from onerec_jax.losses.ecpo import PolicyConfig
from onerec_jax.posttraining.queue import QueueConfig
from onerec_jax.posttraining.step import (
    FormatConfig,
    LossWeights,
    ObjectiveConfig,
    init_policy_state,
    policy_step,
)
from onerec_jax.posttraining.trainer import PolicyStream, PolicyTrainer, Rewarder, RolloutFiles
from onerec_jax.reward_run import RewardRun, open_reward
from onerec_jax.rewards.industrial import IndustrialConfig, flagged_items
from onerec_jax.rewards.objective import parse_objective, weighted_score
from onerec_jax.run import Run, settings_hash
from onerec_jax.sharding import make_mesh
from onerec_jax.training.loop import StopSignal, fit
from onerec_jax.training.optimizer import OptimizerConfig, make_optimizer
from onerec_jax.training.step import Trainer

# ------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When a collapsed policy is stopped, by the means since the last logged row."""

    legality: float = 0.05
    """Least share of drawn IDs that exist."""
    entropy: float = 0.05
    """Least entropy of an item, summed over its codes, in nats."""

    def __post_init__(self):
        require_at_least(self, "guard.", legality=0, entropy=0)

    def __call__(self, row: dict) -> str | None:
        """Why training must stop, or None."""
        if np.isinf(row["ratio_quantiles"]).any():
            return "the ratio of policy and sampler is not finite"
        found = {"legality": row["legality"][-1], "entropy": np.sum(row["entropy"])}
        for name, value in found.items():
            if not value >= getattr(self, name):
                return (
                    f"{name} {value:.3f} is below --guard.{name} {getattr(self, name)}, the policy "
                    "has collapsed: lower --weights.preference or raise --format.k"
                )
        return None


@dataclasses.dataclass(frozen=True)
class PosttrainConfig(FromRunConfig):
    """Post-train a run on the rewards of another, and compare before with after."""

    reward: pathlib.Path
    """Finished run of experiments.train_reward for the same data set and semantic IDs."""
    objective: str = "p"
    """What is rewarded: p, the preference score; one of the reward's objectives, such as vtr; or
    a sum of them weighted by hand, such as ctr=1,lvtr=2,ltr=5."""
    rl_share: float = 0.01
    """Share of the users of a step that get rollouts, at least one a device; 0.01 in the report."""
    rsft_drop: float = 0.5
    """Share of the sessions, those played shortest, that supervised fine-tuning leaves out."""
    rollout: RolloutConfig = RolloutConfig()
    queue: QueueConfig = QueueConfig()
    policy: PolicyConfig = PolicyConfig()
    weights: LossWeights = LossWeights()
    format: FormatConfig = FormatConfig()
    flagged: str | None = None
    """Items whose rewards are cut while they are too many (SIR): a column of the items table such
    as viral_farm, or a file with one item id a line."""
    industrial: IndustrialConfig = IndustrialConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=8e-5, warmup_steps=100, decay="constant"
    )
    """Of dense parameters; the report anneals to 8e-5."""
    sparse_learning_rate: float = 1e-4
    """Of embedding tables; 1e-4 in the report."""
    guard: GuardConfig = GuardConfig()
    keep_rollouts: int = 100
    """Every so many steps all that was drawn is written to rollouts/; 0: never."""
    validate_beam_width: int = 64
    list_length: int = 10
    """Items of the lists that validation and comparison score."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, "", keep_rollouts=0, validate_beam_width=1, list_length=1)
        require_at_least(self, "", sparse_learning_rate=0)
        for name in ("rl_share", "rsft_drop"):
            value, flag = getattr(self, name), name.replace("_", "-")
            if not (0 <= value <= 1) or value == (0 if name == "rl_share" else 1):
                asks = "above 0, at most 1" if name == "rl_share" else "from 0 to below 1"
                raise InputError(f"--{flag} {value} must be {asks}")
        if not self.optimizer.learning_rate > 0:
            raise InputError("--optimizer.learning-rate must be above 0")
        self.queue.check(self.rollout.refresh_every)
        self.objective_config  # noqa: B018 (refuses what does not fit together)

    @property
    def objective_config(self) -> ObjectiveConfig:
        return ObjectiveConfig(
            self.policy,
            self.weights,
            self.format,
            self.rollout.group,
            self.rollout.refresh_every,
            self.rollout.parts,
            self.industrial,
        )


class PosttrainRun(Run):
    """The run that is being made; finished, it opens as any `Run`."""

    stage, flag = "posttrain", "--out"


def settings(config: PosttrainConfig, parent: Run, reward: RewardRun, flagged) -> dict:
    """All that the result depends on; the mesh may change between sessions."""
    values = from_run.settings(config, PosttrainRun, parent, reward, "flagged", "queue")
    if schedule := config.queue.schedule(config.rollout.refresh_every):
        values["queue"] = schedule
    rows = None if flagged is None else np.flatnonzero(flagged).tolist()
    return values | {
        "targets": parent.config["settings"].get("targets", "all"),
        "reward_run": values["reward_run"] | {"fusion": reward.fusion},
        "flagged": rows and settings_hash({"rows": rows}),
    }


# --------------------------------------------------------------------------------------- stages


def open_rewards(config: PosttrainConfig, parent: Run) -> tuple[RewardRun, RewardRun | None]:
    """The reward and the judge."""
    reward = finished(open_reward(config.reward, parent))
    objective_weights(config, reward)  # refuses what the reward does not know
    judge = None if config.judge is None else finished(open_reward(config.judge, parent))
    return reward, judge


def objective_weights(config: PosttrainConfig, reward: RewardRun) -> dict[str, float]:
    """What is rewarded, by name."""
    return parse_objective(config.objective, ("p", *reward.objectives), reward.folder)


def read_flagged(flagged: str | None, run: Run) -> np.ndarray | None:
    """Items that --flagged names, bool `[I]`, or None."""
    if flagged is None:
        return None
    path = pathlib.Path(flagged)
    if not path.is_file():
        return flagged_items(run.dataset, flagged)
    words = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if run.dataset.items["item_id"].dtype.is_integer():
        try:
            words = [int(word) for word in words]
        except ValueError as error:
            raise InputError(f"--flagged {path}: item ids are integers ({error})") from error
    return flagged_items(run.dataset, words)


def rsft_examples(config: PosttrainConfig, run: Run) -> Examples:
    """Targets of supervised fine-tuning."""
    kept = well_played(run.dataset, run.split, config.rsft_drop) if config.rsft_drop else None
    if kept is None:
        if config.rsft_drop:
            print("the log holds no play times: supervised fine-tuning uses all sessions")
        eligible = run.eligible
    else:
        eligible = kept if run.eligible is None else kept & run.eligible
    return train_examples(run.split, eligible)


def open_run(config: PosttrainConfig, parent: Run, reward: RewardRun, flagged) -> Run:
    """Creates or continues the run folder."""
    return create(PosttrainRun, config.out, settings(config, parent, reward, flagged), parent)


def make_validation(config: PosttrainConfig, run: Run, scorer, weights, mesh):
    """Validation on a fixed sample of users: NTP loss, items, legality, reward of lists."""
    examples = validation_examples(run, config.validate_users, config.seed)
    generator = run.generator(
        mesh, beam_width=config.validate_beam_width, batch_size=config.evaluation.batch_size
    )

    def validate(variables) -> dict[str, float]:
        loss = float(generator.loss(variables, run.builder, examples).sum(-1).mean())
        found = generator.rank(variables, run.builder, examples, n=config.list_length)
        reward = weighted_score(scorer(examples, found.lists), weights)
        values = {
            "loss": loss,
            "reward": float(np.nanmean(reward)),
            "legality": generator.legality(variables, run.builder, examples),
            "ndcg@10": float(ranking_metrics(found.item_ranks)["ndcg@10"].mean()),
        }
        return values | {"score": -loss if config.select_by == "loss" else values["reward"]}

    return validate


def train(
    config: PosttrainConfig, parent: Run, run: Run, reward, examples, flagged, mesh, validate=None
):
    """Trains to the end, from the latest checkpoint if there is one.

    Args:
      validate: in place of `make_validation`'s.
    """
    weights = objective_weights(config, reward)
    users = rollout_users(config.rl_share, config.train.batch_size, mesh, config.rollout.parts)
    stream = TrainStream(
        run.builder,
        examples,
        PipelineConfig(),
        config.train.batch_size,
        config.seed,
        run.split.train_end,
    )
    optimizer = make_optimizer(
        config.optimizer, config.train.steps, sparse_learning_rate=config.sparse_learning_rate
    )
    cfg = config.objective_config
    trainer = Trainer(
        run.model(train=True),
        optimizer,
        mesh,
        run.example,
        seed=config.seed,
        step=policy_step,
        init=init_policy_state,
        cfg=cfg,
        accumulate=config.train.accumulate,
    )
    stream, stop = PolicyStream(stream, users), StopSignal()
    queued = None if config.queue.folder is None else sample.queued_draws(config, run, stream, stop)
    policy = PolicyTrainer(
        trainer,
        lambda abstract: parent.checkpoints.restore_model(abstract, parent.best_step),
        run,
        Rewarder(run, reward.scorer(users=users), weights, flagged),
        config.rollout,
        seed=config.seed,
        record=RolloutFiles(run.folder / "rollouts", config.keep_rollouts, run),
        queued=queued,
    )
    print(
        f"post-training {parent.folder} on {config.objective} of {reward.folder}: "
        f"{len(examples):,} examples, {users} of {config.train.batch_size} users a step with "
        f"{config.rollout.group} items each ({config.rollout.method}), in {run.folder}"
    )
    if validate is None:
        scorer = reward.scorer(users=config.evaluation.batch_size)
        validate = make_validation(config, run, scorer, weights, mesh)
    result = fit(
        policy,
        stream,
        run.checkpoints,
        run.metrics,
        config.train,
        seed=config.seed,
        validate=validate,
        guard=config.guard,
        stop=stop,
    )
    if queued is not None:
        queued.finish()
    return result


# --------------------------------------------------------------------------------------- results


def compare(config: PosttrainConfig, parent: Run, run: Run, reward, judge) -> dict:
    """Test users before and after: rewards of their lists of unseen items, legality, the log.

    Where a world made the data, also what it expects of the lists at each user's test request.
    """
    test = target_examples(run.split.test_at)
    seen = evaluate.seen_items(run, test)
    generator = run.generator(
        make_mesh(data=1),
        beam_width=config.evaluation.beam_width,
        batch_size=config.evaluation.batch_size,
    )
    scorers = {"reward": reward, "judge": judge}
    scorers = {
        name: x.scorer(users=config.evaluation.batch_size) for name, x in scorers.items() if x
    }
    rewarded = {"p": {"p": 1.0}, config.objective: objective_weights(config, reward)}
    values = {}
    for name, source in (("before", parent), ("after", run)):
        variables = source.load_best()
        found = generator.rank(variables, run.builder, test, n=config.list_length, seen=seen)
        here = values[name] = {"items a list": (found.lists >= 0).sum(1).astype(float)}
        for who, scorer in scorers.items():
            scores = scorer(test, found.lists)
            for kind, weights in rewarded.items():
                if weights.keys() <= scores.keys():
                    here[f"{kind}, {who}"] = mean_of_lists(weighted_score(scores, weights))
        if "world" in run.dataset.meta:
            expected = expected_of_lists(run.dataset, test, found.lists)
            here |= {f"{k}, expected by the world": v for k, v in expected.items()}
        here["recall@10"] = (found.item_ranks < min(10, config.list_length)).astype(float)
        here["NTP loss"] = generator.loss(variables, run.builder, test).sum(-1)
        here["legality"] = generator.legal_share(variables, run.builder, test)
    rows = before_and_after(**values, seed=config.seed, resamples=config.evaluation.resamples)
    return {"users": len(test), "list_length": config.list_length, "metrics": rows}


# ----------------------------------------------------------------------------------------- main


def main(config: PosttrainConfig) -> None:
    """Post-training, comparison, test."""
    parent = finished(Run.open(config.run))
    if parent.session_rule is not None:
        raise InputError(
            f"{config.run} generates session lists, and this reward is of single items: give a run "
            "without --targets sessions"
        )
    reward, judge = open_rewards(config, parent)
    flagged = read_flagged(config.flagged, parent)
    mesh = mesh_of(config, parent)
    examples = rsft_examples(config, parent)
    check_batch_size(config.train.batch_size, examples)
    # Refuses parts that do not fit before there is a folder.
    rollout_users(config.rl_share, config.train.batch_size, mesh, config.rollout.parts)
    run = open_run(config, parent, reward, flagged)
    result = train_and_compare(
        run,
        config.evaluation,
        lambda: train(config, parent, run, reward, examples, flagged, mesh),
        lambda: compare(config, parent, run, reward, judge),
    )
    show(result, f"{result['users']} test users, lists of unseen items")
    print(f"\neverything lies in {run.folder}: comparison.json, report.md, rollouts, checkpoints")
    print(f"more: {follow_up('evaluate', run.folder)}")


def run_command(argv: list[str] | None = None) -> None:
    """The command line; `argv` replaces the process's own flags."""
    cli.run(main, PosttrainConfig, prog="python -m experiments.posttrain", argv=argv)


if __name__ == "__main__":
    run_command()
