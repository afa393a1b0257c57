"""Balanced k-means against loops: Algorithm 1 as printed, prices, and the last step's moves."""

import fractions
import functools
import math
import types

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer import balanced
from onerec_jax.tokenizer.balanced import (
    capacities,
    market_kmeans,
    place_excess,
    sweep,
    sweep_kmeans,
)
from onerec_jax.tokenizer.kmeans import lloyd
from onerec_jax.tokenizer.nearest import Assignment, Points

N, D, K = 203, 5, 8  # 203 = 8 * 25 + 3


def cloud(n=N, d=D, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def distances(x, centres):
    """Squared distances `[N, K]`, in float64, written out."""
    return ((np.asarray(x, np.float64)[:, None] - np.asarray(centres, np.float64)) ** 2).sum(-1)


def check_fit(fit, x, k=K):
    """Centres are the means of the assignment and the last inertia is theirs."""
    assert fit.index_n.dtype == np.int32
    means = np.array([x[fit.index_n == code].mean(0, dtype=np.float64) for code in range(k)])
    np.testing.assert_allclose(fit.centres_kd, means, rtol=1e-4, atol=1e-5)
    expected = ((x - means[fit.index_n]) ** 2).sum()
    np.testing.assert_allclose(fit.inertia[-1], expected, rtol=1e-4, atol=1e-5)


def check_sizes(index, n, k):
    """All codes as often as any other: N mod K of them once more."""
    sizes = np.bincount(index, minlength=k)
    chex.assert_shape(sizes, (k,))
    np.testing.assert_array_equal(np.sort(sizes), np.sort(n // k + (np.arange(k) < n % k)))


SIZES = [(1, 1), (7, 1), (6, 6), (12, 4), (13, 4), (15, 4), (29, 7), (40, 13), (64, 8)]


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_capacities(n, k):
    fair = fractions.Fraction(n, k)
    tight = capacities(n, k)
    assert tight.sum() == n
    assert tight.max() - tight.min() <= 1
    for slack in ("0.1", "0.25", "1.5"):
        (limit,) = set(capacities(n, k, float(slack)))
        assert limit == max(math.floor((1 + fractions.Fraction(slack)) * fair), math.ceil(fair))


def test_rounding_adds_no_place():
    np.testing.assert_array_equal(capacities(100, 10, 0.1), [11] * 10)  # 1.1 * 10 > 11 in floats


# ------------------------------------------------------------------------------- V0, Algorithm 1


def algorithm_1(x, centres, order, sweeps):
    """As printed, but for turns in the given order and sizes where K does not divide N."""
    x, centres = x.astype(np.float64), np.array(centres, np.float64)
    n, k = len(x), len(centres)
    for _ in range(sweeps):
        unassigned = list(range(n))
        code = np.empty(n, int)
        for turn, cluster in enumerate(order):
            w = n // k + (1 if turn < n % k else 0)
            unassigned.sort(key=lambda row: ((x[row] - centres[cluster]) ** 2).sum())
            taken, unassigned = unassigned[:w], unassigned[w:]
            code[taken] = cluster
            centres[cluster] = x[taken].mean(0)  # inside the sweep
    return code, centres


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_sweep_against_loops(n, k):
    square = distances(cloud(n), cloud(k, seed=1))
    turns = sweep(square.T, capacities(n, k))
    assert turns.dtype == np.int32
    check_sizes(turns, n, k)
    left = set(range(n))
    for turn in range(k):
        nearest = sorted(left, key=lambda row: square[row, turn])
        own = set(nearest[: capacities(n, k)[turn]])
        assert set(np.flatnonzero(turns == turn)) == own
        left -= own


@pytest.mark.parametrize("devices", [1, 8])
def test_sweeps_against_algorithm_1(devices):
    x, start = cloud(), cloud()[:K]
    points = Points.place(x, make_mesh(devices))
    order = np.random.default_rng(5).permutation(K)
    for sweeps in (1, 2, 5):
        fit = sweep_kmeans(points, start, sweeps=sweeps, seed=5, least_moved=0)
        code, centres = algorithm_1(x, start, order, sweeps)
        np.testing.assert_array_equal(fit.index_n, code)
        np.testing.assert_allclose(fit.centres_kd, centres, rtol=1e-4, atol=1e-5)
        assert len(fit.inertia) == sweeps
        check_fit(fit, x)
        check_sizes(fit.index_n, N, K)
    settled = sweep_kmeans(points, start, seed=5)
    assert 2 < len(settled.inertia) < 50
    once_more = sweep_kmeans(points, settled.centres_kd, seed=5, sweeps=1)
    np.testing.assert_array_equal(once_more.index_n, settled.index_n)  # 1 point in 203 > 0.1%
    hasty = sweep_kmeans(points, start, seed=5, least_moved=0.2)
    assert len(hasty.inertia) < len(settled.inertia)
    assert (sweep_kmeans(points, start, seed=6).index_n != settled.index_n).any()


def test_a_sweep_too_large_names_the_way_out(monkeypatch):
    monkeypatch.setattr(balanced, "SWEEP_CELLS", N * K - 1)
    with pytest.raises(InputError, match=r"203 x 8 .*--tokenizer\.kmeans\.assignment balanced"):
        sweep_kmeans(Points.place(cloud()), cloud()[:K])


# ---------------------------------------------------------------------------------------- prices


def prices_by_loops(price, index, margin, fair):
    """The docstring of `_new_prices`, in float64."""
    new = price.astype(np.float64)
    for k in range(len(price)):
        own = np.sort(margin[index == k])
        over = len(own) - math.ceil(fair)
        if over > 0:
            new[k] += balanced.RAISE * own[over - 1]
        if len(own) < math.floor(fair):
            new[k] -= balanced.LOWER * margin.mean() * (1 - len(own) / math.floor(fair))
    return new - new.mean()


def test_prices_against_loops():
    """Clusters of all kinds, an empty one too; padding, at the end, has no say."""
    rng = np.random.default_rng(0)
    index = np.repeat([0, 1, 2, 4, 5, 6, 7], [26, 25, 90, 10, 27, 24, 1]).astype(np.int32)
    index, margin = rng.permutation(index), rng.random(N).astype(np.float32)
    price = rng.standard_normal(K).astype(np.float32)
    padded = np.concatenate([index, [2] * 5]).astype(np.int32), np.append(margin, [9] * 5)
    out = Assignment(padded[0], None, jnp.asarray(padded[1], jnp.float32), None)
    new = balanced._new_prices(price, out, N, N / K)
    np.testing.assert_allclose(new, prices_by_loops(price, index, margin, N / K), atol=1e-6)


def test_the_price_of_a_single_centre_is_a_number():
    out = Assignment(jnp.zeros(6, jnp.int32), None, jnp.full(6, jnp.inf), None)
    np.testing.assert_array_equal(balanced._new_prices(jnp.zeros(1), out, 6, 6.0), [0])


def place_by_loops(square, index, margin, limits):
    """The docstring of `place_excess`: full centres keep the dear points, others choose again."""
    n, k = square.shape
    order = np.argsort(-np.bincount(index, minlength=k), kind="stable")
    room = dict(zip(order.tolist(), sorted(limits.tolist(), reverse=True), strict=True))
    code, homeless, moved = np.full(n, -1), range(n), None
    wish, cost = dict(enumerate(index)), dict(enumerate(-margin))
    while True:
        for centre in range(k):
            wanting = sorted((row for row in homeless if wish[row] == centre), key=cost.get)
            taken = wanting[: room[centre]]
            code[taken] = centre
            room[centre] -= len(taken)
        homeless = np.flatnonzero(code < 0)
        moved = len(homeless) if moved is None else moved
        if not len(homeless):
            return code, moved
        free = [centre for centre in range(k) if room[centre]]
        wish = {row: free[square[row, free].argmin()] for row in homeless}
        cost = {row: square[row, wish[row]] for row in homeless}


@pytest.fixture
def numpy_nearest(monkeypatch):
    """The choice among centres with room in NumPy: no compilation. Counts the rounds."""
    rounds = []

    def nearest_open(x, centres, closed, rows, chunk):
        rounds.append(len(rows))
        square = distances(x.x_nd[rows], centres) + np.asarray(closed)
        return square.argmin(1), square.min(1)

    monkeypatch.setattr(balanced, "_nearest_open", nearest_open)
    return rounds


@pytest.mark.parametrize("slack", [0, 0.3])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_moves_against_loops(numpy_nearest, n, k, slack):
    x, centres = cloud(n), cloud(k, seed=1)
    square = distances(x, centres)
    skewed = square + 2 * np.arange(k)  # first centres are asked too much of
    index, ranked = skewed.argmin(1), np.sort(skewed, axis=1)
    margin = ranked[:, min(1, k - 1)] - ranked[:, 0]
    points = types.SimpleNamespace(x_nd=x, valid=n)
    out = types.SimpleNamespace(
        index_n=np.append(index, [0, 0]), margin_n=np.append(margin, [9, 9])
    )
    code, moved = place_excess(points, centres, out, slack)
    expected = place_by_loops(square, index, margin, capacities(n, k, slack))
    np.testing.assert_array_equal(code, expected[0])
    assert code.dtype == np.int32
    assert moved == expected[1] == (code != index).sum()
    if slack:
        assert np.bincount(code).max() <= max(1.3 * n / k, math.ceil(n / k))
    else:
        check_sizes(code, n, k)


def test_equal_points_are_placed_too(numpy_nearest):
    """Each round fills a centre, so that there are at most K."""
    x = np.ones((60, D), np.float32)
    out = types.SimpleNamespace(index_n=np.full(60, 3), margin_n=np.zeros(60))
    points = types.SimpleNamespace(x_nd=x, valid=60)
    code, moved = place_excess(points, cloud(7), out, 0)
    check_sizes(code, 60, 7)
    assert moved == 60 - 9
    assert len(numpy_nearest) == 6


def test_the_nearest_centre_with_room():
    x, centres = cloud(), cloud(K, seed=1)
    closed = jnp.array([0, np.inf, 0, np.inf, np.inf, 0, np.inf, np.inf], jnp.float32)
    rows = np.array([200, 3, 77, 4, 9])
    points = Points.place(x, make_mesh(8))
    index, distance = balanced._nearest_open(points, centres, closed, rows, 0)
    square = distances(x[rows], centres[[0, 2, 5]])
    np.testing.assert_array_equal(index, np.array([0, 2, 5])[square.argmin(1)])
    np.testing.assert_allclose(distance, square.min(1), rtol=1e-4)


@functools.cache
def market(devices=1, slack=0.0, iterations=15, seed=0):
    points = Points.place(cloud(seed=seed), make_mesh(devices))
    return market_kmeans(points, cloud(seed=seed)[:K], iterations=iterations, slack=slack)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("iterations", [1, 15])
def test_a_market_is_balanced(devices, iterations):
    fit = market(devices, iterations=iterations)
    check_sizes(fit.index_n, N, K)
    check_fit(fit, cloud())
    assert len(fit.inertia) == iterations + 1


def test_a_market_does_not_depend_on_the_devices():
    np.testing.assert_allclose(market(1).inertia, market(8).inertia, rtol=1e-2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_market_costs_little(seed):
    """Close to plain k-means, and less than Algorithm 1 from the same start."""
    x = cloud(seed=seed)
    points, start = Points.place(x), x[:K]
    plain = distances(x, lloyd(points, start, iterations=15).centres_kd).min(1).sum()
    total = market(seed=seed).inertia[-1]
    assert total < 1.05 * plain
    assert total < 0.9 * sweep_kmeans(points, start).inertia[-1]


def test_slack_bounds_the_largest(monkeypatch):
    """Prices that do not move leave much to the last step."""
    monkeypatch.setattr(balanced, "_new_prices", lambda price, *args: price)
    points = Points.place(cloud())
    fits = [
        market_kmeans(points, cloud()[:K], iterations=1, slack=slack) for slack in (0.0, 0.2, 0.5)
    ]
    largest = [np.bincount(fit.index_n).max() for fit in fits]
    assert largest == [26, 30, 38]  # full at 1, 1.2 and 1.5 times 203 / 8
    assert fits[0].moved > fits[1].moved > fits[2].moved > 0
    assert fits[0].inertia[-1] > fits[1].inertia[-1] > fits[2].inertia[-1]
    check_fit(fits[1], cloud())


def test_as_many_points_as_centres():
    """Five of the eight points are one; each gets a code of its own."""
    x = cloud(8)
    x[:5] = x[0]
    fit = market_kmeans(Points.place(x), x, iterations=2)
    np.testing.assert_array_equal(np.sort(fit.index_n), np.arange(8))
    check_fit(fit, x)
    assert fit.inertia[-1] < 1e-9


def test_an_empty_cluster_keeps_its_centre():
    """With slack there may be one; a centre at zero would attract new items."""
    x, centres = cloud(), cloud(K, seed=1)
    index = np.arange(N, dtype=np.int32) % (K - 1)
    means, _ = balanced._means(Points.place(x), index, centres)
    np.testing.assert_array_equal(means[K - 1], centres[K - 1])
    np.testing.assert_allclose(means[0], x[:: K - 1].mean(0), rtol=1e-4, atol=1e-6)
