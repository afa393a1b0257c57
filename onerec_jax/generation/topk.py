"""Exact top-k of long rows at about the price of reading them.

`jax.lax.top_k` sorts the whole row once k passes 16 on a GPU: 27 ms for the best 512 of 512 beams x
8192 codes of 16 users. But the k best values lie in the k chunks with the largest maxima, whatever
the values: were one outside, each of those k chunks would hold a better one. So a row is read once
for the maxima of its chunks, the best k chunks are found (by the same trick, if they are many), and
only their members are sorted: 0.3 ms.

Order, everywhere: larger values first, equal values by the lower index, as a stable sort and
`jax.lax.top_k` give it. It survives the chunks because they are contiguous: among chunks of equal
maxima the lower comes first, and the chosen ones are put back into the order of the row before
their members are sorted. -inf is a value like any other; 0 and -0 are equal. NaN has no place in an
order: it is refused where it can be seen, and where it cannot, under `jit`, all values of its row
come back as NaN.

Masks are packed, 32 codes a word, lowest bit first: the mask of 8192 codes is read as 1 kB.

Axes: B rows (users), W beams, V codes, J words of a mask, C chunks, k results.
"""

import jax
import jax.numpy as jnp

from onerec_jax.errors import InputError

CHUNK = 64
"""Values a chunk; a multiple of 32. Larger: fewer maxima to sort, more members."""
WORTHWHILE = 2
"""A row is cut into chunks if it is so many times longer than the members that are sorted then."""


def unpack(words, size: int):
    """Packed masks to bool: uint32 `[..., J] -> [..., size]`, size at most 32 J."""
    bits = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :size].astype(bool)


def top_k(x, k: int):
    """The k largest values of the last axis and their indices, in the order that the module states.

    Args:
      x: float `[..., N]`, N at least k.

    Returns:
      Values `[..., k]` in the type of `x` and indices int32 `[..., k]`.

    Raises:
      InputError: NaN in an array that is at hand, not traced.
    """
    if not isinstance(x, jax.core.Tracer) and jnp.isnan(x).any():
        raise InputError("top_k: NaN among the values: whatever computed them has diverged")
    value, index = _top_k(x.reshape(-1, x.shape[-1]), k)
    return value.reshape(*x.shape[:-1], k), index.reshape(*x.shape[:-1], k)


def top_k_of_rows(x_bwv, offset_bw, k: int, legal_bwj=None):
    """`top_k` of `offset + x` over rows and columns at once; neither sums nor mask are written out.

    Args:
      x_bwv: float32 `[B, W, V]`: logits.
      offset_bw: float32 `[B, W]`, added to every value of a row: a beam's score less the row's
        `logsumexp`. It must be NaN if one of the row is, as a logsumexp is.
      k: at most W * V.
      legal_bwj: uint32 `[B, W, J]`, packed mask of each row, J = ceil(V / 32); others are -inf.

    Returns:
      Values float32 `[B, k]` and indices int32 `[B, k]`, row * V + column.
    """
    users, width, codes = x_bwv.shape
    if codes % CHUNK or width * codes < WORTHWHILE * k * CHUNK:
        sum_bwv = offset_bw[..., None] + _masked(x_bwv, legal_bwj)
        return _top_k(sum_bwv.reshape(users, -1), k)

    def pick(x, chunk_bk):
        return jnp.take_along_axis(x, chunk_bk.reshape(*chunk_bk.shape, *(1,) * (x.ndim - 2)), 1)

    in_row = codes // CHUNK
    x_bcv = x_bwv.reshape(users, width * in_row, CHUNK)
    offset_bc = jnp.repeat(offset_bw, in_row, axis=1)
    words_bcj = None if legal_bwj is None else legal_bwj.reshape(users, -1, CHUNK // 32)
    # One reduction over what was read. The sum of a maximum is the maximum of the sums: rounding
    # keeps the order.
    maxima_bc = _one_zero(offset_bc + _masked(x_bcv, words_bcj).max(-1))

    def members(chunk_bk):
        words = None if words_bcj is None else pick(words_bcj, chunk_bk)
        x_bkv = _masked(pick(x_bcv, chunk_bk), words)
        return _one_zero(pick(offset_bc, chunk_bk)[..., None] + x_bkv)

    return _by_chunks(maxima_bc, members, k)


def _masked(x, words):
    return x if words is None else jnp.where(unpack(words, x.shape[-1]), x, -jnp.inf)


def _one_zero(x):
    """-0 as 0, for some sorts tell them apart and others do not."""
    return jnp.where(x == 0, 0, x)


def _top_k(x_bn, k):
    rows, n = x_bn.shape
    x_bn = _one_zero(x_bn)
    if n < WORTHWHILE * k * CHUNK:
        value, index = jax.lax.top_k(x_bn, k)
        return jnp.where(jnp.isnan(x_bn).any(-1, keepdims=True), jnp.nan, value), index
    # Behind the row, so that what fills the last chunk loses every tie.
    x_bn = jnp.pad(x_bn, ((0, 0), (0, -n % CHUNK)), constant_values=-jnp.inf)
    x_bcv = x_bn.reshape(rows, -1, CHUNK)
    # NaN must win, which is not so in every backend's own maximum.
    maxima_bc = jnp.where(jnp.isnan(x_bcv).any(-1), jnp.nan, x_bcv.max(-1))
    return _by_chunks(
        maxima_bc, lambda chunk: jnp.take_along_axis(x_bcv, chunk[..., None], axis=1), k
    )


def _by_chunks(maxima_bc, members, k):
    """Top-k of rows of which the chunks' maxima are known.

    Args:
      members: gives the values `[B, k, CHUNK]` of chunks int32 `[B, k]`.
    """
    rows, chunks = maxima_bc.shape
    _, chunk_bk = _top_k(maxima_bc, min(k, chunks))
    chunk_bk = jnp.sort(chunk_bk, axis=1)
    value, place = jax.lax.top_k(members(chunk_bk).reshape(rows, -1), k)
    index = jnp.take_along_axis(chunk_bk, place // CHUNK, axis=1) * CHUNK + place % CHUNK
    broken = jnp.isnan(maxima_bc).any(-1, keepdims=True)
    return jnp.where(broken, jnp.nan, value), index
