"""P-Score: how much a user prefers an item, learned from all kinds of feedback at once.

OneRec Technical Report (arXiv 2506.13695), section 2.4.1: a SIM backbone (`models/target.py`), a
tower an objective, and a last tower that fuses them into one probability p. Details that the report
leaves open follow Pantheon (arXiv 2505.13894): towers' hidden states enter the fusion behind a
stop-gradient.

Axes: B users, M items judged, O objectives, N fusions side by side, one for each set of label
weights.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax.inputs import FeatureSpec, RewardBatch
from onerec_jax.models.onerec import resolve_dtype
from onerec_jax.models.target import Head, TargetConfig, target_aware


@dataclasses.dataclass(frozen=True)
class RewardConfig(TargetConfig):
    """Size of one P-Score model; the report prints none."""

    fusion_dims: tuple[int, ...] = (128, 64)
    stop_gradient: bool = True
    """The fusion reads towers, user and item, and moves none of them."""

    LAYERS: ClassVar = ("shared_dims", "tower_dims", "fusion_dims")


class PScore(nn.Module):
    """Logits of every objective and of p for M items a user."""

    cfg: RewardConfig
    spec: FeatureSpec
    objectives: tuple[str, ...]
    content: np.ndarray
    """Float32 `[levels, V, C]`, the codebooks of the semantic IDs: an item is as its codes are."""
    fusions: int = 1
    train: bool = False

    @nn.compact
    def __call__(self, batch: RewardBatch):
        """Returns float32 logits: of the objectives `[B, M, O]`, of p `[B, M, N]`."""
        cfg, spec = self.cfg, self.spec
        dtype = resolve_dtype(cfg.compute_dtype)
        user, e_bmd, x = target_aware(cfg, spec, self.content, batch, dtype, train=self.train)
        towers = [Head(cfg.tower_dims, dtype, name=name)(x) for name in self.objectives]
        hidden, logits = zip(*towers, strict=True)
        y = jnp.concatenate([*hidden, *user, e_bmd], axis=-1)
        if cfg.stop_gradient:
            y = jax.lax.stop_gradient(y)
        fusion = nn.vmap(
            Head,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=-1,
            axis_size=self.fusions,
            metadata_params={nn.PARTITION_NAME: None},
        )
        _, p_bmn = fusion(cfg.fusion_dims, dtype, name="fusion")(y)
        return jnp.stack(logits, axis=-1), p_bmn
