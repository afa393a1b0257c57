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


def _lengths(cfg: ModelConfig, lengths: dict | None) -> dict[str, np.ndarray]:
    """Of the three histories, as arrays; None: every slot holds an action."""
    names = ("short", "positive", "lifelong")
    lengths = {name: cfg.slots(name) for name in names} if lengths is None else lengths
    return {name: np.asarray(length, np.int64) for name, length in lengths.items()}


def encoder_tokens(cfg: ModelConfig, spec: FeatureSpec, lengths: dict):
    """Valid tokens of the encoder of a user with histories of these lengths, arrays or numbers."""
    queries = cfg.lifelong_queries * (lengths["lifelong"] > 0)
    static = bool(spec.static) and "static" in cfg.pathways
    return lengths["short"] + lengths["positive"] + queries + static


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


def decoder_positions(cfg: ModelConfig, spec: FeatureSpec, targets: float) -> tuple[float, int]:
    """Positions in the decoder of a user's `targets`, and of the sequence that each is one of.

    A sequence is BOS and the codes of one target but the last. That of a list has the last codes
    too, but that of the last item.
    """
    items = int(max(min(cfg.session_items, targets), 1))
    sequence = items * (spec.levels + 1) - 1
    return targets * sequence / items if items > 1 else targets * sequence, sequence


def forward_flops(
    cfg: ModelConfig, spec: FeatureSpec, targets: int | None = None, lengths: dict | None = None
) -> dict[str, int | np.ndarray]:
    """FLOPs of one user's forward pass, by part; `targets` share the encoder's part of it.

    Args:
      targets: None: one, or one list of a model of lists.
      lengths: of the three histories, numbers or int `[U]` for U users; None: full ones.
    """
    targets = cfg.session_items if targets is None else targets
    d, f, width = cfg.d_model, cfg.ff_dim, feature_width(cfg, spec)
    lengths = _lengths(cfg, lengths)
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
    positions, sequence = decoder_positions(cfg, spec, targets)
    decoder = decoder + positions * _decoder_macs(cfg, tokens, sequence)
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
    """Multiply-adds of one position in the decoder: it sees so many of the user and of its own."""
    d, with_experts = cfg.d_model, cfg.expert_layers("decoder")
    experts = d * cfg.num_experts + cfg.experts_per_token * 3 * d * cfg.expert_dim
    return (
        cfg.decoder_layers * (6 * d * d + 2 * (tokens + positions) * d)
        + with_experts * experts
        + (cfg.decoder_layers - with_experts) * 2 * d * cfg.ff_dim
    )


def generation_flops(
    cfg: ModelConfig,
    spec: FeatureSpec,
    width: int,
    lengths: dict | None = None,
    *,
    independent: bool = False,
    items: int = 1,
) -> dict[str, int | np.ndarray]:
    """FLOPs of one user's search with `width` beams, by part; arguments as `forward_flops`.

    The first level is one row, a later one as many as there are beams before it.

    Args:
      independent: `width` independent draws, a row each from the second level on, alike or not.
      items: of the lists that are searched, each of `width` beams. Before every item but the first
        a beam runs two positions, of which the heads read one.
    """
    parts, rows = forward_flops(cfg, spec, 0, lengths), 1
    tokens = encoder_tokens(cfg, spec, _lengths(cfg, lengths))
    for item, level in np.ndindex(items, spec.levels):
        seen = item * (spec.levels + 1) + level + 1
        macs = _decoder_macs(cfg, tokens, seen)
        if item and not level:
            macs = macs + _decoder_macs(cfg, tokens, seen - 1)
        parts["decoder"] = parts["decoder"] + 2 * rows * macs
        parts["heads"] = parts["heads"] + 2 * rows * cfg.d_model * spec.codebook_size
        rows = width if independent else min(width, rows * spec.codebook_size)
    return {name: flops if np.ndim(flops) else int(flops) for name, flops in parts.items()}


def train_flops(
    cfg: ModelConfig,
    spec: FeatureSpec,
    targets: float | None = None,
    lengths: dict | None = None,
    dropped: float = 0,
):
    """Useful FLOPs of one user's training step; other arguments as `forward_flops`.

    Args:
      targets: a mean over users will do.
      dropped: share of the rows sent to experts, over all layers, that found no room there
        (`dropped` of `training.step.train_step`): nothing was computed for them.
    """
    targets = cfg.session_items if targets is None else targets
    tokens = encoder_tokens(cfg, spec, _lengths(cfg, lengths))
    layers = cfg.expert_layers("encoder"), cfg.expert_layers("decoder")
    positions, _ = decoder_positions(cfg, spec, targets)
    rows = cfg.experts_per_token * (layers[0] * tokens + layers[1] * positions)
    lost = 2 * 3 * cfg.d_model * cfg.expert_dim * rows * dropped
    flops = 3 * (sum(forward_flops(cfg, spec, targets, lengths).values()) - lost)
    return flops if np.ndim(flops) else flops.item()


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


def nominal_spec(tokenizer) -> FeatureSpec:
    """A specification with every interaction feature, for a model before there is data.

    Vocabularies that depend on a data set have size 1.
    """
    return FeatureSpec(
        num_items=1,
        levels=tokenizer.levels,
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


def abstract_batch(cfg: ModelConfig, spec: FeatureSpec) -> Batch:
    """Shapes and types of a batch of one user and one target: enough for `jax.eval_shape`."""

    def array(has, *shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((1, *shape), dtype) if has else None

    def pathway(name):
        slots = cfg.slots(name)
        return Pathway(
            length=array(True),
            sid=array(True, slots, spec.levels),
            item=array(True, slots),
            tags=array(spec.tags, slots, spec.tags_per_item),
            author=array(spec.num_authors, slots),
            age=array(spec.has_time, slots),
            playtime=array(spec.has_playtime, slots),
            duration=array(spec.has_duration, slots),
            label=array(spec.labels, slots, len(spec.labels), dtype=jnp.uint8),
            count=array(spec.clustered and name == "lifelong", slots),
        )

    return Batch(
        static=array(True, len(spec.static)),
        short=pathway("short"),
        positive=pathway("positive"),
        lifelong=pathway("lifelong"),
        target=array(True, 1, spec.levels),
        target_count=array(True),
    )
