"""Mixture of experts with loss-free balancing.

Routing as in DeepSeek-V3 (sigmoid) or OneRec V0 (softmax); balancing as in "Auxiliary-Loss-Free
Load Balancing" (arXiv 2408.15664): a bias that no gradient touches steers which experts are chosen
and never how much they count. Experts are SwiGLU (OneRec Technical Report, section 2.2.2).

Axes: T tokens, D model width, E experts, K experts a token, F hidden width.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from onerec_jax.config import ModelConfig
from onerec_jax.models.dropless import dropless_ffn, dropless_rows
from onerec_jax.models.experts import capacity, expert_ffn, plan_dispatch
from onerec_jax.models.layers import partitioned
from onerec_jax.sharding import BATCH, USER_AXES, per_device, sharded


@jax.checkpoint
def router_logits(x_td, router_de):
    """Float32 `[T, E]`. The backward pass casts the tokens anew and keeps no copy of them."""
    return jnp.einsum("td,de->te", x_td.astype(jnp.float32), router_de)


def route(x_td, router_de, bias_e, *, top_k, gate="sigmoid"):
    """Chooses the experts of every token.

    Args:
      x_td: tokens, any float type; scores are computed in float32.
      router_de: float32 router weights.
      bias_e: float32 balancing bias: enters the choice, never the gates.
      top_k: experts a token.
      gate: "sigmoid" renormalises over the chosen experts; "softmax" does not (OneRec V0).

    Returns:
      Expert index int32 `[T, K]` and gate float32 `[T, K]`.
    """
    logits_te = router_logits(x_td, router_de)
    score_te = jax.nn.sigmoid(logits_te) if gate == "sigmoid" else jax.nn.softmax(logits_te)
    _, index_tk = jax.lax.top_k(score_te + jax.lax.stop_gradient(bias_e), top_k)
    gate_tk = jnp.take_along_axis(score_te, index_tk, axis=-1)
    if gate == "sigmoid":
        gate_tk = gate_tk / gate_tk.sum(-1, keepdims=True)
    return index_tk, gate_tk


def routed_experts(
    x_td, valid_t, router_de, bias_e, w_in_edgf, w_out_efd, *, top_k, capacity_factor, gate
):
    """Routes tokens, runs the experts and sums their outputs, on the mesh of the context if any.

    There each device routes the tokens of its users. Devices along `expert` share their tokens,
    each runs its own experts on all of them, and the sums go back to the devices that asked; along
    `tensor` each device has a part of every expert's hidden width.

    Args:
      capacity_factor: as `capacity`; None: dropless by `dropless_ffn`, for inference.

    Returns:
      `[T, D]` in the type of `x_td`; load float32 `[E]` and copies dropped, float32 `[]`, both over
      all tokens.
    """
    num_experts, mesh = router_de.shape[1], sharded()

    def here(x_td, valid_t, router_de, bias_e, w_in_edgf, w_out_efd):
        if mesh:
            x_td = jax.lax.all_gather(x_td, "expert", tiled=True)
            valid_t = jax.lax.all_gather(valid_t, "expert", tiled=True)
        index_tk, gate_tk = route(x_td, router_de, bias_e, top_k=top_k, gate=gate)
        load_e = (jax.nn.one_hot(index_tk, num_experts).sum(1) * valid_t[:, None]).sum(0)
        local = len(w_in_edgf)
        if mesh:
            index_tk = index_tk - jax.lax.axis_index("expert") * local
        mine_tk = valid_t[:, None] & (index_tk >= 0) & (index_tk < local)
        if capacity_factor is None:
            rows = dropless_rows(len(x_td), num_experts, top_k)
            y_td = dropless_ffn(x_td, gate_tk, w_in_edgf, w_out_efd, index_tk, mine_tk, rows)
            dropped = jnp.zeros(())
        else:
            rows = capacity(len(x_td), num_experts, top_k, capacity_factor)
            plan = plan_dispatch(index_tk, mine_tk, local, rows)
            y_td = expert_ffn(x_td, gate_tk, w_in_edgf, w_out_efd, plan)
            dropped = (mine_tk.sum() - (plan.slot_tk < local * rows).sum()).astype(jnp.float32)
        if mesh:
            y_td = jax.lax.psum(y_td, "tensor")
            y_td = jax.lax.psum_scatter(y_td, "expert", tiled=True)
            load_e = jax.lax.psum(load_e, ("data", "fsdp"))
            dropped = jax.lax.psum(dropped, USER_AXES)
        return y_td, load_e, dropped

    in_specs = (BATCH, BATCH, P(), P(), P("expert", None, None, "tensor"), P("expert", "tensor"))
    return per_device(here, in_specs, (BATCH, P(), P()))(
        x_td, valid_t, router_de, bias_e, w_in_edgf, w_out_efd
    )


class MoE(nn.Module):
    """A feed-forward layer of routed experts.

    Collections: `params` (router, experts); `router` (`bias`, float32 `[E]`, read only: the train
    step moves it with `update_router_bias`); `router_stats` (`load` float32 `[E]`, tokens routed to
    each expert before any is dropped, and `dropped`, share of copies over capacity), written only
    where the caller makes that collection mutable.
    """

    num_experts: int
    experts_per_token: int
    hidden: int
    capacity_factor: float
    dtype: Any
    gate: Literal["sigmoid", "softmax"] = "sigmoid"
    auxiliary: bool = False
    """Write the auxiliary loss of load balancing into `router_stats` too."""

    @nn.compact
    def __call__(self, x, valid=None, *, dropless=False):
        """`x [..., D]`, `valid` bool `[...]` (None: all) -> `[..., D]`."""
        e, f, d = self.num_experts, self.hidden, x.shape[-1]
        init = nn.initializers.lecun_normal(in_axis=1, out_axis=-1, batch_axis=(0,))
        router = self.param(
            "router", partitioned(nn.initializers.lecun_normal(), "embed", None), (d, e)
        )
        w_in = self.param("w_in", partitioned(init, "experts", "embed", None, "ff"), (e, d, 2, f))
        w_out = self.param("w_out", partitioned(init, "experts", "ff", "embed"), (e, f, d))
        bias = self.variable("router", "bias", jnp.zeros, (e,)).value

        x_td = x.reshape(-1, d).astype(self.dtype)
        valid_t = jnp.ones(x_td.shape[0], bool) if valid is None else valid.reshape(-1)
        y_td, load_e, dropped = routed_experts(
            x_td,
            valid_t,
            router,
            bias,
            w_in,
            w_out,
            top_k=self.experts_per_token,
            capacity_factor=None if dropless else self.capacity_factor,
            gate=self.gate,
        )
        if self.is_mutable_collection("router_stats") and not self.is_initializing():
            self.variable("router_stats", "load", jnp.zeros, (e,)).value = load_e
            if self.auxiliary:
                value = auxiliary_loss(x_td, valid_t, router, load_e, gate=self.gate)
                self.variable("router_stats", "auxiliary", jnp.zeros, ()).value = value
            share = self.variable("router_stats", "dropped", jnp.zeros, ())
            share.value = dropped / jnp.maximum(load_e.sum(), 1)
        return y_td.reshape(x.shape)


def auxiliary_loss(x_td, valid_t, router_de, load_e, *, gate="sigmoid"):
    """`E * sum_i f_i P_i`: 1 at an even load (arXiv 2101.03961, eq. 4).

    f_i is the share of the copies that expert i got (no gradient), P_i the mean over tokens of its
    score, scores of a token summing to one.
    """
    logits_te = router_logits(x_td, router_de)
    score_te = jax.nn.sigmoid(logits_te) if gate == "sigmoid" else jax.nn.softmax(logits_te)
    score_te = score_te / score_te.sum(-1, keepdims=True) * valid_t[:, None]
    mean_e = score_te.sum(0) / jnp.maximum(valid_t.sum(), 1)
    share_e = jax.lax.stop_gradient(load_e / jnp.maximum(load_e.sum(), 1))
    return len(load_e) * (share_e * mean_e).sum()


def make_experts(cfg: ModelConfig, dtype, *, name: str) -> MoE:
    """The layer of experts that a configuration asks for."""
    return MoE(
        cfg.num_experts,
        cfg.experts_per_token,
        cfg.expert_dim,
        cfg.capacity_factor,
        dtype,
        cfg.gate,
        cfg.balance == "auxiliary",
        name=name,
    )


def update_router_bias(router, router_stats, rate):
    """One balancing step: `b += u * sign(mean load - load)` for every layer (2408.15664, eq. 3).

    Args:
      router: the `router` collection, leaves `bias` `[..., E]`.
      router_stats: the `router_stats` collection of the same modules, `load` `[..., E]`, summed
        over the whole global batch.
      rate: u; 1e-3 in the paper.
    """

    def step(layer, stats):
        load = stats["load"]
        return {"bias": layer["bias"] + rate * jnp.sign(load.mean(-1, keepdims=True) - load)}

    return jax.tree.map(step, router, router_stats, is_leaf=lambda node: "bias" in node)


def max_violation(load):
    """MaxVio of 2408.15664: `(max load - mean load) / mean load` over the last axis."""
    mean = jnp.maximum(load.mean(-1), 1e-9)
    return (load.max(-1) - mean) / mean
