"""Parameters and useful FLOPs of a model, by part, before anything is allocated.

A multiply-add counts as two FLOPs. Training is three times the forward pass. Padding, capacity
padding, recomputation, embedding lookups, norms and softmaxes are not counted.
"""

import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax.config import ModelConfig
from onerec_jax.inputs import Batch, FeatureSpec, Pathway
from onerec_jax.tokenizer.semantic_ids import MAX_CODEBOOK


def full_lengths(cfg: ModelConfig) -> dict[str, int]:
    """Lengths of a user's histories when every slot holds an action."""
    return {name: cfg.slots(name) for name in ("short", "positive", "lifelong")}


def feature_width(cfg: ModelConfig, spec: FeatureSpec) -> int:
    """Width W of the features of an interaction side by side, member counts of clusters apart."""
    has = {
        "tag": spec.tags,
        "age": spec.has_time,
        "playtime": spec.has_playtime,
        "duration": spec.has_duration,
        "label": spec.labels,
    }
    width = cfg.d_model + cfg.feature_dim * sum(bool(has.get(name)) for name in cfg.features)
    return width + cfg.author_dim * bool("author" in cfg.features and spec.num_authors)


def encoder_tokens(cfg: ModelConfig, spec: FeatureSpec, lengths: dict):
    """Valid tokens of the encoder, of one user or int `[U]`; `lengths` as `forward_flops`."""
    short, positive, lifelong = (
        np.asarray(lengths[name], np.int64) for name in ("short", "positive", "lifelong")
    )
    static = bool(spec.static) and "static" in cfg.pathways
    return short + positive + cfg.lifelong_queries * (lifelong > 0) + static


def forward_flops(
    cfg: ModelConfig, spec: FeatureSpec, targets: int = 1, lengths: dict | None = None
) -> dict[str, int | np.ndarray]:
    """FLOPs of one user's forward pass, by part; `targets` share the encoder's part of it.

    Args:
      lengths: of the three histories, numbers or int `[U]` for U users; None: full ones.
    """
    d, f, width = cfg.d_model, cfg.ff_dim, feature_width(cfg, spec)
    lengths = full_lengths(cfg) if lengths is None else lengths
    lengths = {name: np.asarray(length, np.int64) for name, length in lengths.items()}
    lifelong, recent = lengths["lifelong"], lengths["short"] + lengths["positive"]
    queries = cfg.lifelong_queries * (lifelong > 0)
    static = bool(spec.static) and "static" in cfg.pathways
    tokens, levels = encoder_tokens(cfg, spec, lengths), spec.levels

    hidden = cfg.pathway_dim
    pathways = (recent + lifelong) * hidden * (width + d)
    if spec.clustered and "count" in cfg.features:
        pathways = pathways + lifelong * cfg.feature_dim * hidden
    if static:
        pathways = pathways + hidden * (len(spec.static) * cfg.static_dim + d)
    qformer = cfg.lifelong_blocks * (
        2 * lifelong * d * d + queries * (2 * d * d + 2 * d * f) + 2 * queries * lifelong * d
    )
    experts = d * cfg.num_experts + cfg.experts_per_token * 3 * d * cfg.expert_dim
    dense = 2 * d * f
    with_experts = cfg.expert_layers("encoder")
    encoder = tokens * (
        cfg.encoder_layers * (4 * d * d + 2 * tokens * d)
        + with_experts * experts
        + (cfg.encoder_layers - with_experts) * dense
    )
    decoder = cfg.decoder_layers * 2 * tokens * d * d  # keys and values
    decoder = decoder + targets * levels * _decoder_macs(cfg, tokens, levels)
    heads = targets * levels * d * spec.codebook_size
    parts = {
        "pathways": pathways,
        "lifelong QFormer": qformer,
        "encoder": encoder,
        "decoder": decoder,
        "heads": heads,
    }
    if np.ndim(tokens):
        return {name: 2 * np.broadcast_to(macs, tokens.shape) for name, macs in parts.items()}
    return {name: 2 * int(macs) for name, macs in parts.items()}


def _decoder_macs(cfg: ModelConfig, tokens, positions):
    """Multiply-adds of one position in the decoder: it sees so many of the user and of its ID."""
    d, with_experts = cfg.d_model, cfg.expert_layers("decoder")
    experts = d * cfg.num_experts + cfg.experts_per_token * 3 * d * cfg.expert_dim
    return (
        cfg.decoder_layers * (6 * d * d + 2 * (tokens + positions) * d)
        + with_experts * experts
        + (cfg.decoder_layers - with_experts) * 2 * d * cfg.ff_dim
    )


def generation_flops(
    cfg: ModelConfig, spec: FeatureSpec, width: int, lengths: dict | None = None
) -> dict[str, int | np.ndarray]:
    """FLOPs of one user's search with `width` beams, by part; arguments as `forward_flops`.

    The first level is one row, a later one as many as there are beams before it.
    """
    parts, rows = forward_flops(cfg, spec, 0, lengths), 1
    tokens = encoder_tokens(cfg, spec, full_lengths(cfg) if lengths is None else lengths)
    for level in range(spec.levels):
        parts["decoder"] = parts["decoder"] + 2 * rows * _decoder_macs(cfg, tokens, level + 1)
        parts["heads"] = parts["heads"] + 2 * rows * cfg.d_model * spec.codebook_size
        rows = min(width, rows * spec.codebook_size)
    return {name: flops if np.ndim(flops) else int(flops) for name, flops in parts.items()}


def train_flops(cfg: ModelConfig, spec: FeatureSpec, targets: int = 1, lengths=None):
    """FLOPs of one user's training step; arguments as `forward_flops`."""
    return 3 * sum(forward_flops(cfg, spec, targets, lengths).values())


VOCABULARIES = ("embeddings", "heads")
"""Parts of `count_parameters` that the names of the published models leave out: with the tables of
codes and items and the output heads, none of the names would fit."""


def count_parameters(params) -> dict[str, int]:
    """Parameters by part; `params` may be abstract (`jax.eval_shape`)."""
    parts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if names[0] in ("sid_embedding", "bos") or {"features", "static_features"} & set(names):
            part = "embeddings"
        elif names[0] == "heads" or names[0].startswith("norm_"):
            part = "heads"
        elif "experts" in names:
            part = "experts"
        else:
            part = names[0]
        parts[part] = parts.get(part, 0) + leaf.size
    return parts


def nominal_inputs(cfg: ModelConfig, tokenizer) -> tuple[FeatureSpec, Batch]:
    """A specification with every interaction feature, and an abstract batch of one user.

    For describing a model before there is data: vocabularies that depend on a data set have size 1.
    """
    levels = tokenizer.levels
    spec = FeatureSpec(
        num_items=1,
        levels=levels,
        codebook_size=tokenizer.codebook_size or MAX_CODEBOOK,
        tags=("tag",),
        tags_per_item=1,
        num_authors=1,
        has_time=True,
        has_playtime=True,
        has_duration=True,
        labels=("like",),
        clustered=True,
    )

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def pathway(length):
        one = ints(1, length)
        return Pathway(
            ints(1), ints(1, length, levels), one, ints(1, length, 1), one, one, one, one,
            jax.ShapeDtypeStruct((1, length, 1), jnp.uint8),
        )  # fmt: skip

    batch = Batch(
        static=ints(1, 0),
        short=pathway(cfg.short_length),
        positive=pathway(cfg.positive_length),
        lifelong=pathway(cfg.lifelong_length).replace(count=ints(1, cfg.lifelong_length)),
        target=ints(1, 1, levels),
        target_count=ints(1),
    )
    return spec, batch
