"""Modules of the item representation: the compressor, and the caption decoder that trains it.

OneRec Technical Report (arXiv 2506.13695), section 2.1.1. The report captions with LLaMA3; a small
Transformer that reads the compressed tokens by cross-attention stands in for it here. Either is
discarded after training.

Axes: B items, T content tokens, Q queries, D width of either, S caption positions, V vocabulary.
"""

import flax.linen as nn
import jax.numpy as jnp

from onerec_jax.config import ModelConfig
from onerec_jax.models.decoder import Decoder
from onerec_jax.models.layers import Dtype, dense, embedding, partitioned, rms_norm
from onerec_jax.models.qformer import QFormer


class ItemAligner(nn.Module):
    """Content tokens of an item -> a fixed number of compressed tokens.

    Tokens come from an encoder that knew their order, so no positions are added.
    """

    queries: int
    layers: int
    heads: int
    width: int
    ff_dim: int
    dtype: Dtype
    implementation: str = "auto"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens_btd, length_b, *, train=False):
        """Compresses the first `length_b` tokens of each item.

        Args:
          tokens_btd: `[B, T, D]`, any float type and any D; what lies past the length is not read.
          length_b: int32 `[B]`.

        Returns:
          `[B, Q, width]` in `dtype`; zeros for an item without a token.
        """
        valid_bt = jnp.arange(tokens_btd.shape[1]) < length_b[:, None]
        # Attention gives padding the weight 0, and 0 times garbage may be NaN.
        x = jnp.where(valid_bt[..., None], tokens_btd, 0).astype(self.dtype)
        if x.shape[-1] != self.width:
            axes = (None, "embed")
            x = dense(self.width, axes=axes, dtype=self.dtype, name="project", use_bias=True)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        qformer = QFormer(
            self.queries,
            self.layers,
            self.heads,
            self.ff_dim,
            self.dtype,
            self.implementation,
            self.dropout,
            name="qformer",
        )
        # Without the last norm the block of one query could drown the others in a cosine.
        h = rms_norm(dtype=self.dtype, name="norm")(qformer(x, length_b, train=train))
        return jnp.where((length_b > 0)[:, None, None], h, 0)


class CaptionDecoder(nn.Module):
    """Writes the words of an item from its compressed tokens, under teacher forcing."""

    vocabulary: int
    layers: int
    heads: int
    width: int
    dtype: Dtype
    dropout: float = 0.0

    @nn.compact
    def __call__(self, z_bqd, caption_bs, *, bos: int, train=False):
        """Logits of every word given the words before it.

        Args:
          z_bqd: `[B, Q, D]`, compressed items.
          caption_bs: int32 `[B, S]`, words by number.
          bos: number of the word that begins each caption.

        Returns:
          Float32 `[B, S, V]`; position k has read `bos` and the words before k.
        """
        table = self.param("word", *embedding(self.vocabulary, self.width)).astype(self.dtype)
        init = partitioned(nn.initializers.normal(0.02), None, "embed")
        position = self.param("position", init, (caption_bs.shape[1], self.width))
        read_bs = jnp.pad(caption_bs[:, :-1], ((0, 0), (1, 0)), constant_values=bos)
        # Rows of the table have unit length: times sqrt(width), as large as a norm's output.
        x = jnp.take(table, read_bs, axis=0) * self.width**0.5 + position.astype(self.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        z = dense(self.width, axes=(None, "embed"), dtype=self.dtype, name="project")(z_bqd)
        cfg = ModelConfig(
            d_model=self.width,
            decoder_layers=self.layers,
            num_heads=self.heads,
            ff_dim=4 * self.width,
            dropout=self.dropout,
            attention="xla",  # a handful of keys: nothing for a kernel to gain
        )
        length_b = jnp.full(len(z), z.shape[1], jnp.int32)
        x = Decoder(cfg, self.dtype, train, name="decoder")(x[:, None], z, length_b)[:, 0]
        x = rms_norm(dtype=self.dtype, name="norm")(x)
        return jnp.einsum("bsd,vd->bsv", x, table, preferred_element_type=jnp.float32)
