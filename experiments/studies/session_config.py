"""Settings of the study of session-wise generation, in two sizes: a GPU's, and two CPU cores'."""

import dataclasses
import os
import pathlib
from typing import Any

from experiments import pretrain
from experiments.align import AlignConfig, GuardConfig
from experiments.studies.post_config import HERE
from experiments.studies.session_judge import JudgeConfig
from experiments.train_session_reward import EvaluationConfig, TrainSessionRewardConfig
from onerec_jax.config import PRESETS
from onerec_jax.data.lifelong import LifelongConfig
from onerec_jax.data.pipeline import PipelineConfig
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.posttraining.pairs import BeamConfig
from onerec_jax.tokenizer.build import TokenizerConfig
from onerec_jax.training.loop import LoopConfig
from onerec_jax.training.optimizer import OptimizerConfig

UNGUARDED = GuardConfig(chosen_loss=1e9, legality=0)
"""A collapse is a result here."""


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Compare lists by session-wise and point-wise models on the simulated platform."""

    small: bool = False
    """Sizes for two CPU cores in place of those for a GPU."""
    world: WorldConfig = WorldConfig(users=3000, items=20_000, actions=200)
    """The platform, simulated if its log is not there yet; split by time."""
    arms: tuple[str, ...] = ()
    """Which to run, 'point-wise' among them; default: all."""
    seeds: int = 5
    start: pretrain.PretrainConfig = pretrain.PretrainConfig(
        preset="v1-0.015b",
        model=PRESETS["v1-0.015b"],
        targets="positive",
        tokenizer=TokenizerConfig(codebook_size=8192),
        pipeline=PipelineConfig(targets_per_user=5),
        train=LoopConfig(batch_size=128, steps=6000, validate_every=1000, patience=0),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500),
        validate_users=500,
    )
    """The point-wise run. The session-wise one differs in --targets sessions alone: as many users a
    step, as many items of each, those of its lists."""
    tiger_codes: int = 256
    """Codes a level of the TIGER-shaped run, which is otherwise the point-wise one with nothing but
    dense layers and the semantic IDs of the latest items."""
    tiger_length: int = 64
    """Items that it reads."""
    reward: TrainSessionRewardConfig = TrainSessionRewardConfig(
        train=LoopConfig(batch_size=64, steps=6000, validate_every=1000, patience=3)
    )
    """The session reward; the judge differs as --judge of experiments.train_session_reward says."""
    align: AlignConfig = AlignConfig(
        run=HERE,
        reward=HERE,
        train=LoopConfig(batch_size=200, steps=2000, log_every=20, validate_every=2000, patience=0),
        refresh_every=250,
        guard=UNGUARDED,
        keep_pairs=0,
    )
    """The alignment of every aligned arm, but for what the arm changes."""
    judge: JudgeConfig = JudgeConfig()
    resamples: int = 2000
    """Bootstrap samples of users and seeds."""
    parallel: int = 1
    """Runs at a time, each with its share of the CPU cores; default of --small: one a core."""
    gpus: int = 0
    """GPUs to deal the runs out to; 0: they run where JAX puts them."""
    out: pathlib.Path | None = None
    """Folder of the report; default: runs/studies/sessions-WORLD, with -small for --small."""

    def __post_init__(self):
        require_at_least(
            self, "", seeds=1, resamples=1, parallel=1, gpus=0, tiger_codes=2, tiger_length=1
        )
        if self.start.targets == "sessions":
            raise InputError("--start.targets sessions: --start is the point-wise run")
        if self.start.sessions.items != self.reward.items:
            raise InputError(
                f"--start.sessions.items {self.start.sessions.items} and --reward.items "
                f"{self.reward.items}: give both the same"
            )
        for name in ("run", "reward"):
            if getattr(self.align, name) != HERE:
                raise InputError(f"--align.{name}: a study makes its runs itself, leave it out")
        named = (self.align.judge, self.align.out, self.start.data, self.start.run)
        named += (self.reward.run, self.reward.data, self.reward.out)
        if any(named):
            raise InputError("--start, --reward and --align name no folders in a study")

    @property
    def lists(self) -> pretrain.PretrainConfig:
        """The session-wise run."""
        pipeline = dataclasses.replace(self.start.pipeline, targets_per_user=1)
        return dataclasses.replace(self.start, targets="sessions", pipeline=pipeline)

    @property
    def tiger(self) -> pretrain.PretrainConfig:
        """The TIGER-shaped run."""
        model = dataclasses.replace(
            self.start.model,
            num_experts=0,
            pathways=("short",),
            features=(),
            short_length=self.tiger_length,
        )
        tokenizer = dataclasses.replace(self.start.tokenizer, codebook_size=self.tiger_codes)
        return dataclasses.replace(self.start, model=model, tokenizer=tokenizer)


SMALL: dict[str, Any] = {
    "world": WorldConfig(users=800, items=1000, actions=80),
    "seeds": 3,
    "start": pretrain.PretrainConfig(
        targets="positive",
        tokenizer=TokenizerConfig(codebook_size=128),
        pipeline=PipelineConfig(targets_per_user=5),
        train=LoopConfig(batch_size=32, steps=500, log_every=100, validate_every=250, patience=0),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        compression=LifelongConfig(chunk_actions=16),
        validate_users=200,
    ),
    "tiger_codes": 64,
    "tiger_length": 20,
    "reward": TrainSessionRewardConfig(
        train=LoopConfig(batch_size=32, steps=400, log_every=100, validate_every=100, patience=0),
        evaluation=EvaluationConfig(requests=50, candidates=8),
    ),
    "align": AlignConfig(
        run=HERE,
        reward=HERE,
        beams=BeamConfig(width=32),
        train=LoopConfig(batch_size=100, steps=100, log_every=10, validate_every=100, patience=0),
        refresh_every=25,
        guard=UNGUARDED,
        keep_pairs=0,
    ),
    "judge": JudgeConfig(beam_width=32, lists=8, days=0),
    "parallel": os.cpu_count() or 1,
}
"""What --small changes in the defaults. Semantic IDs of 64 codes in place of 256: the catalogue is
small, and TIGER's codebook is smaller than OneRec's."""
