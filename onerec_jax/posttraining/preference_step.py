"""The step of iterative preference alignment (IPA): next-token prediction and pairs of sessions.

`L = L_NTP(all users) + lambda L_preference(pairs of R users)`, OneRec V0 (arXiv 2502.18965),
Algorithm 2. The pairs come from M_t, a frozen copy of the policy, which is the losses' reference as
well; after an iteration the present policy takes its place (`TrainState.sampler`).

Axes: B users of next-token prediction, R of them with pairs, P = 1 + K sessions of each, the chosen
first, m items, L levels.
"""

import dataclasses

import jax
import optax
from flax import struct

from onerec_jax.errors import require_at_least
from onerec_jax.inputs import Batch
from onerec_jax.losses.ntp import list_log_probs
from onerec_jax.losses.preference import PreferenceConfig, preference_loss
from onerec_jax.models.onerec import OneRec
from onerec_jax.posttraining.step import refresh_sampler
from onerec_jax.training.step import TrainState, ntp_gradients, update


@dataclasses.dataclass(frozen=True)
class AlignmentConfig:
    """All that an alignment step is a function of, beside state and batch."""

    preference: PreferenceConfig
    weight: float
    """lambda, of the preference loss; the paper does not print it."""
    refresh_every: int
    """Steps of an iteration; 0: the model to start from stays sampler and reference (plain DPO)."""

    def __post_init__(self):
        require_at_least(self, "", weight=0, refresh_every=0)


@struct.dataclass
class PairBatch:
    """B users of next-token prediction, and pairs of sessions of R of them."""

    sft: Batch
    rl: Batch  # R users; `target` is not read
    user: jax.Array  # int32 [R], user row
    position: jax.Array  # int32 [R], of the request within the user
    sid: jax.Array | None = None  # int32 [R, P, m, L]; the rest is known once drawn
    valid: jax.Array | None = None  # bool [R], whether there is a pair


def session_log_probs(model: OneRec, variables, batch: Batch, sid_rpml):
    """Log-probability of sessions under a policy, float32 `[R, P]`, in nats, by teacher forcing.

    Args:
      model: with `train=False`: dropless experts, no dropout.
      batch: R users; `target` is not read.
    """
    users, pairs, items, levels = sid_rpml.shape
    target = sid_rpml.reshape(users, pairs * items, levels)
    logits = model.apply(variables, batch.replace(target=target))
    return list_log_probs(logits, target, items)


def alignment_step(
    state: TrainState,
    batch: PairBatch,
    *,
    model: OneRec,
    tx,
    seed: int,
    cfg: AlignmentConfig,
    accumulate: int = 1,
):
    """One optimizer step on both losses; the sampler becomes the new policy when it is time.

    Sessions go through the model as in search (dropless experts, no dropout), so that the ratio to
    the reference compares parameters and nothing else; only the users of next-token prediction move
    the routers' bias.

    Returns:
      The next state, and the metrics of `train_step` (of the NTP loss; `grad_norm` of the sum) with
      `loss_preference`, `grad_norm_preference` (of lambda times its gradient), and the statistics
      of `preference_loss`.
    """
    policy = model.clone(train=False)
    ntp, level, stats = ntp_gradients(state, batch.sft, model, seed=seed, accumulate=accumulate)
    reference_rp = session_log_probs(policy, state.sampler, batch.rl, batch.sid)

    def loss_fn(params):
        variables = {"params": params, "router": state.router}
        logp_rp = session_log_probs(policy, variables, batch.rl, batch.sid)
        loss, found = preference_loss(
            logp_rp[:, 0],
            logp_rp[:, 1:],
            reference_rp[:, 0],
            reference_rp[:, 1:],
            batch.valid,
            cfg.preference,
            codes=batch.sid.shape[2] * batch.sid.shape[3],
        )
        return cfg.weight * loss, found | {"loss_preference": loss}

    grads, found = jax.grad(loss_fn, has_aux=True)(state.params)
    found |= {"grad_norm_preference": optax.tree.norm(grads)}
    grads = jax.tree.map(lambda a, b: a + b, ntp, grads)
    state, of_ntp = update(state, grads, level, stats, model, tx)
    return refresh_sampler(state, cfg.refresh_every), of_ntp | found
