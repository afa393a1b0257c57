"""The training steps of the rewards, of items and of sessions, for `training.step.Trainer`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from onerec_jax.inputs import RewardBatch
from onerec_jax.losses.reward import cross_entropies, reward_loss
from onerec_jax.models.reward import PScore
from onerec_jax.models.session_reward import SessionReward
from onerec_jax.training.step import TrainState


def reward_step(
    state: TrainState, batch: RewardBatch, *, model: PScore, tx, seed: int, weight_no: np.ndarray
):
    """One AdamW step on the towers' losses and on the weighted loss of every fusion.

    Args:
      weight_no: float `[N, O]`, label weights of the model's N fusions.

    Returns:
      The next state and metrics: `loss`, `loss_objective` `[O]` (towers), `loss_p` `[N]`, all in
      nats, and `grad_norm`.
    """

    def loss_fn(params, rngs):
        tower_bmo, p_bmn = model.apply({"params": params}, batch, rngs=rngs)
        loss, towers, fused = reward_loss(tower_bmo, p_bmn, batch.label, jnp.asarray(weight_no))
        return loss, {"loss_objective": towers, "loss_p": fused}

    return _step(state, loss_fn, tx, seed)


def session_reward_step(
    state: TrainState,
    batch: RewardBatch,
    *,
    model: SessionReward,
    tx,
    seed: int,
    item_weight: float = 0.0,
):
    """One AdamW step on the sum of the heads' cross-entropies, `L_RM` of OneRec V0, and on that of
    the single items' objectives, if the model has any.

    Returns:
      The next state and metrics: `loss`, `loss_objective` `[O]` (heads), `loss_item` `[objectives]`
      (if any), in nats, and `grad_norm`.
    """

    def loss_fn(params, rngs):
        session_bwo, item_bmo = model.apply({"params": params}, batch, rngs=rngs)
        heads = cross_entropies(session_bwo, batch.session_label)
        if item_bmo is None:
            return heads.sum(), {"loss_objective": heads}
        items = cross_entropies(item_bmo, batch.label)
        found = {"loss_objective": heads, "loss_item": items}
        return heads.sum() + item_weight * items.sum(), found

    return _step(state, loss_fn, tx, seed)


def _step(state: TrainState, loss_fn, tx, seed: int):
    """The dropout key is a function of (seed, step), as in pretraining."""
    rngs = {"dropout": jax.random.fold_in(jax.random.key(seed), state.step)}
    (loss, found), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, rngs)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {"loss": loss, **found, "grad_norm": optax.tree.norm(grads)}
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, state.router, opt_state), metrics
