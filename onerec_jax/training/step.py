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
from onerec_jax.sharding import BATCH, deal, on_mesh, replicated, shardings_of, split_over_data


@struct.dataclass
class TrainState:
    """All that a training step reads and writes."""

    step: jax.Array  # int32 []
    params: dict
    router: dict  # loss-free balancing bias, moved by load; {} for a dense model
    opt_state: optax.OptState
    sampler: dict = struct.field(default_factory=dict)
    """Variables of an earlier step that post-training draws items with; {} in other stages."""

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


def gradients(params, router, batch: Batch, key, *, model: OneRec):
    """Gradients of the NTP loss (and of the auxiliary loss, if the routers have one), the loss of
    each level, and the routers' statistics."""

    def loss_fn(params):
        logits, updated = model.apply(
            {"params": params, "router": router},
            batch,
            mutable=["router_stats"],
            rngs={"dropout": key},
        )
        level = mean_over_targets(ntp_loss(logits, batch.target), batch.target_count)
        stats = updated.get("router_stats", {})
        auxiliary = sum(
            layer["auxiliary"].sum() for layer in _layers(stats) if "auxiliary" in layer
        )
        return level.sum() + model.cfg.auxiliary_weight * auxiliary, (level, stats)

    grads, (level, stats) = jax.grad(loss_fn, has_aux=True)(params)
    return grads, level, stats


def accumulated(params, router, batch: Batch, key, *, model: OneRec, parts: int):
    """`gradients` of a batch in parts, one after the other: less memory, the same step.

    The parts' losses count by their targets, and loads are summed before the router sees them.
    """

    def compute(number, batch):
        here = jax.random.fold_in(key, number)
        grads, level, stats = gradients(params, router, batch, here, model=model)
        weight = batch.target_count.sum() / total
        return *jax.tree.map(lambda x: x * weight, (grads, level)), stats

    def add(carry, part):
        return jax.tree.map(jnp.add, carry, compute(*part)), None

    total = batch.target_count.sum()
    dealt = jnp.arange(parts), deal(batch, parts)
    shapes = jax.eval_shape(compute, *jax.tree.map(lambda x: x[0], dealt))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, level, stats), _ = jax.lax.scan(add, zeros, dealt)
    stats = jax.tree_util.tree_map_with_path(
        lambda path, x: x / parts if path[-1].key == "dropped" else x, stats
    )
    return grads, level, stats


def train_step(
    state: TrainState, batch: Batch, *, model: OneRec, tx, seed: int, accumulate: int = 1
):
    """One AdamW step on the NTP loss, then one balancing step of the router bias.

    The dropout key is a function of (seed, step): nothing to checkpoint, resume is exact.

    Args:
      accumulate: parts that the batch is cut into.

    Returns:
      The next state and metrics: `loss` (sum over levels, nats an item), `loss_level` `[levels]`,
      `grad_norm`, and for experts `load` (share of tokens, `[layers, E]`), `max_violation` (worst
      layer) and `dropped` (share of copies, over all layers).
    """
    return update(
        state, *ntp_gradients(state, batch, model, seed=seed, accumulate=accumulate), model, tx
    )


def ntp_gradients(state: TrainState, batch: Batch, model: OneRec, *, seed: int, accumulate: int):
    """`gradients` at a state, in parts where asked for."""
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    compute = functools.partial(gradients, model=model)
    if accumulate > 1:
        compute = functools.partial(accumulated, model=model, parts=accumulate)
    return compute(state.params, state.router, batch, key)


def update(state: TrainState, grads, level, stats, model: OneRec, tx):
    """The optimizer's step on gradients, the routers' on their load; as `train_step` returns."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {"loss": level.sum(), "loss_level": level, "grad_norm": optax.tree.norm(grads)}
    router = state.router
    if stats:
        if model.cfg.balance == "bias":
            router = update_router_bias(router, stats, model.cfg.router_bias_rate)
        layers = _layers(stats)
        load = jnp.concatenate([x["load"].reshape(-1, x["load"].shape[-1]) for x in layers])
        metrics |= {
            "load": load / load.sum(-1, keepdims=True),
            "max_violation": max_violation(load).max(),
            "dropped": sum((x["dropped"] * x["load"].sum(-1)).sum() for x in layers) / load.sum(),
        }
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, router, opt_state, state.sampler), metrics


def _layers(stats) -> list[dict]:
    """Statistics of every MoE layer (or stack of them) in `router_stats`."""

    def is_layer(node):
        return isinstance(node, dict) and "load" in node

    return [node for node in jax.tree.leaves(stats, is_leaf=is_layer) if is_layer(node)]


class Trainer:
    """The compiled step and the shardings of its state on one mesh."""

    def __init__(
        self, model, tx, mesh, example, *, seed: int, step=None, init=init_state, **options
    ):
        """`example` is any batch of the right shapes; `model.train` must be True.

        Args:
          step: the training step of the model; None: `train_step`, that of `OneRec`.
          init: what makes its first state.
          options: further settings of the step, such as `accumulate`.
        """
        self.mesh = mesh
        self._init = functools.partial(init, batch=example, model=model, tx=tx)
        boxed = jax.eval_shape(self._init, jax.random.key(0))
        self.shardings = shardings_of(boxed, mesh)
        self.shardings = self.shardings.replace(
            opt_state=split_over_data(self.shardings.opt_state, nn.unbox(boxed).opt_state, mesh)
        )
        self.abstract_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            nn.unbox(boxed),
            self.shardings,
        )
        self._tx = tx
        step = functools.partial(step or train_step, model=model, tx=tx, seed=seed, **options)
        self.step = jax.jit(
            on_mesh(step, mesh),
            in_shardings=(self.shardings, NamedSharding(mesh, BATCH)),
            out_shardings=(self.shardings, replicated(mesh)),
            donate_argnums=0,
        )

    def init(self, seed: int) -> TrainState:
        """Creates the state sharded: it never lies whole on one device."""
        init = jax.jit(lambda key: nn.unbox(self._init(key)), out_shardings=self.shardings)
        return init(jax.random.key(seed))

    def init_from(self, variables: dict) -> TrainState:
        """The state that begins at given `params` and `router`; they are the sampler too, if there
        is to be one."""
        has_sampler = bool(self.abstract_state.sampler)

        def begin(variables):
            params, router = variables["params"], variables["router"]
            sampler = jax.tree.map(jnp.copy, variables) if has_sampler else {}  # both are donated
            zero = jnp.zeros((), jnp.int32)
            return TrainState(zero, params, router, self._tx.init(params), sampler)

        return jax.jit(begin, out_shardings=self.shardings)(variables)
