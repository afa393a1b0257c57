"""Settings of the study of session-wise generation, in two sizes: a GPU's, and two CPU cores'."""

import dataclasses
import os
from typing import Any

from experiments import pretrain
from experiments.align import AlignConfig, GuardConfig
from experiments.studies.session_judge import JudgeConfig
from experiments.studies.study_config import SMALL_START, START, FilledIn, RunsConfig, changed
from experiments.train_session_reward import EvaluationConfig, TrainSessionRewardConfig
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.posttraining.pairs import BeamConfig
from onerec_jax.training.loop import LoopConfig

UNGUARDED = GuardConfig(chosen_loss=1e9, legality=0)
"""A collapse is a result here."""
FIVE_TARGETS = {"pipeline.targets_per_user": 5}
"""As many as a list of the session-wise run has."""


@dataclasses.dataclass(frozen=True)
class StudyAlignConfig(FilledIn, AlignConfig):
    """Alignment within a study."""


@dataclasses.dataclass(frozen=True)
class StudyConfig(RunsConfig):
    """Compare lists by session-wise and point-wise models on the simulated platform."""

    world: WorldConfig = WorldConfig(users=3000, items=20_000, actions=200)
    """The platform, simulated if its log is not there yet; split by time."""
    start: pretrain.PretrainConfig = changed(START, FIVE_TARGETS)
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
    align: StudyAlignConfig = StudyAlignConfig(
        train=LoopConfig(batch_size=200, steps=2000, log_every=20, validate_every=2000, patience=0),
        refresh_every=250,
        guard=UNGUARDED,
        keep_pairs=0,
    )
    """The alignment of every aligned arm, but for what the arm changes."""
    judge: JudgeConfig = JudgeConfig()

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, "", tiger_codes=2, tiger_length=1)
        self.align.refuse_named("--align")
        if self.start.targets == "sessions":
            raise InputError("--start.targets sessions: --start is the point-wise run")
        if self.start.sessions.items != self.reward.items:
            raise InputError(
                f"--start.sessions.items {self.start.sessions.items} and --reward.items "
                f"{self.reward.items}: give both the same"
            )
        named = (self.start.data, self.start.run)
        named += (self.reward.run, self.reward.data, self.reward.out)
        if any(named):
            raise InputError("--start and --reward name no folders in a study: leave them out")

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
    "start": changed(SMALL_START, FIVE_TARGETS),
    "tiger_codes": 64,
    "tiger_length": 20,
    "reward": TrainSessionRewardConfig(
        train=LoopConfig(batch_size=32, steps=400, log_every=100, validate_every=100, patience=0),
        evaluation=EvaluationConfig(requests=50, candidates=8),
    ),
    "align": StudyAlignConfig(
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
