"""Residual k-means against NumPy and scikit-learn."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from onerec_jax.tokenizer.rq_kmeans import (
    encode,
    fit_rq_kmeans,
    lloyd,
    nearest,
    plus_plus,
    spread_last_level,
)


def points(n=200, d=5, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def distances(x, centres):
    """Squared distances `[N, K]`, in float64, written out."""
    return ((np.asarray(x, np.float64)[:, None] - np.asarray(centres)[None]) ** 2).sum(-1)


def test_nearest_against_numpy():
    x, centres = points(), points(7, seed=1)
    index, distance = jax.jit(nearest)(x, centres)
    chex.assert_type([index, distance], [jnp.int32, jnp.float32])
    expected = distances(x, centres)
    np.testing.assert_array_equal(index, expected.argmin(1))
    np.testing.assert_allclose(distance, expected.min(1), rtol=1e-4, atol=1e-5)


def test_nearest_takes_the_first_of_equal_centres():
    centres = np.array([[9.0], [1.0], [1.0]], np.float32)
    index, distance = nearest(jnp.array([[1.0], [2.0]]), centres)
    np.testing.assert_array_equal(index, [1, 1])
    np.testing.assert_allclose(distance, [0, 1], atol=1e-6)


def test_lloyd_ends_where_scikit_learn_does():
    x = points(300)
    start = x[:8]
    theirs = KMeans(8, init=start, n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(x)
    ours = np.asarray(lloyd(x, jnp.asarray(start), iterations=100))
    np.testing.assert_allclose(ours, theirs.cluster_centers_, rtol=1e-3, atol=1e-3)
    inertia = distances(x, ours).min(1).sum()
    np.testing.assert_allclose(inertia, theirs.inertia_, rtol=1e-4)


def test_one_iteration_by_hand():
    x = jnp.array([[0.0], [2.0], [10.0], [14.0]])
    centres = lloyd(x, jnp.array([[1.0], [9.0]]), iterations=1)
    np.testing.assert_allclose(centres, [[1.0], [12.0]])


def test_an_empty_cluster_moves_to_the_worst_served_point():
    x = jnp.array([[0.0], [1.0], [2.0], [30.0]])
    far = jnp.array([[1.0], [500.0], [900.0]])
    # Nobody is nearest to the last two: they take the two points with the largest distance.
    centres = np.asarray(lloyd(x, far, iterations=1))
    np.testing.assert_allclose(centres[0], [8.25])
    assert centres[1:, 0].tolist() == [30.0, 0.0]  # distances 29^2, then 1 for 0 and 2: the first
    settled = np.sort(np.asarray(lloyd(x, far, iterations=10))[:, 0])
    assert len(np.unique(np.asarray(nearest(x, jnp.asarray(settled)[:, None])[0]))) == 3


def test_plus_plus_starts_on_distinct_points_and_spreads():
    # Four far groups: k-means++ finds each with near certainty, a uniform draw would not.
    groups = np.repeat(np.array([[0, 0], [1e3, 0], [0, 1e3], [1e3, 1e3]], np.float32), 50, axis=0)
    x = groups + points(200, 2)
    for seed in range(3):
        start = np.asarray(plus_plus(jax.random.key(seed), jnp.asarray(x), 4))
        assert all((row == x).all(1).any() for row in start)
        assert len(np.unique(np.round(start / 1e3), axis=0)) == 4


def test_more_centres_than_distinct_points_do_not_crash():
    x = np.repeat(points(3), 4, axis=0)
    codebooks = fit_rq_kmeans(x, levels=2, codebook_size=6, iterations=5)
    assert np.isfinite(codebooks).all()
    _, reconstruction = encode(x, codebooks)
    np.testing.assert_allclose(reconstruction, x, atol=1e-5)


def test_levels_code_what_the_levels_before_left_over():
    x = points(150)
    codebooks = fit_rq_kmeans(x, levels=3, codebook_size=6, iterations=30, seed=1)
    chex.assert_shape(codebooks, (3, 6, 5))
    codes, reconstruction = encode(x, codebooks)
    assert codes.dtype == np.int32
    residual, errors = x.astype(np.float64), []
    for level in range(3):
        nearest_codes = distances(residual, codebooks[level]).argmin(1)
        np.testing.assert_array_equal(codes[:, level], nearest_codes)
        # Converged: every centre is the mean of the residuals it serves.
        for code in np.unique(nearest_codes):
            mean = residual[nearest_codes == code].mean(0)
            np.testing.assert_allclose(codebooks[level][code], mean, atol=1e-3)
        residual = residual - codebooks[level][nearest_codes]
        errors.append((residual**2).mean())
    np.testing.assert_allclose(reconstruction, x - residual, atol=1e-5)
    assert errors[2] < errors[1] < errors[0] < (x**2).mean()


def test_same_seed_same_codebooks():
    x = points()
    options = {"levels": 2, "codebook_size": 6, "iterations": 5}
    first = fit_rq_kmeans(x, **options, seed=3)
    np.testing.assert_array_equal(first, fit_rq_kmeans(x, **options, seed=3))
    assert (first != fit_rq_kmeans(x, **options, seed=4)).any()


def test_a_code_does_not_depend_on_the_other_points():
    x = points()
    codebooks = fit_rq_kmeans(x, levels=2, codebook_size=6, iterations=5)
    codes, _ = encode(x, codebooks)
    np.testing.assert_array_equal(codes[7:12], encode(x[7:12], codebooks)[0])


def spread_by_loops(x, codes, codebooks, priority):
    """One item after the other, by priority: the nearest code that is free in its prefix."""
    out, groups = codes.copy(), {}
    for row, code in enumerate(codes):
        groups.setdefault(tuple(code[:-1]), []).append(row)
    for prefix, rows in groups.items():
        if len({codes[row, -1] for row in rows}) == len(rows):
            continue
        taken = set()
        for row in sorted(rows, key=lambda row: (priority[row], row)):
            residual = x[row].astype(np.float64)
            for level, code in enumerate(prefix):
                residual = residual - codebooks[level][code]
            order = np.argsort(((residual - codebooks[-1]) ** 2).sum(-1))
            free = [code for code in order if code not in taken]
            if free:
                out[row, -1] = free[0]
                taken.add(free[0])
    return out


@pytest.mark.parametrize("size", [3, 8])
def test_spreading_against_loops(size):
    """Size 8 has room for all in most prefixes, size 3 has not."""
    x, rng = points(60), np.random.default_rng(5)
    codebooks = fit_rq_kmeans(x, levels=3, codebook_size=size, iterations=5)
    codes, _ = encode(x, codebooks)
    priority = rng.integers(0, 4, 60)  # with ties
    before = codes.copy()
    spread = spread_last_level(x, codes, codebooks, priority)
    np.testing.assert_array_equal(codes, before)  # the argument is left alone
    np.testing.assert_array_equal(spread[:, :-1], codes[:, :-1])
    np.testing.assert_array_equal(spread, spread_by_loops(x, codes, codebooks, priority))
    assert len(np.unique(spread, axis=0)) > len(np.unique(codes, axis=0))
    for prefix in np.unique(codes[:, :-1], axis=0):
        last = spread[(codes[:, :-1] == prefix).all(1), -1]
        assert len(np.unique(last)) == min(len(last), size)  # unique wherever that is possible


def test_the_highest_priority_keeps_the_nearest_code():
    x = np.array([[0.0], [0.1], [0.2], [0.3]], np.float32)
    codebooks = np.array([[[0.0]], [[0.0]]], np.float32)
    codebooks = np.concatenate([codebooks, np.full((2, 3, 1), 0)], axis=1)
    codebooks[1, :, 0] = [0.0, 1.0, 5.0, 3.0]
    codes = np.zeros((4, 2), np.int32)
    spread = spread_last_level(x, codes, codebooks.astype(np.float32), np.array([2, 0, 1, 3]))
    np.testing.assert_array_equal(spread[:, 1], [3, 0, 1, 2])


def test_one_level_spreads_too():
    x = np.array([[0.0], [0.1], [5.0]], np.float32)
    codebooks = np.array([[[0.0], [1.0], [5.0]]], np.float32)
    codes, _ = encode(x, codebooks)
    spread = spread_last_level(x, codes, codebooks, np.arange(3))
    np.testing.assert_array_equal(spread, [[0], [1], [2]])
