"""OneRec: `p(semantic ID of the next item | user)` as one pure function.

OneRec Technical Report (arXiv 2506.13695), section 2.2: V1, point-wise. With `session_items` m
above 1 it is `p(list of m IDs | user)`, as V0 has it (arXiv 2502.18965, section 3.3): BOS and the
codes of an item, m times one after the other. Logits are float32; everything between the embeddings
and the heads runs in the model's `dtype`.
"""

import functools

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


def head_logits(h, head_dv):
    """`[..., D]` and `[D, V]` to float32 `[..., V]`."""
    return jnp.einsum("...d,dv->...v", h, head_dv, preferred_element_type=jnp.float32)


def _head_logits_backward(back, gradient):
    return jax.lax.optimization_barrier(back(gradient))


group_logits = jax.custom_vjp(head_logits)
"""`head_logits` of thousands of items a user. Its two gradients are made together: left to itself,
XLA puts that of the head off, and keeps that of the logits until the backward pass is over."""
group_logits.defvjp(functools.partial(jax.vjp, head_logits), _head_logits_backward)


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
        if cfg.session_items > 1 and cfg.session_place:
            # Last, so that the other parameters begin as they do without it.
            init = partitioned(nn.initializers.normal(0.02), None, "embed")
            self.place = self.param("place", init, (cfg.session_items, cfg.d_model))

    def embed_code(self, code, level: int):
        """Embeddings of codes of one level: int32 `[...] -> [..., D]`."""
        row = code + level * self.spec.codebook_size
        return lookup(self.sid_embedding, row, self.dtype)

    def level_logits(self, h, level: int):
        """Hidden states of position `level`, `[..., D]`, to float32 logits `[..., V]`."""
        h = self.norms[level](h).astype(self.dtype)
        head = self.heads[level].astype(self.dtype)
        # Groups go through the model as in inference, and a batch for training has few targets.
        return (head_logits if self.train else group_logits)(h, head)

    def encode(self, batch: Batch):
        """Encoded user tokens `[B, T, D]`, valid first, and their number int32 `[B]`."""
        return self.encoder(batch, self.sid_embedding, train=self.train)

    def at_place(self, x, item):
        """Input at one or more places of a list: `[..., D]` plus the embedding of `item`."""
        if self.cfg.session_items == 1 or not self.cfg.session_place:
            return x
        return x + self.place.astype(self.dtype)[item]

    def __call__(self, batch: Batch):
        """Teacher-forced logits float32 `[B, M, levels, V]` of `batch.target`; as `by_level`."""
        return jnp.stack(self.by_level(batch), axis=2)

    def by_level(self, batch: Batch) -> list[jax.Array]:
        """Teacher-forced logits of `batch.target`, float32 `[B, M, V]` for each level: of many
        targets they are gigabytes, and not to be copied into one array.

        Targets see the user, not each other. Of a model of lists the M targets are whole lists one
        after the other, or the beginning of one: an item sees those before it in its list. The
        position behind the last code of a list predicts nothing and is left out.

        Raises:
          ValueError: more targets than a list has items, and no whole lists.
        """
        z, length = self.encode(batch)
        users, targets, levels = batch.target.shape
        items = min(self.cfg.session_items, targets)
        if targets % items:
            raise ValueError(f"{targets} targets are no lists of {items} items")
        further = items > 1  # are codes of the last level ever seen?
        target = batch.target.reshape(users, targets // items, items, levels)
        bos = jnp.broadcast_to(self.bos.astype(self.dtype), (*target.shape[:3], self.cfg.d_model))
        codes = [self.embed_code(target[..., i], i) for i in range(levels - 1 + further)]
        x = self.at_place(jnp.stack([bos, *codes], axis=3), jnp.arange(items)[:, None])
        x = x.reshape(users, targets // items, -1, self.cfg.d_model)
        h = self.decoder(x[:, :, :-1] if further else x, z, length)
        logits = [self.level_logits(h[:, :, i :: levels + 1], i) for i in range(levels)]
        return [x.reshape(users, targets, -1) for x in logits]

    def start(self, batch: Batch) -> tuple[CrossCache, BeamCache]:
        """Encodes users once and returns the caches that `decode_step` needs."""
        return self.decoder.cross_cache(*self.encode(batch)), BeamCache()

    def decode_step(self, code, cross: CrossCache, cache: BeamCache, level: int, item: int = 0):
        """Logits of one level for every beam.

        Args:
          code: int32 `[B, W]`, the latest code of each beam: of level `level - 1`, or at level 0 of
            the last level of the item before. Ignored at the start, where BOS is the input.
          cross, cache: from `start` and the step before.
          item: place in the list of the item that is being decoded.

        Returns:
          Float32 logits `[B, W, V]` and the updated cache.
        """
        if level > 0:
            x = self.at_place(self.embed_code(code, level - 1), item)
            h, cache = self.decoder.step(x, cross, cache)
            return self.level_logits(h, level), cache
        bos = jnp.broadcast_to(self.bos.astype(self.dtype), (*code.shape, self.cfg.d_model))
        x = self.at_place(bos, item)
        if item == 0:
            h, cache = self.decoder.step(x, cross, cache)
            return self.level_logits(h, level), cache
        # The last code of the item before and BOS, in one pass.
        last = self.at_place(self.embed_code(code, self.spec.levels - 1), item - 1)
        h, cache = self.decoder.step(jnp.stack([last, x], axis=1), cross, cache)
        return self.level_logits(h[:, 1], level), cache.next_item()
