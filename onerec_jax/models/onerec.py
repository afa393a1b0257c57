"""OneRec V1: `p(semantic ID of the next item | user)` as one pure function.

OneRec Technical Report (arXiv 2506.13695), section 2.2. Logits are float32; everything between the
embeddings and the heads runs in the model's `dtype`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from onerec_jax.config import ModelConfig
from onerec_jax.inputs import Batch, FeatureSpec
from onerec_jax.models.decoder import BeamCache, CrossCache, Decoder
from onerec_jax.models.encoder import Encoder
from onerec_jax.models.layers import embedding, lookup, partitioned, rms_norm


def resolve_dtype(name: str):
    """The compute type behind `ModelConfig.compute_dtype`; "auto" looks at the backend."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


class OneRec(nn.Module):
    """Encoder, MoE decoder and one output head a level.

    Level l's codes have their own embedding rows, shared between the history and the decoder's
    input (report, section 4.2.2), and their own head (RMSNorm and a linear map).
    """

    cfg: ModelConfig
    spec: FeatureSpec
    train: bool = False
    """Dropout on, and experts under the capacity limit; otherwise neither."""

    def setup(self):
        cfg, spec = self.cfg, self.spec
        self.dtype = resolve_dtype(cfg.compute_dtype)
        self.sid_embedding = self.param(
            "sid_embedding", *embedding(spec.levels * spec.codebook_size, cfg.d_model)
        )
        self.bos = self.param(
            "bos", partitioned(nn.initializers.normal(0.02), "embed"), (cfg.d_model,)
        )
        self.encoder = Encoder(cfg, spec, self.dtype)
        self.decoder = Decoder(cfg, self.dtype, self.train)
        self.norms = [rms_norm(dtype=jnp.float32, name=f"norm_{i}") for i in range(spec.levels)]
        init = partitioned(
            nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0),
            None,
            "embed",
            "codes",
        )
        self.heads = self.param("heads", init, (spec.levels, cfg.d_model, spec.codebook_size))

    def embed_code(self, code, level: int):
        """Embeddings of codes of one level: int32 `[...] -> [..., D]`."""
        row = code + level * self.spec.codebook_size
        return lookup(self.sid_embedding, row, self.dtype)

    def level_logits(self, h, level: int):
        """Hidden states of position `level`, `[..., D]`, to float32 logits `[..., V]`."""
        h = self.norms[level](h).astype(self.dtype)
        head = self.heads[level].astype(self.dtype)
        return jnp.einsum("...d,dv->...v", h, head, preferred_element_type=jnp.float32)

    def encode(self, batch: Batch):
        """Encoded user tokens `[B, T, D]`, valid first, and their number int32 `[B]`."""
        return self.encoder(batch, self.sid_embedding, train=self.train)

    def __call__(self, batch: Batch):
        """Teacher-forced logits float32 `[B, M, levels, V]` of `batch.target`."""
        z, length = self.encode(batch)
        users, targets, levels = batch.target.shape
        bos = jnp.broadcast_to(self.bos.astype(self.dtype), (users, targets, self.cfg.d_model))
        inputs = [bos] + [self.embed_code(batch.target[..., i], i) for i in range(levels - 1)]
        h = self.decoder(jnp.stack(inputs, axis=2), z, length)
        return jnp.stack([self.level_logits(h[:, :, i], i) for i in range(levels)], axis=2)

    def start(self, batch: Batch) -> tuple[CrossCache, BeamCache]:
        """Encodes users once and returns the caches that `decode_step` needs."""
        return self.decoder.cross_cache(*self.encode(batch)), BeamCache()

    def decode_step(self, code, cross: CrossCache, cache: BeamCache, level: int):
        """Logits of one level for every beam.

        Args:
          code: int32 `[B, W]`, the code of level `level - 1` of each beam; ignored at level 0,
            where BOS is the input.
          cross, cache: from `start` and the step before.

        Returns:
          Float32 logits `[B, W, V]` and the updated cache.
        """
        if level == 0:
            x = jnp.broadcast_to(self.bos.astype(self.dtype), (*code.shape, self.cfg.d_model))
        else:
            x = self.embed_code(code, level - 1)
        h, cache = self.decoder.step(x, cross, cache)
        return self.level_logits(h, level), cache
