"""The user encoder: four pathways, then bidirectional pre-norm blocks.

OneRec Technical Report (arXiv 2506.13695), section 2.2.1 (pathways) and 2.2.2 (encoder). A pathway
that a data set cannot fill has length 0 and is masked out; nothing is made up in its place.

Axes: B users, T history positions or encoder tokens, Q queries, W features side by side, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from onerec_jax.config import ModelConfig
from onerec_jax.inputs import TIME_BUCKETS, Batch, FeatureSpec, Pathway
from onerec_jax.models.layers import (
    Dtype,
    FeedForward,
    Projections,
    attention,
    dense,
    embedding,
    leaky_relu,
    lookup,
    partitioned,
    resolve_attention,
    rms_norm,
)
from onerec_jax.models.moe import make_experts
from onerec_jax.models.qformer import QFormer
from onerec_jax.sharding import BATCH, per_device


def embed_sid(table_vd, sids, codebook_size, dtype):
    """Sums of the level-specific embeddings of semantic IDs, `[..., D]` for each array of them.

    Args:
      table_vd: `[levels * codebook_size, D]`; code c of level l is row `l * codebook_size + c`.
      sids: a tree of int32 `[..., levels]`.
    """
    index = jax.tree.map(lambda sid: sid + jnp.arange(sid.shape[-1]) * codebook_size, sids)
    return jax.tree.map(lambda row: row.sum(-2), lookup(table_vd, index, dtype))


class InteractionFeatures(nn.Module):
    """Concatenated embeddings of interactions: `[B, T, W]` of each pathway, from the same tables.

    Widths as in the report: item D, author 512, the others 128 each.
    """

    cfg: ModelConfig
    spec: FeatureSpec
    dtype: Dtype

    @nn.compact
    def __call__(self, pathways: dict[str, Pathway], sid_table) -> dict[str, jax.Array]:
        cfg, spec = self.cfg, self.spec
        parts = {name: [] for name in pathways}

        def add(name, index, size, width):
            """Rows of one table for all pathways in `index`; 0 stands for unknown."""
            rows = lookup(self.param(name, *embedding(size, width)), index, self.dtype)
            for pathway, row in rows.items():
                parts[pathway].append(jnp.where((index[pathway] > 0)[..., None], row, 0))

        def column(name):
            return {k: getattr(pathway, name) for k, pathway in pathways.items()}

        if cfg.history_item == "item":
            items = {k: item + 1 for k, item in column("item").items()}
            add("item", items, spec.num_items + 1, cfg.d_model)
        else:
            sids = embed_sid(sid_table, column("sid"), spec.codebook_size, self.dtype)
            for name, row in sids.items():
                parts[name].append(row)
        if spec.num_authors and "author" in cfg.features:
            add("author", column("author"), spec.num_authors + 1, cfg.author_dim)
        if spec.tags and "tag" in cfg.features:
            add("tag", column("tags"), len(spec.tags) + 1, cfg.feature_dim)
            for name, pathway in pathways.items():
                count = jnp.maximum((pathway.tags > 0).sum(-1, keepdims=True), 1)
                parts[name][-1] = parts[name][-1].sum(-2) / count.astype(self.dtype)
        for name, has in (
            ("age", spec.has_time),
            ("playtime", spec.has_playtime),
            ("duration", spec.has_duration),
            ("count", True),  # of the lifelong pathway only
        ):
            index = {k: x for k, x in column(name).items() if x is not None}
            if has and index and name in cfg.features:
                add(name, index, TIME_BUCKETS, cfg.feature_dim)
        if spec.labels and "label" in cfg.features:
            label = dense(cfg.feature_dim, axes=(None, None), dtype=self.dtype, name="label")
            for name, bits in column("label").items():
                parts[name].append(label(bits.astype(self.dtype)))
        return {name: jnp.concatenate(found, axis=-1) for name, found in parts.items()}


class StaticFeatures(nn.Module):
    """Embeddings of a user's static features side by side: int32 `[B, F] -> [B, F * width]`."""

    width: int
    spec: FeatureSpec
    dtype: Dtype

    @nn.compact
    def __call__(self, static):
        parts = []
        for i, feature in enumerate(self.spec.static):
            table = self.param(feature.name, *embedding(feature.size + 1, self.width))
            parts.append(lookup(table, static[:, i], self.dtype))
        return jnp.concatenate(parts, axis=-1)


class Positions(nn.Module):
    """Adds a learnable embedding to each slot: `[B, T, D] -> [B, T, D]`, T at most `slots`."""

    slots: int

    @nn.compact
    def __call__(self, h_btd):
        init = partitioned(nn.initializers.normal(0.02), None, "embed")
        position = self.param("embedding", init, (self.slots, h_btd.shape[-1]))
        return h_btd + position[: h_btd.shape[1]].astype(h_btd.dtype)


class PathwayMLP(nn.Module):
    """`Dense(LeakyReLU(Dense(f)))`, the head of every pathway. `[..., W] -> [..., D]`."""

    hidden: int
    d_model: int
    dtype: Dtype

    @nn.compact
    def __call__(self, f):
        h = dense(self.hidden, axes=(None, "ff"), dtype=self.dtype, name="w_in", use_bias=True)(f)
        h = leaky_relu(h)
        return dense(
            self.d_model, axes=("ff", "embed"), dtype=self.dtype, name="w_out", use_bias=True
        )(h)


class LifelongQFormer(nn.Module):
    """Compresses the lifelong history into a fixed number of tokens (report, section 2.2.1)."""

    cfg: ModelConfig
    dtype: Dtype

    def setup(self):
        cfg = self.cfg
        self.qformer = QFormer(
            cfg.lifelong_queries,
            cfg.lifelong_blocks,
            cfg.num_heads,
            cfg.ff_dim,
            self.dtype,
            cfg.attention,
            activation=cfg.activation,
        )
        nn.share_scope(self, self.qformer)  # no level of its own in the parameter tree

    def __call__(self, v_btd, length_b):
        """`[B, T, D]`, int32 `[B]` -> `[B, Q, D]`."""
        return self.qformer(v_btd, length_b)


class EncoderBlock(nn.Module):
    """`z += SelfAttention(norm(z)); z += FeedForward(norm(z))`, fully visible."""

    cfg: ModelConfig
    dtype: Dtype
    train: bool
    experts: bool = False

    @nn.compact
    def __call__(self, z_btd, length_b):
        cfg = self.cfg
        drop = nn.Dropout(cfg.dropout, deterministic=not self.train)
        maps = Projections(cfg.d_model, cfg.num_heads, self.dtype, name="attention")
        x = rms_norm(dtype=self.dtype, name="norm_attention")(z_btd)
        y = attention(
            maps.q(x),
            maps.k(x),
            maps.v(x),
            key_length_b=length_b,
            implementation=cfg.attention,
            zero_empty=False,  # tokens past a length are never read, all of an empty user's are
        )
        z_btd = z_btd + drop(maps.o(y))
        x = rms_norm(dtype=self.dtype, name="norm_ff")(z_btd)
        if not self.experts:
            return z_btd + drop(FeedForward(cfg.ff_dim, self.dtype, cfg.activation, name="ff")(x))
        valid = jnp.arange(x.shape[1]) < length_b[:, None]
        # Outside training a user's result must not depend on who else is in the batch.
        y = make_experts(cfg, self.dtype, name="experts")(x, valid, dropless=not self.train)
        return z_btd + drop(y)


class EncoderGroup(nn.Module):
    """What the scan repeats: `expert_every` blocks, of which the last may have experts."""

    cfg: ModelConfig
    dtype: Dtype
    train: bool

    @nn.compact
    def __call__(self, z_btd, length_b):
        cfg = self.cfg
        for i in range(cfg.expert_every):
            experts = i == cfg.expert_every - 1 and cfg.expert_layers("encoder") > 0
            block = EncoderBlock(cfg, self.dtype, self.train, experts, name=f"block_{i}")
            z_btd = block(z_btd, length_b)
        return z_btd, None


@jax.custom_vjp
def permute(z_btd, order_bt):
    """`z[b, order[b, t]]` of a permutation; the gradient is a gather too, and no scatter."""
    return per_device(_permute_here, (BATCH, BATCH), BATCH)(z_btd, order_bt)


def _permute_here(z_btd, order_bt):
    # Whole rows of a flat array: from a batched gather XLA infers a layout with the users last,
    # and then transposes activations all the way through the encoder.
    b, t, d = z_btd.shape
    row_bt = jnp.arange(b)[:, None] * t + order_bt
    return jnp.take(z_btd.reshape(b * t, d), row_bt, axis=0, mode="clip")


def _permute_forward(z_btd, order_bt):
    return permute(z_btd, order_bt), order_bt


def _permute_backward(order_bt, gradient_btd):
    return permute(gradient_btd, jnp.argsort(order_bt, axis=1)), None


permute.defvjp(_permute_forward, _permute_backward)


def pack_valid_first(z_btd, valid_bt, multiple=1):
    """Moves valid tokens to the front, in order, so that a length can stand for the mask.

    Attention kernels are fast with lengths and slow with masks. Position embeddings must be added
    before: afterwards a token no longer knows its slot.

    Args:
      multiple: T is padded to a multiple of it.

    Returns:
      The packed tokens and the int32 number of valid ones of each user.
    """
    more = -valid_bt.shape[1] % multiple
    z_btd = jnp.pad(z_btd, ((0, 0), (0, more), (0, 0)))
    valid_bt = jnp.pad(valid_bt, ((0, 0), (0, more)))
    order_bt = jnp.argsort(~valid_bt, axis=1, stable=True)
    return permute(z_btd, order_bt), valid_bt.sum(1, dtype=jnp.int32)


class Encoder(nn.Module):
    """Four pathways -> `[B, T, D]` encoded tokens, valid ones first, and their number `[B]`."""

    cfg: ModelConfig
    spec: FeatureSpec
    dtype: Dtype

    @nn.compact
    def __call__(self, batch: Batch, sid_table, *, train=False):
        cfg, spec, dtype = self.cfg, self.spec, self.dtype
        histories = {
            name: getattr(batch, name)
            for name in ("short", "positive", "lifelong")
            if getattr(batch, name).item.shape[1] and cfg.slots(name)
        }
        features = InteractionFeatures(cfg, spec, dtype, name="features")(histories, sid_table)
        tokens, valid = [], []

        # A module of its own for every parameter: what is drawn for one depends on its name alone.
        def add(name, h, length_b, slots):
            tokens.append(Positions(slots, name=f"position_{name}")(h))
            valid.append(jnp.arange(h.shape[1]) < length_b[:, None])

        if "static" in cfg.pathways and spec.static:
            f = StaticFeatures(cfg.static_dim, spec, dtype, name="static_features")(batch.static)
            h = PathwayMLP(cfg.pathway_dim, cfg.d_model, dtype, name="static")(f)
            add("static", h[:, None], jnp.ones(len(f), jnp.int32), 1)
        for name, pathway in histories.items():
            h = PathwayMLP(cfg.pathway_dim, cfg.d_model, dtype, name=name)(features[name])
            if name == "lifelong":
                h = LifelongQFormer(cfg, dtype, name="qformer")(h, pathway.length)
                queries = jnp.where(pathway.length > 0, cfg.lifelong_queries, 0)
                add(name, h, queries, cfg.lifelong_queries)
            else:
                add(name, h, pathway.length, cfg.slots(name))

        z = jnp.concatenate(tokens, axis=1)
        z = nn.Dropout(cfg.dropout, deterministic=not train)(z)
        # cuDNN is at its best from multiples of 8 on, and refuses odd lengths.
        multiple = 8 if resolve_attention(cfg.attention, dtype) == "cudnn" else 1
        z, length = pack_valid_first(z, jnp.concatenate(valid, axis=1), multiple)

        group = nn.remat(EncoderGroup, prevent_cse=False) if cfg.remat else EncoderGroup
        groups = cfg.encoder_layers // cfg.expert_every
        layers = nn.scan(
            group,
            variable_axes={"params": 0, "router": 0, "router_stats": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=groups,
            unroll=groups if cfg.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        z, _ = layers(cfg, dtype, train, name="layers")(z, length)
        return rms_norm(dtype=dtype, name="norm")(z), length
