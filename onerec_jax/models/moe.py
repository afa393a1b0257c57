"""Mixture of experts with loss-free balancing.

Routing as in DeepSeek-V3 (sigmoid) or OneRec V0 (softmax); balancing as in "Auxiliary-Loss-Free
Load Balancing" (arXiv 2408.15664): a bias that no gradient touches steers which experts are chosen
and never how much they count. Experts are SwiGLU (OneRec Technical Report, section 2.2.2).

Axes: T tokens, D model width, E experts, K experts a token, C rows an expert takes, F hidden width.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from onerec_jax.models.layers import partitioned


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
    logits_te = jnp.einsum("td,de->te", x_td.astype(jnp.float32), router_de)
    score_te = jax.nn.sigmoid(logits_te) if gate == "sigmoid" else jax.nn.softmax(logits_te)
    _, index_tk = jax.lax.top_k(score_te + jax.lax.stop_gradient(bias_e), top_k)
    gate_tk = jnp.take_along_axis(score_te, index_tk, axis=-1)
    if gate == "sigmoid":
        gate_tk = gate_tk / gate_tk.sum(-1, keepdims=True)
    return index_tk, gate_tk


def capacity(num_tokens, num_experts, top_k, capacity_factor):
    """Rows C that one expert takes; a factor of 0 means as many as there are tokens (dropless)."""
    if not capacity_factor:
        return num_tokens
    return min(num_tokens, math.ceil(capacity_factor * num_tokens * top_k / num_experts))


def dispatch_slots(index_tk, valid_t, num_experts, rows):
    """The row of the `[E * C]` expert buffer that each token copy goes to.

    Copies beyond an expert's capacity, and copies of padding, get the slot `E * C`, which is
    outside the buffer. Earlier tokens go first. A rank by cumulative sum, not a sort: `argsort`
    inside `shard_map` has wrong gradients (design notes, trap 1).

    Returns:
      Slot int32 `[T, K]` and whether the copy was kept, bool `[T, K]`.
    """
    index_n = index_tk.reshape(-1)
    valid_n = jnp.repeat(valid_t, index_tk.shape[1])
    chosen_ne = jax.nn.one_hot(index_n, num_experts, dtype=jnp.int32) * valid_n[:, None]
    rank_n = jnp.take_along_axis(jnp.cumsum(chosen_ne, axis=0) - 1, index_n[:, None], axis=1)[:, 0]
    keep_n = valid_n & (rank_n < rows)
    slot_n = jnp.where(keep_n, index_n * rows + rank_n, num_experts * rows)
    return slot_n.reshape(index_tk.shape), keep_n.reshape(index_tk.shape)


def expert_ffn(x_td, slot_tk, gate_tk, w_in_edf, w_out_efd, rows):
    """Gathers tokens by expert, runs every expert as one batched product, and sums the copies.

    Args:
      x_td: tokens.
      slot_tk, gate_tk: from `dispatch_slots` and `route`.
      w_in_edf: `[E, D, 2F]`, gate and up projection side by side.
      w_out_efd: `[E, F, D]`.
      rows: capacity C.

    Returns:
      `[T, D]` in the type of `x_td`; a dropped copy adds nothing.
    """
    (t, d), k, e = x_td.shape, slot_tk.shape[1], w_in_edf.shape[0]
    buffer = jnp.zeros((e * rows, d), x_td.dtype)
    x_ecd = buffer.at[slot_tk.reshape(-1)].set(jnp.repeat(x_td, k, axis=0), mode="drop")
    x_ecd = x_ecd.reshape(e, rows, d)
    h_ecf = jnp.einsum("ecd,edf->ecf", x_ecd, w_in_edf.astype(x_td.dtype))
    gate_ecf, up_ecf = jnp.split(h_ecf, 2, axis=-1)
    y_ecd = jnp.einsum("ecf,efd->ecd", nn.silu(gate_ecf) * up_ecf, w_out_efd.astype(x_td.dtype))
    y_nd = jnp.take(
        y_ecd.reshape(e * rows, d), slot_tk.reshape(-1), axis=0, mode="fill", fill_value=0
    )
    return jnp.einsum("tkd,tk->td", y_nd.reshape(t, k, d), gate_tk.astype(x_td.dtype))


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

    @nn.compact
    def __call__(self, x, valid=None, *, dropless=False):
        """`x [..., D]`, `valid` bool `[...]` (None: all) -> `[..., D]`."""
        e, f, d = self.num_experts, self.hidden, x.shape[-1]
        init = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        router = self.param(
            "router", partitioned(nn.initializers.lecun_normal(), "embed", None), (d, e)
        )
        w_in = self.param("w_in", partitioned(init, "experts", "embed", "ff"), (e, d, 2 * f))
        w_out = self.param("w_out", partitioned(init, "experts", "ff", "embed"), (e, f, d))
        bias = self.variable("router", "bias", jnp.zeros, (e,)).value

        x_td = x.reshape(-1, d).astype(self.dtype)
        valid_t = jnp.ones(x_td.shape[0], bool) if valid is None else valid.reshape(-1)
        index_tk, gate_tk = route(x_td, router, bias, top_k=self.experts_per_token, gate=self.gate)
        rows = capacity(
            x_td.shape[0], e, self.experts_per_token, 0 if dropless else self.capacity_factor
        )
        slot_tk, keep_tk = dispatch_slots(index_tk, valid_t, e, rows)
        y_td = expert_ffn(x_td, slot_tk, gate_tk, w_in, w_out, rows)

        if self.is_mutable_collection("router_stats") and not self.is_initializing():
            chosen_te = jax.nn.one_hot(index_tk, e).sum(1) * valid_t[:, None]
            load = self.variable("router_stats", "load", jnp.zeros, (e,))
            dropped = self.variable("router_stats", "dropped", jnp.zeros, ())
            load.value = chosen_te.sum(0)
            copies = load.value.sum()
            dropped.value = (copies - keep_tk.sum()) / jnp.maximum(copies, 1)
        return y_td.reshape(x.shape)


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
