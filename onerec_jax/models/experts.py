"""Experts under a limit of rows: copies of tokens sorted by expert, one batched product, and back.

Axes: T tokens, D model width, E experts, K experts a token, N = T * K copies, C rows an expert
takes, F hidden width.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from onerec_jax.models.layers import swiglu


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


def rows_or_zero(x_sd, index):
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
    return rows_or_zero(gradient_sd, plan.slot_tk).sum(1), None


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


@jax.custom_vjp
def combine_rows(y_sd, gate_tk, plan: Plan):
    """`sum_k gate_tk * y[slot_tk]`: the experts' outputs back to their tokens, `[T, D]`."""
    y_tkd = rows_or_zero(y_sd, plan.slot_tk)
    return jnp.einsum("tkd,tk->td", y_tkd, gate_tk.astype(y_sd.dtype))


def _combine_rows_forward(y_sd, gate_tk, plan):
    return combine_rows(y_sd, gate_tk, plan), (y_sd, gate_tk, plan)


def _combine_rows_backward(kept, gradient_td):
    y_sd, gate_tk, plan = kept
    gate_s = jnp.take(gate_tk.reshape(-1), plan.copy_s, mode="fill", fill_value=0)
    token_s = plan.copy_s // gate_tk.shape[1]
    rows_sd = jnp.take(gradient_td, token_s, axis=0, mode="clip")
    y_tkd = rows_or_zero(y_sd, plan.slot_tk)
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
