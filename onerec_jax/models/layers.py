"""Layers shared by encoder and decoder: norm, attention by lengths, feed-forward.

Array names end in their axes: B users, S query positions, T key positions, D model width, H heads,
K head width, F hidden width. Parameters are float32 and carry logical axis names, which
`onerec_jax.sharding` maps to mesh axes; activations have the `dtype` that a module is given.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = Any


def partitioned(init, *axes):
    """An initialiser whose parameter carries logical axis names."""
    return nn.with_logical_partitioning(init, axes)


def dense(features, *, axes, dtype, name, use_bias=False, axis=-1):
    """Linear map with logical axis names, one for each kernel dimension."""
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=partitioned(nn.initializers.lecun_normal(), *axes),
        bias_init=partitioned(nn.initializers.zeros, *axes[-1:]),
        name=name,
    )


def rms_norm(*, dtype, name):
    """RMSNorm with its statistics in float32."""
    return nn.RMSNorm(dtype=dtype, scale_init=partitioned(nn.initializers.ones, None), name=name)


def embedding(size, width, *, axes=("vocabulary", "embed")):
    """Initialiser and shape of an embedding table, for `Module.param`."""
    return partitioned(nn.initializers.normal(width**-0.5), *axes), (size, width)


def attention(q_bshk, k_bthk, v_bthk, *, key_length_b=None, causal=False, implementation="xla"):
    """Scaled dot-product attention in which only the first `key_length_b` keys exist.

    Args:
      q_bshk, k_bthk, v_bthk: `[B, S|T, H, K]`, any float type; softmax is in float32.
      key_length_b: int32 `[B]`, or None when every key is valid.
      causal: position s sees keys 0..s.
      implementation: "xla"; "cudnn" (16-bit types on a GPU); "auto" picks between them.

    Returns:
      `[B, S, H, K]`; zeros for users without a single key.
    """
    if implementation == "auto":
        half = q_bshk.dtype in (jnp.bfloat16, jnp.float16)
        # cuDNN's backward pass refuses odd lengths.
        even = q_bshk.shape[1] % 2 == 0 and k_bthk.shape[1] % 2 == 0
        gpu = jax.default_backend() == "gpu"
        implementation = "cudnn" if gpu and half and even else "xla"
    query_length_b = None
    if key_length_b is not None and implementation == "cudnn":
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
    if key_length_b is None:
        return y_bshk
    return jnp.where((key_length_b > 0)[:, None, None, None], y_bshk, 0)


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
    """Dense feed-forward layer: two matrices and GELU. `[..., D] -> [..., D]`."""

    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        d_model = x.shape[-1]
        h = dense(self.hidden, axes=("embed", "ff"), dtype=self.dtype, name="w_in")(x)
        return dense(d_model, axes=("ff", "embed"), dtype=self.dtype, name="w_out")(nn.gelu(h))
