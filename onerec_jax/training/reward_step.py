"""The training step of the preference score, for `training.step.Trainer`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from onerec_jax.inputs import RewardBatch
from onerec_jax.losses.reward import reward_loss
from onerec_jax.models.reward import PScore
from onerec_jax.training.step import TrainState


def reward_step(
    state: TrainState, batch: RewardBatch, *, model: PScore, tx, seed: int, weight_no: np.ndarray
):
    """One AdamW step on the towers' losses and on the weighted loss of every fusion.

    The dropout key is a function of (seed, step), as in pretraining.

    Args:
      weight_no: float `[N, O]`, label weights of the model's N fusions.

    Returns:
      The next state and metrics: `loss`, `loss_objective` `[O]` (towers), `loss_p` `[N]`, all in
      nats, and `grad_norm`.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss_fn(params):
        tower_bmo, p_bmn = model.apply({"params": params}, batch, rngs={"dropout": key})
        loss, towers, fused = reward_loss(tower_bmo, p_bmn, batch.label, jnp.asarray(weight_no))
        return loss, (towers, fused)

    (loss, (towers, fused)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {
        "loss": loss,
        "loss_objective": towers,
        "loss_p": fused,
        "grad_norm": optax.tree.norm(grads),
    }
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, state.router, opt_state), metrics
