"""What a user's history says of items: the ground that scores of items and of sessions share.

A SIM backbone (arXiv 2006.05639): of the history those entries that are most like an item are
searched out, the latest are read in any case, and each part answers the item by target attention.

Axes: B users, M items judged, T history entries, H heads, K head width, D width.
"""

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from onerec_jax.config import PathwayName
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.inputs import TIME_BUCKETS, FeatureSpec, Pathway, RewardBatch
from onerec_jax.models.encoder import PathwayMLP, StaticFeatures, embed_sid
from onerec_jax.models.layers import Dtype, dense, embedding, leaky_relu, lookup, partitioned

SMALL = 0.1
"""Scale at which items' own embeddings begin: content is to speak until exposures have."""
HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """Size of what is read of a history and of items."""

    d_model: int = 64
    """Width D of items and history entries."""
    num_heads: int = 4
    history_length: int = 256
    """Latest actions that are searched for those relevant to an item."""
    top_k: int = 32
    """Actions that the search keeps, by likeness of content."""
    recent_length: int = 32
    """Latest actions that are read whatever they are about."""
    item_dim: int = 16
    """Width of an item's own embedding: narrow, for a hundred clicks tell little more than that."""
    author_dim: int = 32
    feature_dim: int = 16
    """Width of the tag, playtime and duration embeddings."""
    static_dim: int = 8
    """Width of each static user feature's embedding."""
    shared_dims: tuple[int, ...] = (256, 128)
    """Hidden widths under all towers."""
    tower_dims: tuple[int, ...] = (64, 32)
    item_dropout: float = 0.1
    """Share of items whose own embedding is hidden in training, so that content has to do: it is
    all there is of an item that was never shown."""
    dropout: float = 0.2
    """In the layers under the towers."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPU and TPU, float32 on CPU. Master weights are always float32."""

    LAYERS: ClassVar = ("shared_dims", "tower_dims")
    """Fields that are the hidden widths of an MLP."""

    def __post_init__(self):
        for name in self.LAYERS:  # JSON gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--model.{flag} {getattr(self, name)}: give widths from 1 on")
        ones = ("d_model", "num_heads", "history_length", "top_k", "recent_length")
        widths = ("item_dim", "author_dim", "feature_dim", "static_dim")
        require_at_least(self, "model.", **dict.fromkeys(ones + widths, 1))
        require_at_least(self, "model.", item_dropout=0, dropout=0)
        if self.d_model % self.num_heads:
            raise InputError(
                f"--model.d-model {self.d_model} is no multiple of --model.num-heads "
                f"{self.num_heads}: change one of them"
            )

    def slots(self, pathway: PathwayName) -> int:
        """Interactions that a pathway of `BatchBuilder` holds: one long one, no others."""
        return self.history_length if pathway == "lifelong" else 0


class ItemEmbedding(nn.Module):
    """What an item is, shown before or to be judged: `[..., D]`. One set of tables for both."""

    cfg: TargetConfig
    spec: FeatureSpec
    dtype: Dtype

    @nn.compact
    def __call__(self, items: Pathway, content, *, train=False):
        """`content`: float `[..., C]`, what the codes say of the items."""
        cfg, spec = self.cfg, self.spec
        size = spec.levels * spec.codebook_size
        sid = self.param("sid", *embedding(size, cfg.d_model))
        parts = [
            content.astype(self.dtype),
            embed_sid(sid, items.sid, spec.codebook_size, self.dtype),
        ]

        def add(name, index, size, width, scale=1.0):
            init, shape = embedding(size, width)
            part = lookup(self.param(name, _scaled(init, scale), shape), index, self.dtype)
            parts.append(jnp.where((index > 0)[..., None], part, 0))  # 0: unknown

        index = items.item
        if train and cfg.item_dropout:
            hidden = jax.random.bernoulli(self.make_rng("dropout"), cfg.item_dropout, index.shape)
            index = jnp.where(hidden, 0, index)
        add("item", index, spec.num_items + 1, cfg.item_dim, SMALL)
        if spec.num_authors:
            add("author", items.author, spec.num_authors + 1, cfg.author_dim)
        if spec.tags:
            add("tag", items.tags, len(spec.tags) + 1, cfg.feature_dim)
            count = jnp.maximum((items.tags > 0).sum(-1, keepdims=True), 1)
            parts[-1] = parts[-1].sum(-2) / count.astype(self.dtype)
        if spec.has_duration:
            add("duration", items.duration, TIME_BUCKETS, cfg.feature_dim)
        return _layer(cfg.d_model, self.dtype, "out")(jnp.concatenate(parts, axis=-1))


def _scaled(init, factor):
    return lambda *args: jax.tree.map(lambda x: factor * x, init(*args))


class HistoryEntry(nn.Module):
    """An item and what the user made of it: `[B, T, D]`."""

    cfg: TargetConfig
    spec: FeatureSpec
    dtype: Dtype

    @nn.compact
    def __call__(self, e_btd, history: Pathway):
        cfg, spec, parts = self.cfg, self.spec, [e_btd]
        if spec.has_playtime:
            table = self.param("playtime", *embedding(TIME_BUCKETS, cfg.feature_dim))
            parts.append(lookup(table, history.playtime, self.dtype))
        if spec.labels:
            parts.append(history.label.astype(self.dtype))
        f = jnp.concatenate(parts, axis=-1)
        return PathwayMLP(2 * cfg.d_model, cfg.d_model, self.dtype, name="mlp")(f)


class TargetAttention(nn.Module):
    """Each item asks a part of the history; how long ago counts by a bias of each head."""

    num_heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, e_bmd, h_btd, allowed_bmt, likeness_bmt, gap_bmt, rank_bmt):
        """Attends to the allowed entries.

        Args:
          likeness_bmt: float32, cosine of the contents of item and entry.
          gap_bmt, rank_bmt: int32, buckets of the time and of the actions in between.

        Returns:
          `[B, M, D]`, zeros for an item that may see nothing; and `[B, M, H]`, how much it saw:
          log(1 + sum of the unnormalised weights). DIN (arXiv 1706.06978) leaves weights
          unnormalised for the sake of that.
        """
        width = h_btd.shape[-1]
        heads = (self.num_heads, width // self.num_heads)

        def split(name, x):
            return dense(heads, axes=("embed", "heads", "kv"), dtype=self.dtype, name=name)(x)

        logit_bhmt = jnp.einsum(
            "bmhk,bthk->bhmt",
            split("q", e_bmd),
            split("k", h_btd),
            preferred_element_type=jnp.float32,
        )
        scale_h = self.param(
            "likeness", partitioned(nn.initializers.constant(4.0), None), heads[:1]
        )
        logit_bhmt *= heads[1] ** -0.5
        logit_bhmt += scale_h[:, None, None] * likeness_bmt[:, None]
        for name, bucket_bmt in (("gap", gap_bmt), ("rank", rank_bmt)):
            table = self.param(name, *embedding(TIME_BUCKETS, self.num_heads, axes=(None, None)))
            bias_bmth = lookup(table, bucket_bmt, jnp.float32)
            logit_bhmt += jnp.moveaxis(bias_bmth, -1, 1)
        allowed = allowed_bmt[:, None]
        peak = jnp.max(logit_bhmt, -1, keepdims=True, where=allowed, initial=-1e9)
        peak = jax.lax.stop_gradient(peak)
        weight = jnp.exp(jnp.where(allowed, logit_bhmt - peak, -jnp.inf))
        total = weight.sum(-1, keepdims=True)
        evidence_bhm = jnp.logaddexp(0, jnp.log(jnp.maximum(total, 1e-9)) + peak)[..., 0]
        weight /= jnp.maximum(total, 1e-9)
        y = jnp.einsum("bhmt,bthk->bmhk", weight.astype(self.dtype), split("v", h_btd))
        return y.reshape(*y.shape[:2], width), jnp.moveaxis(evidence_bhm, 1, -1).astype(self.dtype)


class MLP(nn.Module):
    """Linear maps with LeakyReLU in between and after the last."""

    widths: tuple[int, ...]
    dtype: Dtype
    dropout: float = 0.0
    train: bool = False

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = leaky_relu(_layer(width, self.dtype, f"layer_{i}")(x))
            x = nn.Dropout(self.dropout, deterministic=not self.train)(x)
        return x


class Head(nn.Module):
    """An MLP and one logit: its last hidden states and float32 `[...]`."""

    widths: tuple[int, ...]
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        h = MLP(self.widths, self.dtype, name="mlp")(x)
        return h, _layer(1, jnp.float32, "logit")(h.astype(jnp.float32))[..., 0]


def _layer(width, dtype, name):
    return dense(width, axes=(None, None), dtype=dtype, name=name, use_bias=True)


def log_bucket(count):
    """Two buckets an octave, as `data.features.log_bucket`; int32 from 0 on -> int32."""
    bucket = 1 + jnp.floor(2 * jnp.log2(1 + jnp.maximum(count, 0).astype(jnp.float32)))
    return jnp.minimum(bucket.astype(jnp.int32), TIME_BUCKETS - 1)


def target_aware(
    cfg: TargetConfig, spec: FeatureSpec, content, batch: RewardBatch, dtype, *, train: bool
):
    """Every item before the history that it may see; called from a module's compact `__call__`.

    Args:
      content: float32 `[levels, V, C]`, the codebooks of the semantic IDs: an item is as its codes
        are.

    Returns:
      The user as each item sees him, a list of `[B, M, ...]`; the items `[B, M, D]`; and the hidden
      states `[B, M, shared_dims[-1]]` of a network over both and their products.
    """
    c_bmc, c_btc = (contents(content, x.sid) for x in (batch.target, batch.history))
    embed = ItemEmbedding(cfg, spec, dtype, name="item")
    e_bmd = embed(batch.target, c_bmc, train=train)
    e_btd = embed(batch.history, c_btc, train=train)
    h_btd = HistoryEntry(cfg, spec, dtype, name="entry")(e_btd, batch.history)

    place_t, hidden_bm1 = jnp.arange(h_btd.shape[1]), batch.hidden[..., None]
    rank_bmt = place_t - hidden_bm1
    seen_bmt = (rank_bmt >= 0) & (rank_bmt < cfg.history_length)
    seen_bmt &= place_t < batch.history.length[:, None, None]
    gap_bmt = rank_bmt
    if batch.seconds is not None:
        gap_bmt = batch.seconds[:, None] - batch.since[..., None]
    buckets = log_bucket(gap_bmt), log_bucket(rank_bmt)
    likeness_bmt = jnp.einsum("bmc,btc->bmt", c_bmc, c_btc, precision=HIGHEST)
    found_bmt = search(likeness_bmt, seen_bmt, cfg.top_k)
    parts, evidence = [], []
    for name, part_bmt in (("search", found_bmt), ("recent", rank_bmt < cfg.recent_length)):
        attend = TargetAttention(cfg.num_heads, dtype, name=name)
        part, much = attend(e_bmd, h_btd, part_bmt & seen_bmt, likeness_bmt, *buckets)
        parts.append(part)
        evidence.append(much)
    count = jnp.maximum(seen_bmt.sum(-1, keepdims=True), 1).astype(dtype)
    mean_bmd = jnp.einsum("bmt,btd->bmd", seen_bmt.astype(dtype), h_btd) / count

    user = [*parts, mean_bmd, *evidence]
    if spec.static:
        static = StaticFeatures(cfg.static_dim, spec, dtype, name="static")(batch.static)
        shape = (*e_bmd.shape[:2], static.shape[-1])
        user.append(jnp.broadcast_to(static[:, None], shape))
    products = [part * e_bmd for part in (*parts, mean_bmd)]
    x = jnp.concatenate([*user, e_bmd, *products], axis=-1)
    x = MLP(cfg.shared_dims, dtype, cfg.dropout, train, name="shared")(x)
    return user, e_bmd, x


def contents(content, sid):
    """Unit vectors of what the codes say, float32 `[..., C]`; zeros where that is nothing."""
    levels, size, width = content.shape
    sid = sid[..., :levels] + size * jnp.arange(levels)
    x = jnp.take(jnp.asarray(content.reshape(-1, width)), sid, axis=0).sum(-2)
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))


def search(likeness_bmt, seen_bmt, k: int):
    """Which k entries of the history are most like each item, bool `[B, M, T]` (SIM's first stage).

    All that are as like as the k-th are taken, up to rounding: the same item seen twice must not
    hang on the order of a sum. Those that must not be seen never are.
    """
    likeness_bmt = jnp.where(seen_bmt, likeness_bmt, -jnp.inf)
    best_bmk, _ = jax.lax.top_k(likeness_bmt, min(k, likeness_bmt.shape[-1]))
    return (likeness_bmt >= best_bmk[..., -1:] - 1e-5) & seen_bmt
