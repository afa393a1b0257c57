"""Next-token prediction over the codes of one item."""

import jax
import jax.numpy as jnp


def ntp_loss(logits_bsv, target_bs):
    """Negative log-likelihood of each code, `- log P(s^l | BOS, s^1..s^{l-1}, user)`.

    OneRec Technical Report (arXiv 2506.13695), section 2.2.2. The report's loss of an item is the
    sum over its levels; V2 uses the mean. Callers sum or average as they report.

    Args:
      logits_bsv: float32 `[B, levels, V]`.
      target_bs: int32 `[B, levels]`.

    Returns:
      Float32 `[B, levels]`, in nats.
    """
    logp_bsv = jax.nn.log_softmax(logits_bsv.astype(jnp.float32))
    return -jnp.take_along_axis(logp_bsv, target_bs[..., None], axis=-1)[..., 0]
