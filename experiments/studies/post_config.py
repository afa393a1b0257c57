"""Settings of the studies of post-training, in two sizes: a GPU's, and two CPU cores'."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments import posttrain, pretrain, train_reward
from experiments.studies.post_judge import JudgeConfig
from onerec_jax.config import PRESETS
from onerec_jax.data.lifelong import LifelongConfig
from onerec_jax.data.pipeline import PipelineConfig
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.generation.rollout import RolloutConfig
from onerec_jax.tokenizer.build import TokenizerConfig
from onerec_jax.training.loop import LoopConfig
from onerec_jax.training.optimizer import OptimizerConfig

HERE = pathlib.Path()
"""Stands for the runs that a study itself fills in."""
UNGUARDED = posttrain.GuardConfig(legality=0, entropy=0)
"""A collapse is a result here."""


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Compare ways of post-training on the simulated platform."""

    small: bool = False
    """Sizes for two CPU cores and half an hour in place of those for a GPU."""
    world: WorldConfig = WorldConfig(users=3000, items=20_000, actions=150)
    """The platform, simulated if its log is not there yet."""
    arms: tuple[str, ...] = ()
    """Which to run, the one that the others are compared with among them; default: all."""
    seeds: int = 5
    start: pretrain.PretrainConfig = pretrain.PretrainConfig(
        preset="v1-0.015b",
        model=PRESETS["v1-0.015b"],
        targets="positive",
        tokenizer=TokenizerConfig(codebook_size=8192),
        pipeline=PipelineConfig(targets_per_user=8),
        train=LoopConfig(batch_size=128, steps=6000, validate_every=1000, patience=0),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500),
        validate_users=500,
    )
    """The pretraining that every arm begins from."""
    reward: train_reward.TrainRewardConfig = train_reward.TrainRewardConfig(
        train=LoopConfig(batch_size=128, steps=6000, validate_every=1000, patience=3)
    )
    """The reward model; the judge differs as --judge of experiments.train_reward says."""
    post: posttrain.PosttrainConfig = posttrain.PosttrainConfig(
        run=HERE,
        reward=HERE,
        rl_share=0.03,
        rollout=RolloutConfig(group=128, refresh_every=200),
        train=LoopConfig(batch_size=512, steps=2000, log_every=20, validate_every=2000, patience=0),
        guard=UNGUARDED,
        keep_rollouts=0,
    )
    """The post-training of every arm, but for what the arm changes."""
    judge: JudgeConfig = JudgeConfig()
    resamples: int = 2000
    """Bootstrap samples of users and seeds."""
    parallel: int = 1
    """Runs at a time, each with its share of the CPU cores; default of --small: one a core."""
    gpus: int = 0
    """GPUs to deal the runs out to; 0: they run where JAX puts them."""
    out: pathlib.Path | None = None
    """Folder of the report; default: runs/studies/STUDY-WORLD, with -small for --small."""

    def __post_init__(self):
        require_at_least(self, "", seeds=1, resamples=1, parallel=1, gpus=0)
        post = self.post
        for name, value in (("run", post.run), ("reward", post.reward)):
            if value != HERE:
                raise InputError(f"{name} {value}: a study makes its runs itself, leave it out")
        if post.judge is not None or post.out is not None:
            raise InputError("--post.judge and --post.out are the study's own: leave them out")
        if any((self.start.data, self.start.run, self.reward.run, self.reward.out)):
            raise InputError("--start and --reward name no folders in a study: leave them out")


SMALL: dict[str, Any] = {
    "world": WorldConfig(users=500, items=1000, actions=60),
    "start": pretrain.PretrainConfig(
        targets="positive",
        # 2,097,152 IDs for 1,000 items: legality is something to be learned.
        tokenizer=TokenizerConfig(codebook_size=128),
        pipeline=PipelineConfig(targets_per_user=8),
        train=LoopConfig(batch_size=32, steps=500, log_every=100, validate_every=250, patience=0),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        compression=LifelongConfig(chunk_actions=16),
        validate_users=200,
    ),
    "reward": train_reward.TrainRewardConfig(
        train=LoopConfig(batch_size=32, steps=300, log_every=50, validate_every=100, patience=0),
        evaluation=train_reward.EvaluationConfig(requests=100),
        weight_factor=1,
    ),
    "post": posttrain.PosttrainConfig(
        run=HERE,
        reward=HERE,
        rl_share=0.125,
        rollout=RolloutConfig(group=128, refresh_every=20),
        train=LoopConfig(batch_size=32, steps=200, log_every=10, validate_every=200, patience=0),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=10, decay="constant"),
        sparse_learning_rate=3e-4,
        guard=UNGUARDED,
        keep_rollouts=0,
    ),
    "parallel": os.cpu_count() or 1,
}
"""What --small changes in the defaults."""

Changes = Mapping[str, Any]
"""Dotted field of `PosttrainConfig` -> value, such as {"policy.delta": 0.5}."""


def changed(config, changes: Changes):
    """A frozen dataclass with some fields replaced, also of those within it, all at once."""
    values, within = {}, {}
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        if rest:
            within.setdefault(first, {})[rest] = value
        else:
            values[first] = value
    values |= {name: changed(getattr(config, name), inner) for name, inner in within.items()}
    return dataclasses.replace(config, **values)
