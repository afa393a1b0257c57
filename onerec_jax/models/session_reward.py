"""Session reward: what a user makes of a whole list of items, by several heads.

OneRec V0 (arXiv 2502.18965), reward model R(u, S): every item is seen by the user
(`models/target.py`), the items of a session attend to each other, and their sum goes to a
tower for each of session watch time (swt), views (vtr), follows (wtr) and likes (ltr). What came of
the single items may be learned along: sessions are few where logs are small.

Axes: B users, W sessions of each, S items of a session, M = W * S items judged, D width, O heads.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from onerec_jax.inputs import FeatureSpec, RewardBatch
from onerec_jax.models.layers import Projections, attention, dense, rms_norm
from onerec_jax.models.onerec import resolve_dtype
from onerec_jax.models.target import Head, TargetConfig, target_aware


@dataclasses.dataclass(frozen=True)
class SessionRewardConfig(TargetConfig):
    """Size of one session reward model; the paper prints none."""

    residual: bool = True
    """Add what items say of each other to what they are, behind a norm. As the paper prints it, the
    sum is over the attention's results alone."""


class SessionReward(nn.Module):
    """Logits of every head for W sessions a user. No position: a session is a set."""

    cfg: SessionRewardConfig
    spec: FeatureSpec
    heads: tuple[str, ...]
    content: np.ndarray
    """Float32 `[levels, V, C]`, the codebooks of the semantic IDs."""
    length: int
    """Items of a session, S."""
    objectives: tuple[str, ...] = ()
    """What is predicted of single items beside, to learn from along the way."""
    train: bool = False

    @nn.compact
    def __call__(self, batch: RewardBatch):
        """Logits of W * S items a user, session after session.

        Returns:
          Float32 `[B, W, O]`, and of the single items `[B, M, objectives]` (None without any).
        """
        cfg, dtype = self.cfg, resolve_dtype(self.cfg.compute_dtype)
        _, _, x = target_aware(cfg, self.spec, self.content, batch, dtype, train=self.train)
        users, items = x.shape[:2]
        towers = [Head(cfg.tower_dims, dtype, name=f"item_{k}")(x)[1] for k in self.objectives]
        e = dense(cfg.d_model, axes=(None, None), dtype=dtype, name="e", use_bias=True)(x)
        e = e.reshape(users * (items // self.length), self.length, cfg.d_model)
        maps = Projections(cfg.d_model, cfg.num_heads, dtype, name="attention")
        h = rms_norm(dtype=dtype, name="norm")(e) if cfg.residual else e
        h = maps.o(attention(maps.q(h), maps.k(h), maps.v(h)))
        h = (e + h if cfg.residual else h).sum(1)
        found = [Head(cfg.tower_dims, dtype, name=name)(h)[1] for name in self.heads]
        session_bwo = jnp.stack(found, axis=-1).reshape(users, -1, len(self.heads))
        return session_bwo, jnp.stack(towers, axis=-1) if towers else None
