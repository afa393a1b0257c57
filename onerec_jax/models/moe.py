"""Mixture of experts with loss-free balancing.

Routing as in DeepSeek-V3 (sigmoid) or OneRec V0 (softmax); balancing as in "Auxiliary-Loss-Free
Load Balancing" (arXiv 2408.15664): a bias that no gradient touches steers which experts are chosen
and never how much they count. Experts are SwiGLU (OneRec Technical Report, section 2.2.2).

Axes: T tokens, D model width, E experts, K experts a token, C rows an expert takes, F hidden width.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from onerec_jax.config import ModelConfig
from onerec_jax.models.layers import partitioned, swiglu
from onerec_jax.sharding import BATCH, USER_AXES, per_device, sharded


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
    """Rows C that one expert takes; a factor of 0 means as many as there are tokens (dropless).

    Large capacities are rounded up to multiples of 8, at which matrix products are fast.
    """
    if not capacity_factor:
        return num_tokens
    rows = math.ceil(capacity_factor * num_tokens * top_k / num_experts)
    return min(num_tokens, rows if rows < 64 else -(-rows // 8) * 8)


class Plan(NamedTuple):
    """Which token copy goes to which row of the experts' `[E * C]` buffer, and back.

    N = T * K copies; copy n is of token n // K. E * C and N stand for none.
    """

    slot_tk: jax.Array  # int32 [T, K], row of each copy; E * C: dropped, or of padding
    copy_s: jax.Array  # int32 [E * C], copy in each row; N: the row is empty


def sort_copies(index_tk, valid_tk, num_experts):
    """Copies by expert, earlier tokens first: experts int32 `[N]` (`num_experts` for invalid
    copies), copies int32 `[N]`, and where each expert's begin, int32 `[E + 1]`."""
    expert_n = jnp.where(valid_tk, index_tk, num_experts).reshape(-1).astype(jnp.int32)
    copy_n = jnp.arange(index_tk.size, dtype=jnp.int32)
    sorted_n, order_n = jax.lax.sort_key_val(expert_n, copy_n)
    # Counted, for a binary search is a loop of small kernels on a GPU.
    expert_e = jnp.arange(num_experts + 1, dtype=jnp.int32)
    start_e = (expert_n < expert_e[:, None]).sum(1, dtype=jnp.int32)
    return sorted_n, order_n, start_e


def plan_dispatch(index_tk, valid_tk, num_experts, rows) -> Plan:
    """Earlier tokens go first; copies beyond an expert's C rows and invalid ones are left out.

    Args:
      index_tk: int32 `[T, K]`, experts of each token.
      valid_tk: bool `[T, K]`, False for padding and for experts that are not here.
      rows: C.
    """
    n, none = index_tk.size, num_experts * rows
    sorted_n, order_n, start_e = sort_copies(index_tk, valid_tk, num_experts)
    rank_n = jnp.arange(n, dtype=jnp.int32) - start_e[sorted_n]
    fits_n = (sorted_n < num_experts) & (rank_n < rows)
    slot_n = jnp.where(fits_n, sorted_n * rows + rank_n, none)
    slot_n = jnp.zeros(n, jnp.int32).at[order_n].set(slot_n, unique_indices=True)
    place_ec = start_e[:-1, None] + jnp.arange(rows, dtype=jnp.int32)
    filled_ec = place_ec < start_e[1:, None]
    copy_ec = jnp.where(filled_ec, order_n[jnp.minimum(place_ec, n - 1)], n)
    return Plan(slot_n.reshape(index_tk.shape), copy_ec.reshape(-1))


def _rows_or_zero(x_sd, index):
    """Rows of `x`, zeros where the index is one past its end."""
    return jnp.take(x_sd, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def gather_rows(x_td, plan: Plan):
    """Tokens to the experts' buffer, `[T, D] -> [E * C, D]`; empty rows hold any token.

    The gradient is a gather too, by `plan.slot_tk`: scatters of rows are slow on GPUs.
    """
    token_s = plan.copy_s // plan.slot_tk.shape[1]
    return jnp.take(x_td, token_s, axis=0, mode="clip")


def _gather_rows_forward(x_td, plan):
    return gather_rows(x_td, plan), plan


def _gather_rows_backward(plan, gradient_sd):
    return _rows_or_zero(gradient_sd, plan.slot_tk).sum(1), None


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


@jax.custom_vjp
def combine_rows(y_sd, gate_tk, plan: Plan):
    """`sum_k gate_tk * y[slot_tk]`: the experts' outputs back to their tokens, `[T, D]`."""
    y_tkd = _rows_or_zero(y_sd, plan.slot_tk)
    return jnp.einsum("tkd,tk->td", y_tkd, gate_tk.astype(y_sd.dtype))


def _combine_rows_forward(y_sd, gate_tk, plan):
    return combine_rows(y_sd, gate_tk, plan), (y_sd, gate_tk, plan)


def _combine_rows_backward(kept, gradient_td):
    y_sd, gate_tk, plan = kept
    gate_s = jnp.take(gate_tk.reshape(-1), plan.copy_s, mode="fill", fill_value=0)
    token_s = plan.copy_s // gate_tk.shape[1]
    rows_sd = jnp.take(gradient_td, token_s, axis=0, mode="clip")
    y_tkd = _rows_or_zero(y_sd, plan.slot_tk)
    gate_gradient = jnp.einsum("tkd,td->tk", y_tkd, gradient_td, preferred_element_type=jnp.float32)
    return rows_sd * gate_s[:, None].astype(y_sd.dtype), gate_gradient.astype(gate_tk.dtype), None


combine_rows.defvjp(_combine_rows_forward, _combine_rows_backward)


def expert_ffn(x_td, gate_tk, w_in_edgf, w_out_efd, plan: Plan):
    """Gathers tokens by expert, runs every expert as one batched product, and sums the copies.

    Args:
      x_td: tokens.
      gate_tk: from `route`.
      w_in_edgf: `[E, D, 2, F]`, gate and up projection.
      w_out_efd: `[E, F, D]`.
      plan: from `plan_dispatch`.

    Returns:
      `[T, D]` in the type of `x_td`; a dropped copy adds nothing.
    """
    e, d = len(w_in_edgf), x_td.shape[1]
    y_ecd = run_experts(gather_rows(x_td, plan).reshape(e, -1, d), w_in_edgf, w_out_efd)
    return combine_rows(y_ecd.reshape(-1, d), gate_tk, plan)


def run_experts(x_ecd, w_in_edgf, w_out_efd):
    """Every expert on its own rows, `[E, C, D] -> [E, C, D]`."""
    e, d, _, f = w_in_edgf.shape
    # One product for both, and slices of its rows: two products read the tokens twice.
    h_ecf = jnp.einsum("ecd,edf->ecf", x_ecd, w_in_edgf.reshape(e, d, 2 * f).astype(x_ecd.dtype))
    gate_ecf, up_ecf = jnp.split(h_ecf, 2, axis=-1)
    return jnp.einsum("ecf,efd->ecd", swiglu(gate_ecf, up_ecf), w_out_efd.astype(x_ecd.dtype))


FREE_ROWS = 128
"""Rows of an expert that a GPU multiplies while it reads the weights (580 TFLOP/s, 3 to 5 TB/s)."""
COMMON_LOAD = 1.25
"""Load of an expert, as a multiple of the mean, that takes no further steps."""
BLOCK = 512
"""Rows of one further step."""


def dropless_rows(num_tokens, num_experts, top_k) -> int:
    """Rows C of each expert that `dropless_ffn` runs together."""
    rows = capacity(num_tokens, num_experts, top_k, COMMON_LOAD)
    return min(num_tokens, max(rows, FREE_ROWS))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def dropless_ffn(x_td, gate_tk, w_in_edgf, w_out_efd, index_tk, mine_tk, rows):
    """`expert_ffn` without a limit, whatever the load of an expert: in inference, and in gradients
    that have to be of what inference computed.

    The first `rows` copies of each expert run as one batched product. What is over, nothing as
    long as the load is nearly even, follows block by block, one expert each, in a loop that ends
    when all are done. A copy's result is the same in either up to rounding.

    The backward pass goes the same way: that of the rows together as in training, then block by
    block what is over, whose forward pass it repeats, for a loop of unknown length keeps nothing.

    Counted for 32 users x 512 beams, 2 of 24 experts, D 1024, F 2816, of which 0.57 TFLOP are
    useful: 0.71 together, 9 GFLOP a further block, 58 of them (0.51 TFLOP) if all tokens choose the
    same two experts. Rows for all tokens in every expert would be 6.8 TFLOP and 4.4 GB; sorted
    blocks alone, each with a copy of its weights, 1.5 GB written and read whatever the load;
    `lax.ragged_dot` runs every expert on every row on a GPU.

    Args:
      x_td, gate_tk, w_in_edgf, w_out_efd: as `expert_ffn`.
      index_tk: int32, experts of each token, counted from the first of `w_in_edgf`.
      mine_tk: bool, copies whose expert is among them.
      rows: C, from `dropless_rows`.
    """
    values = x_td, gate_tk, w_in_edgf, w_out_efd
    plan = plan_dispatch(index_tk, mine_tk, len(w_in_edgf), rows)
    return _add_blocks(expert_ffn(*values, plan), values, index_tk, mine_tk, rows)


class Block(NamedTuple):
    """BLOCK copies of one expert. Where it has fewer, the others lie beyond all copies and tokens,
    in different places: no two meet."""

    expert: jax.Array  # int32 []
    copy_c: jax.Array  # int32 [BLOCK]
    token_c: jax.Array  # int32 [BLOCK]


def _blocks(index_tk, mine_tk, num_experts, rows):
    """Number of the blocks that hold the copies over `rows`, and what finds the i-th."""
    tokens, top_k = index_tk.shape
    _, order_n, start_e = sort_copies(index_tk, mine_tk, num_experts)
    blocks_e = -(-jnp.maximum(jnp.diff(start_e) - rows, 0) // BLOCK)
    end_e = jnp.cumsum(blocks_e)

    def find(i):
        expert = (end_e <= i).sum()
        first = start_e[expert] + rows + (i - end_e[expert] + blocks_e[expert]) * BLOCK
        place_c = first + jnp.arange(BLOCK, dtype=jnp.int32)
        copy_c = order_n[jnp.minimum(place_c, len(order_n) - 1)]
        exists_c = place_c < start_e[expert + 1]
        return Block(
            expert,
            jnp.where(exists_c, copy_c, len(order_n) + place_c),
            jnp.where(exists_c, copy_c // top_k, tokens + place_c),
        )

    return end_e[-1], find


def _of_block(block: Block, x_td, gate_tk, w_in_edgf, w_out_efd):
    """Tokens `[1, BLOCK, D]`, gates `[BLOCK, 1]` and weights `[1, ...]` of a block; of copies that
    do not exist those of any."""
    x_ecd = jnp.take(x_td, block.token_c, axis=0, mode="clip")[None]
    gate_c = jnp.take(gate_tk.reshape(-1), block.copy_c, mode="clip")
    w_in, w_out = (
        jax.lax.dynamic_slice_in_dim(w, block.expert, 1) for w in (w_in_edgf, w_out_efd)
    )
    return x_ecd, gate_c[:, None].astype(x_td.dtype), w_in, w_out


def _add_blocks(y_td, values, index_tk, mine_tk, rows):
    """Adds the outputs for the copies over `rows`."""
    if rows >= len(y_td):
        return y_td
    count, find = _blocks(index_tk, mine_tk, len(values[2]), rows)

    def add(i, y_td):
        block = find(i)
        x_ecd, gate_c1, *weights = _of_block(block, *values)
        y_cd = run_experts(x_ecd, *weights)[0] * gate_c1
        return y_td.at[block.token_c].add(y_cd, mode="drop", unique_indices=True)

    return jax.lax.fori_loop(0, count, add, y_td)


def _dropless_forward(x_td, gate_tk, w_in_edgf, w_out_efd, index_tk, mine_tk, rows):
    values = x_td, gate_tk, w_in_edgf, w_out_efd
    plan = plan_dispatch(index_tk, mine_tk, len(w_in_edgf), rows)
    y_td, back = jax.vjp(lambda *values: expert_ffn(*values, plan), *values)
    y_td = _add_blocks(y_td, values, index_tk, mine_tk, rows)
    return y_td, (back, values, index_tk, mine_tk)


def _dropless_backward(rows, kept, gradient_td):
    back, values, index_tk, mine_tk = kept
    grads = back(gradient_td)
    if rows >= len(gradient_td):
        return *grads, None, None
    count, find = _blocks(index_tk, mine_tk, len(values[2]), rows)

    def add(i, grads):
        dx_td, dgate_n, *dweights = grads
        block = find(i)
        x_ecd, gate_c1, *weights = _of_block(block, *values)
        y_ecd, back = jax.vjp(run_experts, x_ecd, *weights)
        gradient_cd = _rows_or_zero(gradient_td, block.token_c)
        dx_ecd, *dweights_here = back((gradient_cd * gate_c1)[None])
        dgate_c = jnp.einsum(
            "cd,cd->c", y_ecd[0], gradient_cd, preferred_element_type=jnp.float32
        )
        for n, here in enumerate(dweights_here):
            total = jax.lax.dynamic_slice_in_dim(dweights[n], block.expert, 1) + here
            dweights[n] = jax.lax.dynamic_update_slice_in_dim(dweights[n], total, block.expert, 0)
        at = {"mode": "drop", "unique_indices": True}
        return (
            dx_td.at[block.token_c].add(dx_ecd[0], **at),
            dgate_n.at[block.copy_c].add(dgate_c.astype(dgate_n.dtype), **at),
            *dweights,
        )

    dx_td, dgate_tk, *dweights = grads
    start = dx_td, dgate_tk.reshape(-1), *dweights
    dx_td, dgate_n, *dweights = jax.lax.fori_loop(0, count, add, start)
    return dx_td, dgate_n.reshape(dgate_tk.shape), *dweights, None, None


dropless_ffn.defvjp(_dropless_forward, _dropless_backward)


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
    logits_te = jnp.einsum("td,de->te", x_td.astype(jnp.float32), router_de)
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
