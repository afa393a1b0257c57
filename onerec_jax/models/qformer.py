"""The QFormer: learnable queries that compress tokens of any number into a few.

OneRec Technical Report (arXiv 2506.13695), section 2.1.1 (items: 4 queries, 4 blocks) and 2.2.1
(lifelong history: 128 queries, 2 blocks). The report prints neither residuals nor norms around the
attention; pre-norm residual blocks are our choice.

Axes: B items or users, T tokens, Q queries, D width, H heads, K head width.
"""

import flax.linen as nn
import jax.numpy as jnp

from onerec_jax.models.layers import (
    Dtype,
    FeedForward,
    Projections,
    attention,
    embedding,
    rms_norm,
)


class QFormer(nn.Module):
    """Blocks of cross-attention and feed-forward, each with its residual; no self-attention."""

    num_queries: int
    blocks: int
    num_heads: int
    ff_dim: int
    dtype: Dtype
    implementation: str = "auto"
    """Of `layers.attention`."""
    dropout: float = 0.0
    """After each sublayer, in training only."""
    activation: str = "gelu"
    """Of `layers.FeedForward`."""

    @nn.compact
    def __call__(self, v_btd, length_b, *, train=False):
        """Compresses the first `length_b` tokens of each row.

        Args:
          v_btd: `[B, T, D]`; D is the width of the queries too.
          length_b: int32 `[B]`; a row of length 0 yields the same for whatever it holds.
          train: dropout on; needs an rng `dropout` unless the rate is 0.

        Returns:
          `[B, Q, D]` in `dtype`, not normed.
        """
        d_model = v_btd.shape[-1]
        drop = nn.Dropout(self.dropout, deterministic=not train)
        query = self.param("query", *embedding(self.num_queries, d_model, axes=(None, "embed")))
        h = jnp.broadcast_to(query.astype(self.dtype), (v_btd.shape[0], self.num_queries, d_model))
        v = rms_norm(dtype=self.dtype, name="norm_kv")(v_btd)
        for i in range(self.blocks):
            maps = Projections(d_model, self.num_heads, self.dtype, name=f"attention_{i}")
            q = maps.q(rms_norm(dtype=self.dtype, name=f"norm_attention_{i}")(h))
            y = attention(
                q, maps.k(v), maps.v(v), key_length_b=length_b, implementation=self.implementation
            )
            h = h + drop(maps.o(y))
            x = rms_norm(dtype=self.dtype, name=f"norm_ff_{i}")(h)
            ff = FeedForward(self.ff_dim, self.dtype, self.activation, name=f"ff_{i}")
            h = h + drop(ff(x))
        return h
