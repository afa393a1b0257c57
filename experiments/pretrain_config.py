"""Settings of `python -m experiments.pretrain`."""

import dataclasses
import json
import pathlib
from typing import Literal

from experiments import evaluate
from onerec_jax.config import PRESETS, ModelConfig
from onerec_jax.data.lifelong import LifelongConfig
from onerec_jax.data.pipeline import PipelineConfig
from onerec_jax.data.session_lists import SessionRule
from onerec_jax.distributed import DistributedConfig
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.inputs import FeatureConfig, PositiveRule
from onerec_jax.sharding import MeshConfig
from onerec_jax.tokenizer.config import TokenizerConfig
from onerec_jax.training.loop import LoopConfig
from onerec_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Pretrain OneRec on a data set, test it and show recommendations."""

    preset: str = "tiny"
    """Model sizes to start from; --model flags change single fields."""
    data: pathlib.Path | None = None
    """Data set folder from experiments.prepare; default: MovieLens latest-small."""
    semantic_ids: pathlib.Path | None = None
    """Folder from experiments.tokenize; default: made with the --tokenizer flags."""
    vectors: pathlib.Path | None = None
    """Item vectors for the semantic IDs, .npy or .parquet; default: from the item text."""
    tokens: pathlib.Path | None = None
    """Several vectors an item for the semantic IDs, .npz; see experiments.tokenize."""
    pairs: pathlib.Path | None = None
    """Item pairs to align the semantic IDs by, .parquet; default: mined from the data set."""
    run: pathlib.Path | None = None
    """Run folder; default: runs/DATA-PRESET-HASH, one for each set of flags."""
    seed: int = 0
    model: ModelConfig = PRESETS["tiny"]
    train: LoopConfig = LoopConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    positive: PositiveRule = PositiveRule()
    features: FeatureConfig = FeatureConfig()
    lifelong: pathlib.Path | None = None
    """Compressed lives from experiments.compress; default: made with the --compression flags from
    the semantic IDs' own vectors, where some life is longer than --model.lifelong-length."""
    compression: LifelongConfig = LifelongConfig()
    """Of lives made here; the most clusters are --model.lifelong-length."""
    targets: Literal["all", "positive", "sessions"] = "all"
    """What to predict, in training and test: all actions, as the report has it, or positive
    feedback; or lists of items as good sessions were (OneRec V0), tested on the next action."""
    sessions: SessionRule = SessionRule()
    """Of --targets sessions."""
    pipeline: PipelineConfig = PipelineConfig()
    evaluation: evaluate.EvaluationConfig = evaluate.EvaluationConfig()
    validate_users: int = 2000
    """Users, or session lists, in each validation, drawn once by the seed; 0 = all."""
    validate_beam_width: int = 20
    select_by: Literal["loss", "ndcg@10"] = "loss"
    """What the best checkpoint and the early stop go by. With few validation users the loss is the
    steadier of the two: NDCG@10 of 671 users has a standard error of 0.005."""
    mesh: MeshConfig = MeshConfig()
    distributed: bool = False
    """Run as one of several processes; see docs/scaling.md."""
    cluster: DistributedConfig = DistributedConfig()
    deterministic: bool = False
    """On a GPU: the same bits every time, by slower kernels."""
    profile: pathlib.Path | None = None
    """Folder for a profiler trace of three steps, to be opened with xprof or Perfetto."""
    describe: bool = False
    """Print parameters and FLOPs by part and memory a device, and stop."""

    def __post_init__(self):
        require_at_least(self, "", seed=0, validate_users=0, validate_beam_width=1)
        items = self.sessions.items if self.targets == "sessions" else 1
        if self.model.session_items not in (1, items):
            raise InputError(
                f"--model.session-items {self.model.session_items}: leave it out, it follows from "
                "--targets sessions and --sessions.items"
            )
        model = dataclasses.replace(self.model, session_items=items)
        object.__setattr__(self, "model", model)


DEMO = {
    # A budget for two CPU cores: about three passes over MovieLens latest-small. Smaller data sets
    # stop early, larger ones want more steps.
    "train": LoopConfig(batch_size=64, steps=5000, log_every=250, validate_every=1000),
    "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=200),
    # Most users of MovieLens rated all their films on one day.
    "compression": LifelongConfig(chunk_actions=16),
}
"""What the `tiny` preset changes in the training defaults, which are meant for real sizes."""


def settings(config: PretrainConfig) -> dict:
    """All that the result depends on, as JSON; the mesh may change between sessions."""
    values = dataclasses.asdict(config)
    apart = ("run", "mesh", "distributed", "cluster", "describe", "profile", "evaluation", "data")
    # How IDs and lives were made matters through their fingerprints, which are part of the run.
    made = ("semantic_ids", "vectors", "tokens", "pairs", "tokenizer", "lifelong", "compression")
    for name in apart + made:
        del values[name]
    del values["pipeline"]["workers"]
    if config.targets != "sessions":
        del values["sessions"]
    return json.loads(json.dumps(values))
