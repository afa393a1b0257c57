"""Layers shared by encoder and decoder: norm, attention by lengths, feed-forward.

Array names end in their axes: B users, S query positions, T key positions, D model width, H heads,
K head width, F hidden width. Parameters are float32 and carry logical axis names, which
`onerec_jax.sharding` maps to mesh axes; activations have the `dtype` that a module is given.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from onerec_jax.sharding import BATCH, USER_AXES, per_device, sharded

Dtype = Any


def partitioned(init, *axes):
    """An initialiser whose parameter carries logical axis names."""
    return nn.with_logical_partitioning(init, axes)


def on_one_cpu() -> bool:
    """Whether what is traced is for a single CPU, and wants products and layouts of its own."""
    return jax.default_backend() == "cpu" and not sharded()


def dot_general(x, w, dimension_numbers, **options):
    """`jax.lax.dot_general` for `nn.DenseGeneral`: last axes of `x` by first axes of `w`."""
    if on_one_cpu():
        return cpu_product(x, w, len(dimension_numbers[0][0]))
    return jax.lax.dot_general(x, w, dimension_numbers, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cpu_product(x, w, axes):
    """Product over the last `axes` axes of `x` and the first of `w`, with a gradient for CPUs.

    XLA's CPU products are 2.4 times faster when the result has fewer rows than columns. Left to
    itself XLA also transposes what the weights' gradient reads, and computes the activation's
    gradient a second time on the way: of GELU, a third of a step.
    """
    inner = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
    return jax.lax.dot_general(x, w, (inner, ((), ())))


def _cpu_product_forward(x, w, axes):
    return cpu_product(x, w, axes), (x, w)


def _cpu_product_backward(axes, kept, gradient):
    x, w = kept
    outer = tuple(range(x.ndim - axes, gradient.ndim)), tuple(range(axes, w.ndim))
    dx = jax.lax.dot_general(gradient, w, (outer, ((), ())))
    rows, columns = math.prod(w.shape[:axes]), math.prod(w.shape[axes:])
    x, gradient = x.reshape(-1, rows), gradient.reshape(-1, columns)
    if rows <= columns:
        dw = x.T @ gradient
    else:  # the barrier keeps XLA from turning the product around
        dw = jax.lax.optimization_barrier(gradient.T @ x).T
    return dx, dw.reshape(w.shape)


cpu_product.defvjp(_cpu_product_forward, _cpu_product_backward)


def dense(features, *, axes, dtype, name, use_bias=False, axis=-1):
    """Linear map with logical axis names, one for each kernel dimension."""
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=partitioned(nn.initializers.lecun_normal(), *axes),
        bias_init=partitioned(nn.initializers.zeros, *axes[-1:]),
        dot_general=dot_general,
        name=name,
    )


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + 1e-6) * scale` over the last axis, statistics in float32."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", partitioned(nn.initializers.ones, None), (x.shape[-1],))
        return normalize(x, scale, self.dtype)


def rms_norm(*, dtype, name):
    """A named `RMSNorm`."""
    return RMSNorm(dtype, name=name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def normalize(x, scale_d, dtype):
    """The arithmetic of `RMSNorm`.

    Its gradient keeps `x` as it came and nothing else; left to itself, JAX keeps several float32
    copies of it, and moving those costs as much time as the products around the norm.
    """
    return (_normalized(x) * scale_d).astype(dtype)


def _inverse_rms(x):
    return jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def _normalized(x):
    x = x.astype(jnp.float32)
    return x * _inverse_rms(x)


def _normalize_forward(x, scale_d, dtype):
    return normalize(x, scale_d, dtype), (x, scale_d)


def _normalize_backward(dtype, kept, gradient):
    x, scale_d = kept
    wide = x.astype(jnp.float32)
    inverse = _inverse_rms(wide)
    unit, gradient = wide * inverse, gradient.astype(jnp.float32)
    scale_gradient = (gradient * unit).sum(tuple(range(x.ndim - 1)))
    inner = gradient * scale_d
    dx = inverse * (inner - unit * (inner * unit).mean(-1, keepdims=True))
    return dx.astype(x.dtype), scale_gradient


normalize.defvjp(_normalize_forward, _normalize_backward)


@jax.custom_vjp
def leaky_relu(x):
    """LeakyReLU of slope 0.01. Its gradient reads the result, which the next product keeps anyway,
    and not the input."""
    return nn.leaky_relu(x, 0.01)


def _leaky_forward(x):
    y = leaky_relu(x)
    return y, y


def _leaky_backward(y, gradient):
    return (jnp.where(y >= 0, gradient, 0.01 * gradient),)


leaky_relu.defvjp(_leaky_forward, _leaky_backward)

# These keep their input for the backward pass, not the steps in between.
gelu = jax.checkpoint(nn.gelu)
swiglu = jax.checkpoint(lambda gate, up: nn.silu(gate) * up)

ACTIVATIONS = {"gelu": gelu, "relu": nn.relu}
"""Of dense feed-forward layers, by `ModelConfig.activation`."""


def embedding(size, width, *, axes=("vocabulary", "embed")):
    """Initialiser and shape of an embedding table, for `Module.param`.

    Large tables are rounded up to a multiple of 256 rows, so that they split over devices.
    """
    if size > 4096:
        size = -(-size // 256) * 256
    return partitioned(nn.initializers.normal(width**-0.5), *axes), (size, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table_vd, indices, dtype):
    """Rows of an embedding table: `[V, D]` at int `[...]` in range -> `[..., D]` in `dtype`.

    Args:
      table_vd: float32.
      indices: an array or a tree of them. What reads one table in many places should ask once:
        the gradient is as large as the table, and is then made once and not added up.

    The gradient is summed in float32 whatever the type of the rows: in bfloat16 the sum over the
    thousands of times that a popular item occurs in a batch would stop growing after some 256.
    """
    rows_vd = table_vd.astype(dtype)
    return jax.tree.map(lambda index: jnp.take(rows_vd, index, axis=0, mode="clip"), indices)


def _lookup_forward(table_vd, indices, dtype):
    return lookup(table_vd, indices, dtype), (indices, table_vd.shape)


def _lookup_backward(dtype, kept, rows):
    indices, shape = kept

    def here(indices, rows):
        gradient = jnp.zeros(shape, jnp.float32)
        for index, row in zip(jax.tree.leaves(indices), jax.tree.leaves(rows), strict=True):
            row = row.reshape(-1, shape[1]).astype(jnp.float32)
            gradient = gradient.at[index.reshape(-1)].add(row, mode="promise_in_bounds")
        return jax.lax.psum(gradient, USER_AXES) if sharded() else gradient

    # Device by device, for the rows of a batch are many more than those of a table: left to
    # itself, XLA sends them around to where the table's columns are updated.
    return per_device(here, (BATCH, BATCH), P())(indices, rows), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def resolve_attention(implementation: str, dtype) -> str:
    """ "auto" as "cudnn" for 16-bit types on a GPU, and as "xla" elsewhere."""
    if implementation != "auto":
        return implementation
    half = dtype in (jnp.bfloat16, jnp.float16)
    return "cudnn" if half and jax.default_backend() == "gpu" else "xla"


def attention(
    q_bshk,
    k_bthk,
    v_bthk,
    *,
    key_length_b=None,
    causal=False,
    implementation="xla",
    zero_empty=True,
):
    """Scaled dot-product attention in which only the first `key_length_b` keys exist.

    Args:
      q_bshk, k_bthk, v_bthk: `[B, S|T, H, K]`, any float type; softmax is in float32.
      key_length_b: int32 `[B]`, or None when every key is valid.
      causal: position s sees keys 0..s.
      implementation: "xla"; "cudnn" (16-bit types on a GPU); "auto" picks between them.
      zero_empty: False spares a pass over the result where nobody reads that of empty users.

    Returns:
      `[B, S, H, K]`; for users without a single key zeros, or anything finite if not `zero_empty`.
    """
    queries = q_bshk.shape[1]
    if implementation == "auto" and k_bthk.shape[1] % 2:
        implementation = "xla"  # cuDNN's backward pass refuses odd lengths
    implementation = resolve_attention(implementation, q_bshk.dtype)
    query_length_b = empty_b = None
    if key_length_b is not None:
        empty_b = key_length_b == 0 if zero_empty else None
        key_length_b = jnp.maximum(key_length_b, 1)
    if implementation == "cudnn":
        q_bshk = jnp.pad(q_bshk, ((0, 0), (0, queries % 2), (0, 0), (0, 0)))
        if key_length_b is not None:
            # cuDNN masks by lengths only if it is told both.
            query_length_b = jnp.full_like(key_length_b, q_bshk.shape[1])
    y_bshk = jax.nn.dot_product_attention(
        q_bshk,
        k_bthk,
        v_bthk,
        is_causal=causal,
        query_seq_lengths=query_length_b,
        key_value_seq_lengths=key_length_b,
        implementation=implementation,
    )
    y_bshk = y_bshk[:, :queries]
    if empty_b is None:
        return y_bshk
    return jnp.where(empty_b[:, None, None, None], 0, y_bshk)


class Projections(nn.Module):
    """Query, key, value and output maps of one attention layer."""

    d_model: int
    num_heads: int
    dtype: Dtype

    def setup(self):
        heads = (self.num_heads, self.d_model // self.num_heads)
        axes = ("embed", "heads", "kv")
        self.q = dense(heads, axes=axes, dtype=self.dtype, name="q")
        self.k = dense(heads, axes=axes, dtype=self.dtype, name="k")
        self.v = dense(heads, axes=axes, dtype=self.dtype, name="v")
        self.o = dense(
            self.d_model,
            axis=(-2, -1),
            axes=("heads", "kv", "embed"),
            dtype=self.dtype,
            name="o",
        )


class FeedForward(nn.Module):
    """Dense feed-forward layer: two matrices around one of ACTIVATIONS. `[..., D] -> [..., D]`."""

    hidden: int
    dtype: Dtype
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x):
        d_model = x.shape[-1]
        h = dense(self.hidden, axes=("embed", "ff"), dtype=self.dtype, name="w_in")(x)
        h = ACTIVATIONS[self.activation](h)
        return dense(d_model, axes=("ff", "embed"), dtype=self.dtype, name="w_out")(h)
