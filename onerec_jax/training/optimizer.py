"""AdamW with warm-up, decay and clipping, all by Optax."""

import dataclasses
from typing import Literal

import jax
import optax

from onerec_jax.errors import require_at_least

TABLES = {"sid_embedding", "features", "static_features"}
"""Parameters, and modules of little else, of which a step reads a few rows: the report's sparse."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The Technical Report names no optimizer for V1; V0 used Adam at 2e-4."""

    learning_rate: float = 2e-4
    """Peak, after warm-up."""
    warmup_steps: int = 1000
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Course from the peak to `final_fraction` of it at the last step."""
    final_fraction: float = 0.1
    weight_decay: float = 0.01
    """On matrices and tables; norms and biases are left alone."""
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.98

    def __post_init__(self):
        zeros = ("learning_rate", "warmup_steps", "final_fraction", "weight_decay", "clip_norm")
        require_at_least(self, "optimizer.", **dict.fromkeys(zeros, 0))


def learning_rate_schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then `cfg.decay`, over `steps` in all."""
    peak, warmup = cfg.learning_rate, min(cfg.warmup_steps, steps)
    rest = max(steps - warmup, 1)
    end = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=cfg.final_fraction),
        "linear": optax.linear_schedule(peak, peak * cfg.final_fraction, rest),
        "constant": optax.constant_schedule(peak),
    }[cfg.decay]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), end], [warmup])


def make_optimizer(
    cfg: OptimizerConfig, steps: int, *, sparse_learning_rate: float | None = None
) -> optax.GradientTransformation:
    """The gradient transformation of a run of `steps` steps.

    Args:
      sparse_learning_rate: peak for embedding tables; None: as all else.
    """

    def named(chosen):
        def mask(params):
            def of(path, _):
                names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
                return chosen(set(names))

            return jax.tree_util.tree_map_with_path(of, params)

        return mask

    scaled = []
    if sparse_learning_rate is not None:
        # The last of all: what AdamW gives is in proportion to its learning rate.
        ratio = sparse_learning_rate / cfg.learning_rate
        scaled = [optax.masked(optax.scale(ratio), named(lambda names: bool(TABLES & names)))]
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(
            learning_rate_schedule(cfg, steps),
            b1=cfg.b1,
            b2=cfg.b2,
            weight_decay=cfg.weight_decay,
            mask=named(lambda names: not {"scale", "bias", "bos"} & names),
        ),
        *scaled,
    )
