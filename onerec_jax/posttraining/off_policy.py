"""What negatives do to the gradient once the policy has left the one that drew them.

Of an item with A < 0 whose probability has risen, GRPO's gradient is A ratio grad log pi, with no
bound on the ratio; ECPO's early clip holds it at A (1 + epsilon + delta) grad log pi (OneRec
Technical Report, arXiv 2506.13695, section 2.4.1). Both are measured here on the same items under
the same parameters, beside the most that ECPO's can be.

Axes: R users, G items of a group, S levels, N items measured.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax

from onerec_jax.generation.rollout import policy_log_probs
from onerec_jax.losses.ecpo import PolicyConfig, policy_loss


def negative_gradients(
    model, variables, batch, sid_rgs, old_logp_rgs, advantage_rg, valid_rg, cfg: PolicyConfig,
    *, limit: int = 64, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Norms of the policy loss's gradient over early-clipped negatives alone.

    Args:
      model: a `OneRec` with `train=False`.
      variables: of the policy that learns.
      batch: `Batch` of R users.
      sid_rgs: int32 `[R, G, S]`, drawn by an older policy.
      old_logp_rgs: float32 `[R, G, S]`, of that policy.
      advantage_rg: float32 `[R, G]`; valid_rg: bool `[R, G]`, as for `policy_loss`.
      cfg: epsilon and delta; both algorithms are measured.
      limit: most items, of which so many are drawn where there are more.

    Returns:
      `items` (N), `share` (of the negatives that are early-clipped), `ratio` (largest pi / pi_old),
      and where N > 0 norms of gradients. One item at a time: `grpo_item`, mean of ratio |A| |grad
      log pi|, and `bound`, mean of (1 + epsilon + delta) |A| |grad log pi|, which is what ECPO
      makes of it and, by the triangle inequality, the most that ECPO's mean gradient can have. Of
      the mean over the items, whose gradients cancel in part: `grpo` and `ecpo`.
    """
    valid, advantage = np.asarray(valid_rg), np.asarray(advantage_rg)
    logp_rg = _item_logp(model, variables["params"], variables, batch, sid_rgs)
    raw = np.exp(np.asarray(logp_rg - old_logp_rgs.sum(-1), np.float64))
    negative = valid & (advantage < 0)
    early = np.argwhere(negative & (raw > 1 + cfg.epsilon + cfg.delta))
    found = {
        "items": float(min(len(early), limit)),
        "share": len(early) / max(int(negative.sum()), 1),
        "ratio": float(raw[negative].max(initial=0.0)),
    }
    if not len(early):
        return found
    early = np.random.default_rng(seed).permutation(early)[:limit]
    chosen = np.zeros(valid.shape, bool)
    chosen[early[:, 0], early[:, 1]] = True
    norms = _loss_norms(model, variables, batch, sid_rgs, old_logp_rgs, advantage, chosen, cfg)
    found |= {name: float(norm) for name, norm in norms.items()}
    norm_n = [
        _item_norm(model, variables, jax.tree.map(lambda x, r=r: x[r, None], batch), sid_rgs[r, g])
        for r, g in early
    ]
    at = tuple(early.T)
    norm_n = np.abs(advantage[at]) * np.array(norm_n, np.float64)
    found["grpo_item"] = float(np.mean(raw[at] * norm_n))
    found["bound"] = float(np.mean((1 + cfg.epsilon + cfg.delta) * norm_n))
    return found


@functools.partial(jax.jit, static_argnames="model")
def _item_logp(model, params, variables, batch, sid_rgs):
    """Log-probability of each item, float32 `[R, G]`."""
    return policy_log_probs(model, variables | {"params": params}, batch, sid_rgs)[0].sum(-1)


@functools.partial(jax.jit, static_argnames=("model", "cfg"))
def _loss_norms(model, variables, batch, sid_rgs, old_logp_rgs, advantage, chosen, cfg):
    """Norm of each algorithm's gradient over the chosen items; one pass through the model."""

    def logp(params):
        return _item_logp(model, params, variables, batch, sid_rgs)[..., None]

    logp_rg1, backward = jax.vjp(logp, variables["params"])
    old_rg1, norms = old_logp_rgs.sum(-1, keepdims=True), {}
    for algorithm in ("grpo", "ecpo"):
        here = dataclasses.replace(cfg, algorithm=algorithm, ratio="item")

        def loss(logp, here=here):
            return policy_loss(logp, old_rg1, advantage, chosen, here)[0]

        norms[algorithm] = optax.tree.norm(backward(jax.grad(loss)(logp_rg1))[0])
    return norms


@functools.partial(jax.jit, static_argnames="model")
def _item_norm(model, variables, batch, sid_s):
    """Norm of the gradient of one item's log-probability."""

    def logp(params):
        return _item_logp(model, params, variables, batch, sid_s[None, None]).sum()

    return optax.tree.norm(jax.grad(logp)(variables["params"]))
