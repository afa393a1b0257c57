"""Experts without a limit, at the price of the usual load: in inference, and in gradients of it.

Axes: as `models/experts.py`; c is also a row of a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from onerec_jax.models.experts import (
    capacity,
    expert_ffn,
    plan_dispatch,
    rows_or_zero,
    run_experts,
    sort_copies,
)

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
    values = _cast(x_td, gate_tk, w_in_edgf, w_out_efd)
    plan = plan_dispatch(index_tk, mine_tk, len(w_in_edgf), rows)
    return _add_blocks(expert_ffn(*values, plan), values, index_tk, mine_tk, rows)


def _cast(x_td, gate_tk, w_in_edgf, w_out_efd):
    """Weights in the tokens' type, once: a loop that casts by itself has XLA copy float32 ones."""
    return x_td, gate_tk, w_in_edgf.astype(x_td.dtype), w_out_efd.astype(x_td.dtype)


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
    w_in, w_out = (jax.lax.dynamic_slice_in_dim(w, block.expert, 1) for w in (w_in_edgf, w_out_efd))
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
    values = _cast(x_td, gate_tk, w_in_edgf, w_out_efd)
    plan = plan_dispatch(index_tk, mine_tk, len(w_in_edgf), rows)
    y_td, back = jax.vjp(lambda *values: expert_ffn(*values, plan), *values)
    y_td = _add_blocks(y_td, values, index_tk, mine_tk, rows)
    return y_td, (back, values, index_tk, mine_tk)


def _dropless_backward(rows, kept, gradient_td):
    back, values, index_tk, mine_tk = kept
    dx_td, dgate_tk, *dweights = back(gradient_td)
    # Those of the weights are summed in their own type, float32.
    grads = dx_td, dgate_tk, *(dw.astype(jnp.float32) for dw in dweights)
    if rows >= len(gradient_td):
        return *grads, None, None
    count, find = _blocks(index_tk, mine_tk, len(values[2]), rows)

    def add(i, grads):
        dx_td, dgate_n, *dweights = grads
        block = find(i)
        x_ecd, gate_c1, *weights = _of_block(block, *values)
        y_ecd, back = jax.vjp(run_experts, x_ecd, *weights)
        gradient_cd = rows_or_zero(gradient_td, block.token_c)
        dx_ecd, *dweights_here = back((gradient_cd * gate_c1)[None])
        dgate_c = jnp.einsum("cd,cd->c", y_ecd[0], gradient_cd, preferred_element_type=jnp.float32)
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
