"""Settings of the studies of post-training, in two sizes: a GPU's, and two CPU cores'."""

import dataclasses
import os
from typing import Any

from experiments import posttrain, pretrain, train_reward
from experiments.studies.post_judge import JudgeConfig
from experiments.studies.study_config import SMALL_START, START, FilledIn, RunsConfig
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.errors import InputError
from onerec_jax.generation.rollout import RolloutConfig
from onerec_jax.training.loop import LoopConfig
from onerec_jax.training.optimizer import OptimizerConfig

UNGUARDED = posttrain.GuardConfig(legality=0, entropy=0)
"""A collapse is a result here."""


@dataclasses.dataclass(frozen=True)
class StudyPosttrainConfig(FilledIn, posttrain.PosttrainConfig):
    """Post-training within a study."""


@dataclasses.dataclass(frozen=True)
class StudyConfig(RunsConfig):
    """Compare ways of post-training on the simulated platform."""

    world: WorldConfig = WorldConfig(users=3000, items=20_000, actions=150)
    """The platform, simulated if its log is not there yet."""
    start: pretrain.PretrainConfig = START
    """The pretraining that every arm begins from."""
    reward: train_reward.TrainRewardConfig = train_reward.TrainRewardConfig(
        train=LoopConfig(batch_size=128, steps=6000, validate_every=1000, patience=3)
    )
    """The reward model; the judge differs as --judge of experiments.train_reward says."""
    post: StudyPosttrainConfig = StudyPosttrainConfig(
        rl_share=0.03,
        rollout=RolloutConfig(group=128, refresh_every=200),
        train=LoopConfig(batch_size=512, steps=2000, log_every=20, validate_every=2000, patience=0),
        guard=UNGUARDED,
        keep_rollouts=0,
    )
    """The post-training of every arm, but for what the arm changes."""
    judge: JudgeConfig = JudgeConfig()

    def __post_init__(self):
        super().__post_init__()
        self.post.refuse_named("--post")
        if any((self.start.data, self.start.run, self.reward.run, self.reward.out)):
            raise InputError("--start and --reward name no folders in a study: leave them out")


SMALL: dict[str, Any] = {
    "world": WorldConfig(users=500, items=1000, actions=60),
    "start": SMALL_START,
    "reward": train_reward.TrainRewardConfig(
        train=LoopConfig(batch_size=32, steps=300, log_every=50, validate_every=100, patience=0),
        evaluation=train_reward.EvaluationConfig(requests=100),
        weight_factor=1,
    ),
    "post": StudyPosttrainConfig(
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
