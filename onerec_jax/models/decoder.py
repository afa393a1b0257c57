"""The decoder: BOS and codes, causal self-attention, cross-attention to the user, experts.

OneRec Technical Report (arXiv 2506.13695), section 2.2.2. The report prints a norm before the
experts only; pre-norm before all three sublayers is our choice.

Axes: B users, M targets (or lists of them), S code positions, W beams, P positions of a beam, T
encoder tokens (or positions of earlier items), H heads, K head width, L layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from onerec_jax.config import ModelConfig
from onerec_jax.models.layers import Dtype, FeedForward, Projections, attention, rms_norm
from onerec_jax.models.moe import make_experts


@struct.dataclass
class CrossCache:
    """Keys and values of the encoded user, once for all beams."""

    k: jax.Array  # [groups, blocks, B, T, H, K]
    v: jax.Array  # likewise
    length: jax.Array  # int32 [B]


@struct.dataclass
class BeamCache:
    """Keys and values of the codes decoded so far.

    Those of the item that is being decoded lie position by position. A position has a copy for
    every beam, or one for all: that of the first BOS, of which all beams are made. Those of earlier
    items of a list lie in one array each.
    """

    k: tuple[jax.Array, ...] = ()  # each [groups, blocks, B, W or 1, H, K]
    v: tuple[jax.Array, ...] = ()  # likewise
    past: tuple[jax.Array, ...] = ()  # keys and values [groups, blocks, B, W, T, H, K]; or nothing

    def take(self, parent_bw):
        """The caches of the beams that survive: `parent_bw` int32 `[B, W']`."""

        def gather(x):
            if x.shape[3] == 1:
                return x
            index = parent_bw.reshape(1, 1, *parent_bw.shape, *(1,) * (x.ndim - 4))
            return jnp.take_along_axis(x, index, axis=3)

        return jax.tree.map(gather, self)

    def next_item(self) -> "BeamCache":
        """All positions but the last, which is the BOS of the next item, become past."""

        def join(positions, past):
            done = jnp.stack(
                [jnp.broadcast_to(x, positions[-1].shape) for x in positions[:-1]], axis=4
            )
            return jnp.concatenate([*past, done], axis=4)

        past = join(self.k, self.past[:1]), join(self.v, self.past[1:])
        return BeamCache(self.k[-1:], self.v[-1:], past)


def attend_positions(q_bwhk, keys, values, past=()):
    """Attention of every beam to a few positions, each `[B, W or 1, H, K]`, in float32.

    Sums of products, for as matrix products they would be of one row and a few columns.

    Args:
      past: further keys and values, `[B, W, T, H, K]` each.
    """
    q_bwhk = q_bwhk.astype(jnp.float32) * q_bwhk.shape[-1] ** -0.5
    score = jnp.stack([(q_bwhk * k.astype(jnp.float32)).sum(-1) for k in keys])
    if past:
        earlier = (q_bwhk[:, :, None] * past[0].astype(jnp.float32)).sum(-1)
        score = jnp.concatenate([score, jnp.moveaxis(earlier, 2, 0)])
    weight = jax.nn.softmax(score, axis=0)[..., None]
    here, before = weight[: len(keys)], weight[len(keys) :]
    y_bwhk = sum(w * v.astype(jnp.float32) for w, v in zip(here, values, strict=True))
    if past:
        y_bwhk = y_bwhk + (jnp.moveaxis(before, 0, 2) * past[1].astype(jnp.float32)).sum(2)
    return y_bwhk


class DecoderBlock(nn.Module):
    """One layer; all positions at once (`__call__`) or the next ones of many beams (`step`)."""

    cfg: ModelConfig
    dtype: Dtype
    train: bool
    with_experts: bool

    def setup(self):
        cfg = self.cfg
        self.self_attention = Projections(cfg.d_model, cfg.num_heads, self.dtype)
        self.cross_attention = Projections(cfg.d_model, cfg.num_heads, self.dtype)
        self.norm_self = rms_norm(dtype=self.dtype, name="norm_self")
        self.norm_cross = rms_norm(dtype=self.dtype, name="norm_cross")
        self.norm_ff = rms_norm(dtype=self.dtype, name="norm_ff")
        self.drop = nn.Dropout(cfg.dropout, deterministic=not self.train)
        if self.with_experts:
            self.experts = make_experts(cfg, self.dtype, name="experts")
        else:
            self.ff = FeedForward(cfg.ff_dim, self.dtype, cfg.activation)

    def feed_forward(self, x):
        x = self.norm_ff(x)
        if not self.with_experts:
            return self.ff(x)
        # Outside training a user's result must not depend on who else is in the batch.
        return self.experts(x, dropless=not self.train)

    def cross(self, x_bsd, k_bthk, v_bthk, length_b):
        q = self.cross_attention.q(self.norm_cross(x_bsd))
        y = attention(q, k_bthk, v_bthk, key_length_b=length_b, implementation=self.cfg.attention)
        return self.drop(self.cross_attention.o(y))

    def cross_kv(self, z_btd):
        """Keys and values of the encoder output for this layer, `[B, T, H, K]` each."""
        return self.cross_attention.k(z_btd), self.cross_attention.v(z_btd)

    def __call__(self, x_bmsd, context):
        """Teacher forcing: `x [B, M, S, D]`, context = (encoder output `[B, T, D]`, length `[B]`).

        Targets see themselves and the user, not each other.
        """
        z_btd, length_b = context
        b, m, s, d = x_bmsd.shape
        maps = self.self_attention
        x = self.norm_self(x_bmsd).reshape(b * m, s, d)
        # At a few positions a kernel gains nothing over XLA, and cuDNN refuses odd lengths.
        y = attention(maps.q(x), maps.k(x), maps.v(x), causal=True)
        x_bsd = x_bmsd.reshape(b, m * s, d) + self.drop(maps.o(y)).reshape(b, m * s, d)
        x_bsd = x_bsd + self.cross(x_bsd, *self.cross_kv(z_btd), length_b)
        x_bsd = x_bsd + self.drop(self.feed_forward(x_bsd))
        return x_bsd.reshape(b, m, s, d)

    def step(self, x_bpwd, caches, length_b):
        """The next positions of every beam, `x [B, P, W, D]`; returns their keys and values too.

        A position sees those before it, of the P too.
        """
        (cross_k, cross_v), (keys, values), past = caches
        b, p, w, d = x_bpwd.shape
        maps = self.self_attention
        x_brd = x_bpwd.reshape(b, p * w, d)
        x = self.norm_self(x_brd)
        k, v, q = (
            project(x).reshape(b, p, w, -1, self.cfg.head_dim)
            for project in (maps.k, maps.v, maps.q)
        )
        y = [
            attend_positions(
                q[:, i],
                (*keys, *(k[:, j] for j in range(i + 1))),
                (*values, *(v[:, j] for j in range(i + 1))),
                past,
            )
            for i in range(p)
        ]
        y = jnp.stack(y, axis=1).reshape(b, p * w, *y[0].shape[2:])
        x_brd = x_brd + maps.o(y.astype(self.dtype))
        x_brd = x_brd + self.cross(x_brd, cross_k, cross_v, length_b)
        x_brd = x_brd + self.feed_forward(x_brd)
        return x_brd.reshape(b, p, w, d), (k, v)


class DecoderGroup(nn.Module):
    """What the scan repeats: `expert_every` blocks, of which the last may have experts."""

    cfg: ModelConfig
    dtype: Dtype
    train: bool

    def setup(self):
        cfg = self.cfg
        last = cfg.expert_every - 1
        self.blocks = [
            DecoderBlock(
                cfg, self.dtype, self.train, cfg.num_experts > 0 and i == last, name=f"block_{i}"
            )
            for i in range(cfg.expert_every)
        ]

    def __call__(self, x_bmsd, _, context):
        for block in self.blocks:
            x_bmsd = block(x_bmsd, context)
        return x_bmsd, None

    def cross_kv(self, z_btd, _, context):
        """Keys and values of the encoder output, `[blocks, B, T, H, K]` each."""
        pairs = [block.cross_kv(z_btd) for block in self.blocks]
        return z_btd, tuple(jnp.stack(x) for x in zip(*pairs, strict=True))

    def step(self, x_bpwd, caches, length_b):
        """As `DecoderBlock.step`; every cache has a leading axis of blocks."""
        new = []
        for i, block in enumerate(self.blocks):
            x_bpwd, cache = block.step(x_bpwd, jax.tree.map(lambda x, i=i: x[i], caches), length_b)
            new.append(cache)
        return x_bpwd, jax.tree.map(lambda *x: jnp.stack(x), *new)


class Decoder(nn.Module):
    """A scanned stack of `DecoderGroup`s."""

    cfg: ModelConfig
    dtype: Dtype
    train: bool = False

    def setup(self):
        cfg = self.cfg
        group: Any = DecoderGroup
        if cfg.remat:
            group = nn.remat(group, prevent_cse=False, methods=["__call__"])
        groups = cfg.decoder_layers // cfg.expert_every
        stack = nn.scan(
            group,
            variable_axes={"params": 0, "router": 0, "router_stats": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=groups,
            unroll=groups if cfg.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
            methods=["__call__", "cross_kv", "step"],
        )
        self.layers = stack(cfg, self.dtype, self.train)

    def __call__(self, x_bmsd, z_btd, length_b):
        """Hidden states `[B, M, S, D]` of all positions under teacher forcing."""
        return self.layers(x_bmsd, None, (z_btd, length_b))[0]

    def cross_cache(self, z_btd, length_b) -> CrossCache:
        _, (k, v) = self.layers.cross_kv(z_btd, None, length_b)
        return CrossCache(k, v, length_b)

    def step(self, x, cross: CrossCache, cache: BeamCache):
        """The next position of every beam, or several one after the other.

        Args:
          x: `[B, W, D]`, or `[B, P, W, D]`.

        Returns:
          Hidden states in the shape of `x`, and the longer cache.
        """
        x_bpwd = x if x.ndim == 4 else x[:, None]
        caches = (cross.k, cross.v), (cache.k, cache.v), cache.past
        h_bpwd, (k, v) = self.layers.step(x_bpwd, caches, cross.length)
        k, v = ([new[:, :, :, i] for i in range(x_bpwd.shape[1])] for new in (k, v))
        return h_bpwd.reshape(x.shape), BeamCache((*cache.k, *k), (*cache.v, *v), cache.past)
