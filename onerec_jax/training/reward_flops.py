"""Useful FLOPs of the preference score, counted as in `training/flops.py`.

Axes: B users, M items judged, T history entries, D width.
"""

import numpy as np

from onerec_jax.inputs import FeatureSpec
from onerec_jax.models.reward import RewardConfig


def item_width(cfg: RewardConfig, spec: FeatureSpec, content: int) -> int:
    """Width of what the embedding of an item is made of; `content`: of the codebooks' vectors."""
    width = content + cfg.d_model + cfg.item_dim + cfg.author_dim * bool(spec.num_authors)
    return width + cfg.feature_dim * (bool(spec.tags) + spec.has_duration)


def score_flops(
    cfg: RewardConfig, spec: FeatureSpec, *, objectives: int, content: int, history, items
) -> dict[str, int | np.ndarray]:
    """FLOPs of judging items for a user, by part; one fusion, as in scoring.

    Attention and the search for like entries count over the whole history: what they leave out is
    masked, not skipped.

    Args:
      objectives: towers.
      content: width of the codebooks' vectors.
      history: T, entries that there are, a number or int `[B]`.
      items: M, items judged, a number or int `[B]`.
    """
    d, entry = cfg.d_model, cfg.d_model + len(spec.labels)
    entry += cfg.feature_dim * spec.has_playtime
    history, items = np.asarray(history, np.int64), np.asarray(items, np.int64)
    user = 3 * d + 2 * cfg.num_heads + cfg.static_dim * len(spec.static)
    # What the user did in three ways, the evidence, the item, and its products with the three.
    shared = _mlp(user + d + 3 * d, cfg.shared_dims)
    towers = objectives * _mlp(cfg.shared_dims[-1], (*cfg.tower_dims, 1))
    fusion = _mlp(objectives * cfg.tower_dims[-1] + user + d, (*cfg.fusion_dims, 1))
    parts = {
        "embeddings": (history + items) * item_width(cfg, spec, content) * d,
        "history": history * (2 * entry * d + 2 * d * d + 4 * d * d),
        "attention": items * (2 * d * d + history * (content + 5 * d)),
        "towers": items * (shared + towers),
        "fusion": items * fusion,
    }
    return {name: 2 * macs if np.ndim(macs) else 2 * int(macs) for name, macs in parts.items()}


def _mlp(width: int, widths) -> int:
    """Multiply-adds of linear maps one behind the other."""
    return sum(a * b for a, b in zip((width, *widths[:-1]), widths, strict=True))
