"""Early-clipped policy optimisation of sampled items, and GRPO beside it.

OneRec Technical Report (arXiv 2506.13695), section 2.4.1. An item o is `levels` codes; a group is
the G items that the old policy gave one user. Neither loss has a KL term: the report drops it, for
supervised fine-tuning is trained along and keeps the policy where it is.

Axes: B users, G items of a group, S levels, V codes.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from onerec_jax.errors import InputError, require_at_least


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Which objective, and where it clips."""

    algorithm: Literal["ecpo", "grpo"] = "ecpo"
    """grpo: without the early clip, whose negative samples may have any weight."""
    ratio: Literal["item", "token"] = "item"
    """Ratio of an item's probabilities, as the report writes it, or of each of its codes', which
    share the item's advantage and are averaged."""
    epsilon: float = 0.2
    """Half-width of the PPO clip; the report does not print it."""
    delta: float = 0.1
    """Room above 1 + epsilon before the early clip binds; the report's value."""

    def __post_init__(self):
        require_at_least(self, "policy.", epsilon=0, delta=0)
        if self.epsilon >= 1 or (self.algorithm == "ecpo" and self.delta == 0):
            name = "epsilon" if self.epsilon >= 1 else "delta"
            asks = "below 1" if self.epsilon >= 1 else "above 0"
            raise InputError(f"--policy.{name} {getattr(self, name)} must be {asks}")


@jax.custom_vjp
def log_probs(logits, target):
    """Log-probability of each code of sampled items, and the entropy of what it was drawn from.

    Their gradient keeps the logits and nothing as large beside them: those of thousands of items
    are gigabytes, and left to itself JAX keeps one more array of the size and makes three on the
    way.

    Args:
      logits: float `[..., V]`; -inf where a mask forbids a code, the same as when sampling.
      target: int32 `[...]`.

    Returns:
      Two float32 `[...]`, in nats.
    """
    return _log_probs(logits, target)[:2]


def _log_probs(logits, target):
    """`log_probs`, and the logarithm of what the exponentials add up to."""
    logits = logits.astype(jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    # As `jax.nn.log_softmax`, but for the place of the gather.
    below = logits - top
    weight = jnp.exp(below)
    norm = jnp.log(weight.sum(-1))
    entropy = norm - jnp.where(weight > 0, weight * below, 0).sum(-1) / weight.sum(-1)
    logp = jnp.take_along_axis(below, target[..., None], axis=-1)[..., 0] - norm
    return logp, entropy, norm + top[..., 0]


def _log_probs_forward(logits, target):
    logp, entropy, norm = _log_probs(logits, target)
    return (logp, entropy), (logits, target, norm, entropy)


def _log_probs_backward(kept, gradients):
    logits, target, norm, entropy = kept
    dlogp, dentropy = gradients
    logp = logits.astype(jnp.float32) - norm[..., None]
    p = jnp.exp(logp)
    hit = jax.lax.broadcasted_iota(jnp.int32, p.shape, p.ndim - 1) == target[..., None]
    away = jnp.where(p > 0, p * (logp + entropy[..., None]), 0)
    slope = dlogp[..., None] * (hit - p) - dentropy[..., None] * away
    return slope.astype(logits.dtype), None


log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def policy_loss(
    logp_bgs,
    old_logp_bgs,
    advantage_bg,
    valid_bg,
    cfg: PolicyConfig,
    entropy_bgs=None,
    *,
    count=None,
):
    """The negative of J_ECPO (or J_GRPO), a mean over all valid items of the batch.

    With ratio = pi / pi_old', where pi_old' = max(sg(pi) / (1 + epsilon + delta), pi_old) for ECPO
    and pi_old for GRPO, J is the mean of min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A).
    The stop-gradient sg is what keeps the gradient of early-clipped items: without it their ratio
    would be a constant.

    Args:
      logp_bgs: float32 `[B, G, S]`, log-probabilities of the codes under the policy.
      old_logp_bgs: float32 `[B, G, S]`, the same when the items were sampled: same mask, same
        temperature.
      advantage_bg: float32 `[B, G]`.
      valid_bg: bool `[B, G]`; items that are not valid (no item of the catalogue, a group whose
        rewards are all alike) count nowhere and may hold anything.
      entropy_bgs: float32 `[B, G, S]` from `log_probs`, for the statistics.
      count: valid items of the batch, where this is a part of it: losses of the parts add up.

    Returns:
      Float32 loss, and statistics over the valid items: `clipped_high` (share with A > 0 and ratio
      above 1 + epsilon: no gradient), `clipped_low` (A < 0 and ratio below 1 - epsilon: none
      either), `early_clipped` (A < 0 and pi / pi_old above 1 + epsilon + delta: bounded under
      ECPO), `ratio_quantiles` of pi / pi_old (1%, 50%, 99%, 100%), `valid` (share of all), and
      `entropy` `[S]` if given. Without a valid item the loss is 0 and the statistics are NaN.
    """
    keep = valid_bg[..., None]
    # Outside, for 0 * inf of an item that does not count would be NaN all the same.
    logp = jnp.where(keep, logp_bgs.astype(jnp.float32), 0)
    old = jax.lax.stop_gradient(jnp.where(keep, old_logp_bgs.astype(jnp.float32), 0))
    if cfg.ratio == "item":
        logp, old = logp.sum(-1, keepdims=True), old.sum(-1, keepdims=True)
    here = jax.lax.stop_gradient(logp)
    bound = 1 + cfg.epsilon + cfg.delta
    old_bounded = jnp.maximum(here - jnp.log(bound), old) if cfg.algorithm == "ecpo" else old
    ratio = jnp.exp(logp - old_bounded)
    advantage = jnp.where(valid_bg, advantage_bg.astype(jnp.float32), 0)[..., None]
    clipped = jnp.clip(ratio, 1 - cfg.epsilon, 1 + cfg.epsilon)
    objective = jnp.minimum(ratio * advantage, clipped * advantage).mean(-1)
    count = valid_bg.sum() if count is None else count
    loss = -jnp.where(valid_bg, objective, 0).sum() / jnp.maximum(count, 1)

    raw = jnp.exp(here - old)
    counted = jnp.broadcast_to(keep, raw.shape)

    def share(of):
        return jnp.mean(of, where=counted)

    quantiles = jnp.array([0.01, 0.5, 0.99, 1.0])
    stats = {
        "clipped_high": share((advantage > 0) & (raw > 1 + cfg.epsilon)),
        "clipped_low": share((advantage < 0) & (raw < 1 - cfg.epsilon)),
        "early_clipped": share((advantage < 0) & (raw > bound)),
        "ratio_quantiles": jnp.nanquantile(jnp.where(counted, raw, jnp.nan), quantiles),
        "valid": valid_bg.mean(),
    }
    if entropy_bgs is not None:
        stats["entropy"] = jnp.mean(entropy_bgs, axis=(0, 1), where=keep)
    return loss, stats
