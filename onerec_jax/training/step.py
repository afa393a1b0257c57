"""Train state and the pretraining step, pure functions under one `jit`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding

from onerec_jax.inputs import Batch
from onerec_jax.losses.ntp import mean_over_targets, ntp_loss
from onerec_jax.models.moe import max_violation, update_router_bias
from onerec_jax.models.onerec import OneRec
from onerec_jax.sharding import BATCH, replicated, shardings_of


@struct.dataclass
class TrainState:
    """All that a training step reads and writes."""

    step: jax.Array  # int32 []
    params: dict
    router: dict  # loss-free balancing bias, moved by load; {} for a dense model
    opt_state: optax.OptState

    @property
    def variables(self) -> dict:
        return {"params": self.params, "router": self.router}


def init_state(key, batch: Batch, *, model: OneRec, tx) -> TrainState:
    """Fresh state; leaves still carry their logical axes (`nn.Partitioned`)."""
    variables = model.init(key, batch)
    params = variables["params"]
    return TrainState(
        jnp.zeros((), jnp.int32), params, variables.get("router", {}), tx.init(params)
    )


def train_step(state: TrainState, batch: Batch, *, model: OneRec, tx, seed: int):
    """One AdamW step on the NTP loss, then one balancing step of the router bias.

    The dropout key is a function of (seed, step): nothing to checkpoint, resume is exact.

    Returns:
      The next state and metrics: `loss` (sum over levels, nats an item), `loss_level` `[levels]`,
      `grad_norm`, and for experts `load` (share of tokens, `[layers, E]`), `max_violation` and
      `dropped` (worst layer).
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss_fn(params):
        logits, updated = model.apply(
            {"params": params, "router": state.router},
            batch,
            mutable=["router_stats"],
            rngs={"dropout": key},
        )
        level = mean_over_targets(ntp_loss(logits, batch.target), batch.target_count)
        return level.sum(), (level, updated.get("router_stats", {}))

    (loss, (level, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {"loss": loss, "loss_level": level, "grad_norm": optax.tree.norm(grads)}
    router = state.router
    if stats:
        router = update_router_bias(router, stats, model.cfg.router_bias_rate)
        layers = stats["decoder"]["layers"]["experts"]
        metrics |= {
            "load": layers["load"] / layers["load"].sum(-1, keepdims=True),
            "max_violation": max_violation(layers["load"]).max(),
            "dropped": layers["dropped"].max(),
        }
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, router, opt_state), metrics


class Trainer:
    """The compiled step and the shardings of its state on one mesh."""

    def __init__(self, model: OneRec, tx, mesh, example: Batch, *, seed: int):
        """`example` is any batch of the right shapes; `model.train` must be True."""
        self.mesh = mesh
        self._init = functools.partial(init_state, batch=example, model=model, tx=tx)
        boxed = jax.eval_shape(self._init, jax.random.key(0))
        self.shardings = shardings_of(boxed, mesh)
        self.abstract_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            nn.unbox(boxed),
            self.shardings,
        )
        self.step = jax.jit(
            functools.partial(train_step, model=model, tx=tx, seed=seed),
            in_shardings=(self.shardings, NamedSharding(mesh, BATCH)),
            out_shardings=(self.shardings, replicated(mesh)),
            donate_argnums=0,
        )

    def init(self, seed: int) -> TrainState:
        """Creates the state sharded: it never lies whole on one device."""
        init = jax.jit(lambda key: nn.unbox(self._init(key)), out_shardings=self.shardings)
        return init(jax.random.key(seed))
