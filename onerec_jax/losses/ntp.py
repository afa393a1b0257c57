"""Next-token prediction over the codes of one item."""

import jax
import jax.numpy as jnp


def ntp_loss(logits, target):
    """Negative log-likelihood of each code, `- log P(s^l | BOS, s^1..s^{l-1}, user)`.

    OneRec Technical Report (arXiv 2506.13695), section 2.2.2. The report's loss of an item is the
    sum over its levels; V2 uses the mean. Callers sum or average as they report.

    Args:
      logits: float32 `[..., levels, V]`.
      target: int32 `[..., levels]`.

    Returns:
      Float32 `[..., levels]`, in nats.
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(logp, target[..., None], axis=-1)[..., 0]


def mean_over_targets(loss_bms, count_b):
    """Mean over the real targets of all users: `[B, M, levels]`, int32 `[B]` -> `[levels]`."""
    real_bm = jnp.arange(loss_bms.shape[1]) < count_b[:, None]
    return (loss_bms * real_bm[..., None]).sum((0, 1)) / jnp.maximum(real_bm.sum(), 1)


def list_log_probs(logits_bmsv, target_bms, items: int):
    """Log-probability of whole lists: the sum over all codes of their items, BOS apart.

    OneRec V0 (arXiv 2502.18965), section 3.3.

    Args:
      logits_bmsv: float32 `[B, M, levels, V]` of a model of lists, M targets in lists of `items`.
      target_bms: int32 `[B, M, levels]`.

    Returns:
      Float32 `[B, M / items]`, in nats.
    """
    loss_bms = ntp_loss(logits_bmsv, target_bms)
    return -loss_bms.reshape(len(loss_bms), -1, items * loss_bms.shape[2]).sum(-1)
