"""The runs of the studies of post-training: the start of every seed, and the arms.

For each seed a pretrained policy, a reward model and a judge, made once and used by all studies.
An arm is what a study changes of the post-training. Every run lies below runs/studies/posttraining
in a folder named by all that it depends on: what two studies have in common is trained once.

Axes: S seeds, U test users.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from experiments import posttrain, pretrain, train_reward
from experiments.from_run import finished
from experiments.posttrain import PosttrainConfig
from experiments.studies.arms import run_tasks, trained, world_data
from experiments.studies.post_config import StudyConfig
from experiments.studies.post_judge import JudgeConfig, judged, off_policy
from experiments.studies.study_config import Changes, no_validation, of_arm
from onerec_jax.data.examples import check_batch_size
from onerec_jax.data.schema import Dataset, load_dataset
from onerec_jax.data.world.response import World
from onerec_jax.files import write_npz, write_text
from onerec_jax.reward_run import open_reward
from onerec_jax.run import Run, settings_hash
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.training.loop import Collapsed, NonFiniteLoss
from onerec_jax.training.metrics import MetricsLog

Arm = Changes | Callable[[int], Changes] | None
"""What an arm changes, for all seeds or by seed; None: the start itself, not post-trained."""
JUDGE_SEED = 1000
"""Between the seeds of a reward model and of its judge."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What the arms of a seed begin from, are rewarded and judged by: three run folders."""

    policy: pathlib.Path
    reward: pathlib.Path
    judge: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Measured:
    """An arm, all seeds."""

    scores: dict[str, np.ndarray]
    """`judged`, float64 `[S, U]`; NaN in a seed that was stopped."""
    off_policy: list[dict[str, float]]
    rows: list[list[dict]]
    """metrics.jsonl of each seed; empty for the start."""
    stopped: list[str]
    """Why a seed was stopped; empty if it was not."""


def folder_of() -> pathlib.Path:
    return pretrain.RUNS / "studies" / "posttraining"


def run_all(config: StudyConfig, function, tasks: Mapping[str, tuple], logs: pathlib.Path) -> None:
    """Some at a time; what one compiles, the others read."""
    if not tasks:
        return
    cache = pretrain.RUNS / "jax_cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.absolute()))
    run_tasks(function, tasks, parallel=config.parallel, gpus=config.gpus, logs=logs)


# --------------------------------------------------------------------------------------- starts


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all seeds and arms share."""

    folder: pathlib.Path
    """Of the platform's log."""
    dataset: Dataset
    ids: SemanticIds

    @property
    def world(self) -> World:
        return World.from_meta(self.dataset.meta)

    @property
    def codes(self) -> int:
        """Semantic IDs that can be said, whether an item has them or not."""
        return self.ids.codebook_size**self.ids.levels


def ground_of(config: StudyConfig) -> Ground:
    """The platform, its semantic IDs and compressed lives; made if they are not there."""
    folder = world_data(config.world)
    dataset = load_dataset(folder)
    ids = SemanticIds.load(pretrain.find_semantic_ids(config.start, dataset, make_mesh(data=1)))
    pretrain.find_lifelong(config.start, dataset, ids)
    return Ground(folder, dataset, ids)


def starts_of(config: StudyConfig, ground: Ground) -> list[Start]:
    """The start of every seed; what is not there yet is trained."""
    parts = [dataclasses.asdict(x) for x in (config.world, config.start, config.reward)]
    folder = folder_of() / f"start-{settings_hash({'parts': parts})}"
    starts, policies, rewards = [], {}, {}
    for seed in range(config.seeds):
        start = Start(*(folder / f"{name}-{seed}" for name in ("policy", "reward", "judge")))
        starts.append(start)
        if not (start.policy / "done").exists():
            values = {"seed": seed, "data": ground.folder, "run": start.policy}
            policies[start.policy.name] = (dataclasses.replace(config.start, **values),)
        judge = {**train_reward.JUDGE, "judge": True, "seed": JUDGE_SEED + seed}
        for out, values in ((start.reward, {"seed": seed}), (start.judge, judge)):
            if not (out / "report.json").exists():
                values = {"run": start.policy, "out": out, **values}
                rewards[out.name] = (dataclasses.replace(config.reward, **values),)
    if policies or rewards:
        print(f"{len(policies)} policies and {len(rewards)} reward models to train in {folder}")
    run_all(config, train_policy, policies, folder / "logs")
    run_all(config, train_reward.main, rewards, folder / "logs")
    return starts


def train_policy(config: pretrain.PretrainConfig) -> None:
    """A task: the pretrained policy of a seed."""
    run = trained(config)
    write_text(run.folder / "done", "")


# ----------------------------------------------------------------------------------------- arms


def arm_config(config: StudyConfig, start: Start, seed: int, changes: Changes) -> PosttrainConfig:
    """The post-training of an arm and seed."""
    start_of = {"run": start.policy, "reward": start.reward, "seed": seed}
    # Who draws is not what is drawn.
    return of_arm(config.post, changes, folder_of(), apart=("queue",), **start_of)


def post_trained(config: PosttrainConfig) -> Run:
    """A run post-trained to its end, without the comparison and the test of experiments.posttrain.

    Raises:
      Collapsed, NonFiniteLoss: it came to no end.
    """
    parent = finished(Run.open(config.run))
    reward, _ = posttrain.open_rewards(config, parent)
    flagged = posttrain.read_flagged(config.flagged, parent)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    examples = posttrain.rsft_examples(config, parent)
    check_batch_size(config.train.batch_size, examples)
    run = posttrain.open_run(config, parent, reward, flagged)

    posttrain.train(config, parent, run, reward, examples, flagged, mesh, no_validation)
    return run


def run_arm(
    post: PosttrainConfig | None, start: Start, cfg: JudgeConfig, path: pathlib.Path
) -> None:
    """A task: trains and judges one arm of one seed, and writes `path`.

    Args:
      post: None judges the start.
    """
    parent = Run.open(start.policy)
    reward, judge = open_reward(start.reward, parent), open_reward(start.judge, parent)
    run, found = parent, {}
    if post is not None:
        try:
            run = post_trained(post)
        except (Collapsed, NonFiniteLoss) as error:
            print(error)
            write_npz(path, {"stopped": str(error)})
            return
        if cfg.off_policy_users:
            found = off_policy(run, parent, reward, post, cfg)
    values = judged(run, reward, judge, cfg)
    for name, value in (values | found).items():
        print(f"{name}: {np.nanmean(value):.4f}")
    values |= {f"off policy {name}": value for name, value in found.items()}
    write_npz(path, values)


def measure(
    config: StudyConfig, starts: list[Start], arms: Mapping[str, Arm], cfg: JudgeConfig
) -> dict[str, Measured]:
    """Trains and judges all arms that are not there yet, and reads what was measured."""
    key, paths, folders, tasks = settings_hash(dataclasses.asdict(cfg)), {}, {}, {}
    for seed, start in enumerate(starts):
        for arm, changes in arms.items():
            post = None
            if changes is not None:
                here = changes(seed) if callable(changes) else changes
                post = arm_config(config, start, seed, here)
            folder = start.policy if post is None else post.out
            folders[arm, seed], path = folder, folder / f"scores-{key}.npz"
            paths[arm, seed] = path
            if not path.exists():
                tasks[f"{folder.name}-{key}"] = (post, start, cfg, path)
    print(f"{len(tasks)} of {len(paths)} runs to do, {config.parallel} at a time")
    run_all(config, run_arm, tasks, folder_of() / "logs")
    return {
        arm: read_measured(
            [paths[arm, s] for s in range(len(starts))],
            [folders[arm, s] / "metrics.jsonl" for s in range(len(starts))]
            if arms[arm] is not None
            else [],
        )
        for arm in arms
    }


def read_measured(paths: list[pathlib.Path], logs: list[pathlib.Path]) -> Measured:
    """An arm from its files, one a seed."""
    loaded = [dict(np.load(path)) for path in paths]
    stopped = [str(values.pop("stopped", "")) for values in loaded]
    off_policy = [
        {k.removeprefix("off policy "): float(v) for k, v in x.items() if k.startswith("off ")}
        for x in loaded
    ]
    names = {k: v.shape for x in loaded for k, v in x.items() if v.ndim}
    scores = {
        name: np.stack([x.get(name, np.full(shape, np.nan)) for x in loaded])
        for name, shape in names.items()
    }
    rows = [[row for row in MetricsLog(path).read() if "validation" not in row] for path in logs]
    return Measured(scores, off_policy, rows, stopped)
