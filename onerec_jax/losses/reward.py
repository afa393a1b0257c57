"""Losses of the preference score: one p against every label, and a label for every tower.

OneRec Technical Report (arXiv 2506.13695), section 2.4.1.

Axes: B users, M items judged, O objectives, N sets of label weights.
"""

import jax
import jax.numpy as jnp


def cross_entropies(logit, label_bmo):
    """Binary cross-entropy of each objective, a mean over the labels that are known.

    Args:
      logit: float32 `[B, M, O]`, one for each objective, or `[B, M, 1]`, the same for all.
      label_bmo: int `[B, M, O]`, 0 or 1; negative: unknown.

    Returns:
      Float32 `[O]`, in nats; 0 for an objective without a known label.
    """
    known = label_bmo >= 0
    logit = logit.astype(jnp.float32)
    loss = jax.nn.softplus(logit) - jnp.where(known, label_bmo, 0) * logit
    return jnp.where(known, loss, 0).sum((0, 1)) / jnp.maximum(known.sum((0, 1)), 1)


def reward_loss(tower_bmo, p_bmn, label_bmo, weight_no):
    """`L = sum_x L_tower^x + mean_n sum_x w_n^x L^x(p_n)`, the second being `L_PScore`.

    Args:
      tower_bmo: float32 `[B, M, O]`, the towers' logits.
      p_bmn: float32 `[B, M, N]`, logits of p under each set of weights.
      label_bmo: int `[B, M, O]`, 0 or 1; negative: unknown.
      weight_no: float `[N, O]`; only ratios matter, for a set is scaled to sum 1.

    Returns:
      Float32 loss; the towers' losses `[O]`; the losses of p `[N]`.
    """
    towers_o = cross_entropies(tower_bmo, label_bmo)
    share_no = weight_no / weight_no.sum(-1, keepdims=True)
    of_p_no = jax.vmap(lambda p: cross_entropies(p[..., None], label_bmo), in_axes=-1)(p_bmn)
    fused_n = (share_no * of_p_no).sum(-1)
    return towers_o.sum() + fused_n.mean(), towers_o, fused_n
