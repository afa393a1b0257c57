"""Settings that the studies of post-training and of sessions share."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from experiments import pretrain
from onerec_jax.config import PRESETS
from onerec_jax.data.lifelong import LifelongConfig
from onerec_jax.data.pipeline import PipelineConfig
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.run import settings_hash
from onerec_jax.tokenizer.config import TokenizerConfig
from onerec_jax.training.loop import LoopConfig
from onerec_jax.training.optimizer import OptimizerConfig

HERE = pathlib.Path()
"""Stands for the runs that a study itself fills in."""


@dataclasses.dataclass(frozen=True)
class FilledIn:
    """Mixed into the settings of a stage, `from_run.FromRunConfig`: the study names the folders."""

    run: tyro.conf.Suppress[pathlib.Path] = HERE
    reward: tyro.conf.Suppress[pathlib.Path] = HERE
    judge: tyro.conf.Suppress[pathlib.Path | None] = None
    out: tyro.conf.Suppress[pathlib.Path | None] = None

    def refuse_named(self, flag: str) -> None:
        """Raises InputError if one is given all the same."""
        for field in dataclasses.fields(FilledIn):
            if getattr(self, field.name) != field.default:
                raise InputError(
                    f"{flag}.{field.name}: a study makes its runs itself, leave it out"
                )


@dataclasses.dataclass(frozen=True)
class RunsConfig:
    """What a study runs, and where."""

    small: bool = False
    """Sizes for two CPU cores in place of those for a GPU."""
    arms: tuple[str, ...] = ()
    """Which to run, the one that the others are compared with among them; default: all."""
    seeds: int = 5
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


START = pretrain.PretrainConfig(
    preset="v1-0.015b",
    model=PRESETS["v1-0.015b"],
    targets="positive",
    tokenizer=TokenizerConfig(codebook_size=8192),
    pipeline=PipelineConfig(targets_per_user=8),
    train=LoopConfig(batch_size=128, steps=6000, validate_every=1000, patience=0),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500),
    validate_users=500,
)
"""The pretraining of a GPU's studies."""
SMALL_START = pretrain.PretrainConfig(
    targets="positive",
    # 2,097,152 IDs for 1,000 items: legality is something to be learned.
    tokenizer=TokenizerConfig(codebook_size=128),
    pipeline=PipelineConfig(targets_per_user=8),
    train=LoopConfig(batch_size=32, steps=500, log_every=100, validate_every=250, patience=0),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
    compression=LifelongConfig(chunk_actions=16),
    validate_users=200,
)
"""That of two CPU cores."""

Changes = Mapping[str, Any]
"""Dotted field of a config -> value, such as {"policy.delta": 0.5}."""


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


def of_arm(
    config,
    changes: Changes,
    runs: pathlib.Path,
    *,
    run,
    reward,
    seed: int,
    apart: Sequence[str] = (),
):
    """The settings of a stage, a `FilledIn`, for an arm and seed.

    Nothing is chosen by a validation: the last step is what is judged.

    Args:
      runs: the run becomes a folder of it, named by all that it depends on.
      run, reward: folders of the start, which are so too.
      apart: fields that the result does not depend on.
    """
    values = changed(config, changes)
    train = dataclasses.replace(values.train, validate_every=values.train.steps, patience=0)
    values = dataclasses.replace(values, run=run, reward=reward, seed=seed, train=train)
    named = {k: v for k, v in dataclasses.asdict(values).items() if k not in apart}
    return dataclasses.replace(values, out=runs / f"arm-{settings_hash(named)}-{seed}")


def no_validation(variables) -> dict[str, float]:
    """In place of a stage's validation, where the last step is what is judged."""
    return {"loss": 0.0, "score": 0.0}
