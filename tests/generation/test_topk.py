"""Exact top-k against a stable sort, on rows made to break it."""

import functools

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.generation.topk import CHUNK, top_k, top_k_of_rows, unpack

fast = functools.partial(helpers.quick_jit, static_argnames="k")


def by_sorting(x, k):
    order = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(x, order, axis=-1), order


def rows(n, seed=0):
    """Rows of every nastiness, float32 `[rows, n]`."""
    rng = np.random.default_rng(seed)
    smooth = rng.standard_normal(n)
    few_finite = np.where(rng.random(n) < 3 / n, smooth, -np.inf)
    one_chunk = np.where(np.arange(n) // CHUNK == n // CHUNK // 2, 9 + smooth, smooth)
    return np.float32(
        [
            smooth,
            np.arange(n),  # best last
            -np.arange(n),
            np.zeros(n),  # nothing but ties
            rng.integers(0, 3, n),  # ties in every chunk
            np.sort(rng.integers(0, 3, n)),  # whole chunks of ties
            rng.choice([-1.0, -0.0, 0.0], n),  # two zeros that are one
            np.full(n, -np.inf),
            few_finite,  # fewer than k values to find
            one_chunk,
            np.where(np.arange(n) % CHUNK, -np.inf, 1.0),  # every chunk has the same maximum
            rng.choice(np.float32([3e38, -3e38, np.inf, -np.inf, 1e-38]), n),
        ]
    )


# Below the threshold, at it, off a multiple of the chunk, and with two levels of chunks.
@pytest.mark.parametrize(
    ("n", "k"), [(5, 5), (130, 1), (1000, 7), (2 * CHUNK * 7, 7), (20_001, 3), (20_001, 150)]
)
def test_top_k_is_a_stable_sort(n, k):
    x = rows(n)
    value, index = jax.device_get(fast(top_k)(x, k=k))
    expected_value, expected_index = by_sorting(x, k)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_array_equal(value, expected_value)
    chex.assert_type([value, index], [jnp.float32, jnp.int32])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("width", "codes", "k"), [(3, 10, 30), (9, 256, 8), (40, 512, 150)])
def test_top_k_of_rows_is_a_stable_sort_of_the_masked_sums(width, codes, k, masked):
    rng = np.random.default_rng(codes)
    x = np.stack([row.reshape(width, codes) for row in rows(width * codes, seed=1)])
    x = x[np.isfinite(x).all((1, 2))]
    offset = np.float32(rng.integers(-2, 2, x.shape[:2]))  # so that sums of different rows tie
    offset[:, 1] = -np.inf  # a dead beam
    words, legal = None, np.ones(x.shape, bool)
    if masked:
        words = rng.integers(0, 2**32, (*x.shape[:2], -(-codes // 32)), np.uint32)
        words[0, 0] = 0
        legal = np.asarray(unpack(jnp.asarray(words), codes))
    sums = np.where(legal, offset[..., None] + x, np.float32(-np.inf)).reshape(len(x), -1)
    value, index = jax.device_get(fast(top_k_of_rows)(x, offset, k=k, legal_bwj=words))
    expected_value, expected_index = by_sorting(sums, k)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_array_equal(value, expected_value)


def test_unpack_is_numpy_unpackbits():
    words = np.random.default_rng(0).integers(0, 2**32, (3, 4), np.uint32)
    expected = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")[:, :100]
    np.testing.assert_array_equal(unpack(jnp.asarray(words), 100), expected)


@pytest.mark.parametrize("n", [100, 20_001])
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_is_refused(n, sign):
    x = rows(n)[:2]
    x[1, n // 2] = np.copysign(np.nan, sign)
    with pytest.raises(InputError, match="NaN"):
        top_k(x, 3)
    value, _ = fast(top_k)(x, k=3)
    assert np.isnan(value[1]).all()
    np.testing.assert_array_equal(value[0], by_sorting(x[:1], 3)[0][0])  # others are left alone


@pytest.mark.parametrize("width", [2, 40])
def test_nan_among_logits_shows_even_where_nothing_is_legal(width):
    x, words = np.zeros((1, width, 512), np.float32), np.zeros((1, width, 16), np.uint32)
    offset = np.full((1, width), np.nan, np.float32)
    value, _ = fast(top_k_of_rows)(x, offset, k=10, legal_bwj=words)
    assert np.isnan(value).all()
