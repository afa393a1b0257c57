"""K-means on meshes against NumPy and scikit-learn; its start against exact probabilities."""

import itertools
import re
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.cluster import KMeans

from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer import kmeans
from onerec_jax.tokenizer import nearest as nearest_module
from onerec_jax.tokenizer.kmeans import (
    Clock,
    lloyd,
    mini_batch_lloyd,
    plus_plus,
    reseed,
    start_centres,
)
from onerec_jax.tokenizer.nearest import (
    Points,
    add_up,
    assign,
    cluster_sums,
    default_chunk,
    nearest_block,
)

D, K = 5, 8


def cloud(n=203, d=D, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def distances(x, centres):
    """Squared distances `[N, K]`, in float64, written out."""
    return ((np.asarray(x, np.float64)[:, None] - np.asarray(centres, np.float64)) ** 2).sum(-1)


def sums_of(x, index, k):
    """Sums and sizes of clusters in float64, point by point."""
    total, count = np.zeros((k, x.shape[1])), np.zeros(k)
    for row, cluster in zip(x, index, strict=True):
        if cluster < k:
            total[cluster] += row
            count[cluster] += 1
    return total, count


@pytest.fixture(params=["cpu", "gpu"])
def nearest(request, monkeypatch):
    """`nearest_block` as either kind of backend compiles it."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return jax.jit(lambda *args: nearest_block(*args))  # a new function: it is traced anew


# ------------------------------------------------------------------------------------- distances


def test_nearest_against_numpy(nearest):
    x, centres = cloud(), cloud(K, seed=1)
    index, distance, margin = nearest(x, centres)
    chex.assert_type([index, distance], [jnp.int32, jnp.float32])
    chex.assert_shape([index, distance], (203,))
    assert margin is None
    expected = distances(x, centres)
    np.testing.assert_array_equal(index, expected.argmin(1))
    np.testing.assert_allclose(distance, expected.min(1), rtol=1e-4, atol=1e-5)


def test_prices_and_margins_against_a_full_sort(nearest):
    x, centres = cloud(), cloud(K, seed=1)
    price = np.random.default_rng(2).normal(0, 2, K).astype(np.float32)
    index, distance, margin = nearest(x, centres, jnp.asarray(price))
    plain = distances(x, centres)
    order = np.argsort(plain + price, axis=1)
    ranked = np.sort(plain + price, axis=1)
    np.testing.assert_array_equal(index, order[:, 0])
    assert (order[:, 0] != plain.argmin(1)).mean() > 0.2  # prices do decide
    chosen = np.take_along_axis(plain, order[:, :1], axis=1)[:, 0]
    np.testing.assert_allclose(distance, chosen, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(margin, ranked[:, 1] - ranked[:, 0], rtol=1e-4, atol=1e-5)


def test_the_first_of_equals(nearest):
    x, centres = jnp.array([[1.0], [2.0], [5.0]]), jnp.array([[9.0], [1.0], [1.0], [9.0]])
    index, distance, _ = nearest(x, centres)
    np.testing.assert_array_equal(index, [1, 1, 0])
    np.testing.assert_array_equal(distance, [0, 1, 16])
    # Prices make the dear near centre as good as the cheap far one.
    index, distance, margin = nearest(x[:1], jnp.array([[3.0], [1.0]]), jnp.array([0.0, 4]))
    np.testing.assert_array_equal([index, distance, margin], [[0], [4], [0]])


def test_an_infinite_price_closes_a_centre(nearest):
    x, centres = cloud(), cloud(K, seed=1)
    price = jnp.full(K, jnp.inf).at[jnp.array([2, 5])].set(0)
    index, distance, margin = nearest(x, centres, price)
    two = distances(x, centres[[2, 5]])
    np.testing.assert_array_equal(index, np.where(two[:, 0] <= two[:, 1], 2, 5))
    np.testing.assert_allclose(distance, two.min(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(margin, np.abs(two[:, 0] - two[:, 1]), rtol=1e-4, atol=1e-5)
    _, distance, margin = nearest(x, centres, jnp.full(K, jnp.inf).at[2].set(0))
    np.testing.assert_allclose(distance, distances(x, centres)[:, 2], rtol=1e-4, atol=1e-5)
    assert np.isposinf(margin).all()


def test_chunks_are_powers_of_two_within_the_memory(monkeypatch):
    for backend, held in nearest_module.CHUNK_BYTES.items():
        monkeypatch.setattr(jax, "default_backend", lambda name=backend: name)
        for k in (1, 100, 8192, 1 << 26):
            chunk = default_chunk(k)
            assert 256 <= chunk <= 1 << 17
            assert chunk & (chunk - 1) == 0
            if 256 < chunk < 1 << 17:
                assert held < 4 * k * 2 * chunk <= 2 * held


# ------------------------------------------------------------------------------------------ sums


sum_up = jax.jit(add_up, static_argnames="integers")


@pytest.mark.parametrize("scale", [1, 1e-30, 1e30])
@pytest.mark.parametrize("integers", [False, True])
def test_sums_against_float64(integers, scale):
    rng = np.random.default_rng(0)
    x = (rng.uniform(0.5, 1, (64, 3)) * np.array([1, -1, 0.3]) * scale).astype(np.float32)
    to, before = rng.integers(0, 6, 64).astype(np.int32), np.full((5, 3), scale, np.float32)
    expected, _ = sums_of(x, to, 5)  # cluster 5 is out of range
    assert (to == 5).any()
    zero = np.zeros_like(before)
    np.testing.assert_allclose(sum_up(zero, x, to, integers=integers), expected, rtol=1e-6)
    more = sum_up(before, x, to, integers=integers)
    np.testing.assert_allclose(more, before + expected, rtol=1e-6, atol=1e-6 * scale)


def test_sums_keep_what_small_columns_hold():
    """One column a million times the other: still float32's precision of the largest number."""
    x = (cloud(64, 2) * np.array([1e6, 1])).astype(np.float32)
    total = sum_up(np.zeros((1, 2), np.float32), x, np.zeros(64, np.int32), integers=True)
    np.testing.assert_allclose(total[0], x.sum(0, dtype=np.float64), rtol=1e-6, atol=1e-3)


def test_integer_sums_have_the_same_bits_in_any_order():
    rng = np.random.default_rng(1)
    x, to = cloud(512, 3), rng.integers(0, 5, 512).astype(np.int32)
    zero = np.zeros((5, 3), np.float32)
    first = sum_up(zero, x, to, integers=True)
    floats = {sum_up(zero, x, to, integers=False).tobytes()}
    for _ in range(5):
        order = rng.permutation(512)
        again = sum_up(zero, x[order], to[order], integers=True)
        np.testing.assert_array_equal(again, first)
        floats.add(np.asarray(sum_up(zero, x[order], to[order], integers=False)).tobytes())
    assert len(floats) > 1  # the case is one in which the order matters


@pytest.mark.parametrize("b", [1, 2, 3, 7, 300, 513])
def test_integer_sums_do_not_overflow(b):
    """The worst case: all points alike and in one cluster."""
    to, zero = np.zeros(b, np.int32), np.zeros((2, 1), np.float32)
    for value in np.random.default_rng(b).uniform(-2, 2, 20).astype(np.float32):
        total = sum_up(zero, np.full((b, 1), value), to, integers=True)
        np.testing.assert_allclose(total[:, 0], [b * np.float64(value), 0], rtol=1e-6)


@pytest.mark.parametrize("integers", [False, True])
def test_a_block_of_zeros_adds_nothing(integers):
    total, to = cloud(5, 3), np.arange(64, dtype=np.int32) % 6
    zeros = np.zeros((64, 3), np.float32)
    np.testing.assert_array_equal(sum_up(total, zeros, to, integers=integers), total)


# ---------------------------------------------------------------------------------------- passes


def check_assignment(out, x, centres):
    """An `Assignment` with sums against NumPy; padding left out."""
    expected = distances(x, centres)
    n, k = expected.shape
    np.testing.assert_array_equal(out.index_n[:n], expected.argmin(1))
    np.testing.assert_allclose(out.distance_n[:n], expected.min(1), rtol=1e-4, atol=1e-5)
    total, count = sums_of(x, expected.argmin(1), k)
    np.testing.assert_allclose(out.sums_kd[:, :-2], total, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(out.sums_kd[:, -2], count)
    inertia = np.zeros(k)
    inertia[0] = expected.min(1).sum()
    np.testing.assert_allclose(out.sums_kd[:, -1], inertia, rtol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "n", "chunk"),
    [
        ((1, 1), 37, 8),  # 8 does not divide 37
        ((1, 1), 37, 64),
        ((2, 1), 37, 19),  # one row of padding
        ((4, 2), 37, 3),  # the last device has two points and three rows of padding
        ((8, 1), 5, 2),  # three devices have none
    ],
)
def test_assignment_and_sums_against_numpy(mesh, n, chunk):
    x, centres = cloud(n) + 0.5, cloud(K, seed=1)  # padding, at 0, would shift the sums
    points = Points.place(x, make_mesh(*mesh))
    out = assign(points, centres, chunk=chunk, sums=True)
    assert len(points.x_nd) == -(-n // points.mesh.size) * points.mesh.size
    check_assignment(out, x, centres)


def test_the_way_of_a_gpu_against_numpy(monkeypatch):
    """With a chunk of its own: what is compiled here is not used elsewhere."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, centres = cloud(37) + 0.5, cloud(K, seed=1)
    points = Points.place(x, make_mesh(2))
    check_assignment(assign(points, centres, chunk=7, sums=True), x, centres)


def test_one_iteration_is_one_reduction_over_the_mesh():
    points, centres = Points.place(cloud(37), make_mesh(4, 2)), cloud(K, seed=1)
    for sums in (True, False):
        options = {"mesh": points.mesh, "chunk": 3, "precision": "highest", "sums": sums}
        program = nearest_module._mesh_pass.lower(
            points.x_nd, points.valid, centres, None, **options
        ).compile()
        text = program.as_text()
        reduced = re.findall(r"(\S+) all-reduce(?:-start)?\(", text)
        assert [kind.split("{")[0] for kind in reduced] == ([f"f32[{K},{D + 2}]"] if sums else [])
        assert not re.search("all-gather|all-to-all|collective-permute|reduce-scatter", text)


def test_sums_of_given_clusters():
    x, index = cloud(37) + 0.5, np.random.default_rng(3).integers(0, K, 37).astype(np.int32)
    points = Points.place(x, make_mesh(8))
    sums = cluster_sums(
        points.x_nd, points.valid, points.padded(index, 0), mesh=points.mesh, chunk=3, k=K
    )
    total, count = sums_of(x, index, K)
    np.testing.assert_allclose(sums[:, :-2], total, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sums[:, -2], count)
    assert not np.asarray(sums[:, -1]).any()


@pytest.mark.parametrize("kind", ["float16", "float32", "jax"])
def test_points_on_a_mesh(kind):
    x = cloud(37).astype(np.float16)
    given = jnp.asarray(x, jnp.float32) if kind == "jax" else x.astype(kind)
    points = Points.place(given, make_mesh(8))
    assert points.x_nd.dtype == jnp.float32
    chex.assert_shape(points.x_nd, (40, D))
    np.testing.assert_array_equal(points.x_nd, np.pad(x, ((0, 3), (0, 0))))
    assert {shard.data.shape for shard in points.x_nd.addressable_shards} == {(5, D)}
    np.testing.assert_array_equal(points.known, np.arange(40) < 37)
    np.testing.assert_array_equal(points.rows([4, 36, 4]), x[[4, 36, 4]])
    index = np.arange(37, dtype=np.int32) % K
    padded = points.padded(index, 6)
    np.testing.assert_array_equal(padded, [*index, 6, 6, 6])
    centres = cloud(K, seed=1)
    points.subtract(centres, padded)
    np.testing.assert_array_equal(points.x_nd[:37], x.astype(np.float32) - centres[index])
    np.testing.assert_array_equal(given, x)  # the caller's are left alone


# ----------------------------------------------------------------------------------------- start


def best_of_group(square, now, stale, trials):
    """Row -> probability that it is the next centre; None: the group gave none.

    Candidates are drawn by the `stale` distances and kept with the share that is left `now`.
    """
    rows = [*range(len(square)), None]
    share = now / stale.sum()
    share = np.append(share, max(1 - share.sum(), 0))
    left = [np.minimum(now, square[row]).sum() for row in rows[:-1]]
    out = dict.fromkeys(rows, 0.0)
    for slots in itertools.product(range(len(rows)), repeat=trials):
        kept = [slot for slot in slots if rows[slot] is not None]
        best = rows[min(kept, key=left.__getitem__)] if kept else None
        out[best] += share[list(slots)].prod()
    return out


def probabilities_of_plus_plus(x, trials, groups):
    """Ordered choice of three rows -> its exact probability, by enumeration."""
    square, out = distances(x, x), np.zeros((len(x),) * 3)
    for first in range(len(x)):
        once = square[first]
        for second in range(len(x)):
            chance = best_of_group(square, once, once, trials)[second]
            twice = np.minimum(once, square[second])
            late = best_of_group(square, twice, once, trials)  # drawn with the second
            fresh = best_of_group(square, twice, twice, trials)  # of the next round
            none = late[None] ** (groups - 1)
            for third in range(len(x)):
                tried = sum(late[None] ** i for i in range(groups - 1)) * late[third]
                out[first, second, third] = chance * (tried + none * fresh[third]) / len(x)
    np.testing.assert_allclose(out.sum(), 1)
    return out


@pytest.mark.parametrize(("trials", "proposals"), [(1, 1), (1, 2), (1, 4), (2, 2), (2, 7)])
def test_plus_plus_has_its_distribution(trials, proposals):
    """Order included: 120 choices, 24,000 draws. Seven proposals are three groups of two."""
    x = np.array([[0, 0], [1, 0], [0, 2], [3, 1], [2, 4], [4, 4]], np.float32)
    exact = probabilities_of_plus_plus(x, trials, proposals // trials)
    if trials == 1:  # plain k-means++, however many are drawn at once
        np.testing.assert_allclose(exact, probabilities_of_plus_plus(x, 1, 1))
    keys = jax.random.split(jax.random.key(proposals), 24_000)
    starts = np.asarray(jax.vmap(lambda key: plus_plus(key, x, 3, trials, proposals))(keys))
    same = (starts[:, :, None] == x).all(-1)
    assert same.any(-1).all()
    found = np.bincount(same.argmax(-1) @ [36, 6, 1], minlength=216)
    expected = exact.reshape(-1) * len(keys)
    assert not found[expected < 1e-9].any()  # nothing twice
    rare = expected < 10
    observed = [*found[~rare], found[rare].sum()]
    expected = [*expected[~rare], expected[rare].sum()]
    assert len(observed) > 40
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


def test_plus_plus_finds_far_groups():
    """Four groups of very different sizes: k-means++ starts in each with near certainty."""
    corners = np.array([[0, 0], [1e3, 0], [0, 1e3], [1e3, 1e3]], np.float32)
    x = np.repeat(corners, [194, 4, 4, 1], axis=0) + cloud(d=2)
    keys = jax.random.split(jax.random.key(0), 50)
    starts = np.asarray(jax.vmap(lambda key: plus_plus(key, x, 4))(keys))
    groups = np.sort(np.round(starts / 1e3) @ [1, 2], axis=1)
    np.testing.assert_array_equal(groups, np.tile(np.arange(4), (50, 1)))


def test_more_centres_than_distinct_points_do_not_hang():
    x = np.repeat(cloud(3), 4, axis=0)
    start = np.asarray(plus_plus(jax.random.key(0), x, 6))
    same = (start[:, None] == x[::4]).all(-1)
    assert same.any(1).all()  # points, not zeros
    assert same.any(0).all()  # each of them before any comes twice


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e25])
def test_numbers_out_of_range_do_not_hang(value):
    x = np.repeat(cloud(3), 4, axis=0)
    x[5] = value
    plus_plus(jax.random.key(0), x, 6).block_until_ready()


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_start_is_of_distinct_points(init):
    """Never of padding, and by seed."""
    x = cloud(37) + 5
    points = Points.place(x, make_mesh(8))
    start = np.asarray(start_centres(jax.random.key(1), points, K, init))
    rows = (start[:, None] == x).all(-1).argmax(1)
    np.testing.assert_array_equal(start, x[rows])
    assert len(set(rows)) == K
    np.testing.assert_array_equal(start, start_centres(jax.random.key(1), points, K, init))
    assert (start != start_centres(jax.random.key(2), points, K, init)).any()


def test_start_looks_at_a_sample(monkeypatch):
    monkeypatch.setattr(kmeans, "START_SAMPLE", 2)
    seen = []
    monkeypatch.setattr(kmeans, "plus_plus", lambda key, x, k: seen.append(np.asarray(x)))
    x = cloud(37)
    for seed in (0, 1):
        start_centres(jax.random.key(seed), Points.place(x), K, "k-means++")
    for sample in seen:
        chex.assert_shape(sample, (2 * K, D))
        assert len(np.unique(sample, axis=0)) == 2 * K
        assert (sample[:, None] == x).all(-1).any(1).all()
    assert (seen[0] != seen[1]).any()


# ----------------------------------------------------------------------------------------- lloyd


def test_lloyd_ends_where_scikit_learn_does():
    x = cloud()
    start = x[:K]
    theirs = KMeans(K, init=start, n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(x)
    fit = lloyd(Points.place(x), start, iterations=100)
    np.testing.assert_allclose(fit.centres_kd, theirs.cluster_centers_, rtol=1e-3, atol=1e-3)
    inertia = distances(x, fit.centres_kd).min(1).sum()
    np.testing.assert_allclose(inertia, theirs.inertia_, rtol=1e-4)
    np.testing.assert_allclose(fit.inertia[0], distances(x, start).min(1).sum(), rtol=1e-5)
    np.testing.assert_allclose(fit.inertia[-1], inertia, rtol=1e-5)
    assert (np.diff(fit.inertia) <= 1e-3).all()
    assert fit.reseeded == 0
    # It stopped by itself: one more iteration changes nothing, and one less was not the end.
    rounds = len(fit.inertia)
    assert rounds < 100
    again = lloyd(Points.place(x), fit.centres_kd, iterations=1)
    np.testing.assert_array_equal(again.centres_kd, fit.centres_kd)
    before = lloyd(Points.place(x), start, iterations=rounds - 2)
    assert len(before.inertia) == rounds - 2
    assert (np.asarray(before.centres_kd) != fit.centres_kd).any()
    tiny = np.float32(2**-14)  # what counts as settled does not depend on the unit
    small = lloyd(Points.place(x * tiny), start * tiny, iterations=100)
    np.testing.assert_array_equal(small.centres_kd, fit.centres_kd * tiny)


def test_eight_devices_do_what_one_does():
    x, start = cloud(), cloud()[:K]  # 203 = 8 * 25 + 3
    one, eight = Points.place(x), Points.place(x, make_mesh(8))
    codes = [np.asarray(assign(points, start).index_n)[:203] for points in (one, eight)]
    np.testing.assert_array_equal(*codes)
    ends = [lloyd(points, start, iterations=8) for points in (one, eight)]
    np.testing.assert_allclose(ends[0].inertia, ends[1].inertia, rtol=1e-3)
    np.testing.assert_allclose(ends[0].centres_kd, ends[1].centres_kd, rtol=1e-3, atol=1e-3)


def test_one_iteration_by_hand():
    x = np.array([[0.0], [2.0], [10.0], [14.0]])
    fit = lloyd(Points.place(x), jnp.array([[1.0], [9.0]]), iterations=1)
    np.testing.assert_array_equal(fit.centres_kd, [[1], [12]])
    assert fit.inertia == [1 + 1 + 1 + 25]


@pytest.mark.parametrize("devices", [1, 8])
def test_empty_clusters_move_to_the_worst_served_points(devices):
    x = np.array([[100.0], [101.0], [103.0], [130.0]])
    far = jnp.array([[101.0], [600.0], [900.0]])
    # Nobody is nearest to the last two: they take the points at distances 29^2 and 2^2. Padding,
    # at distance 101^2, is no candidate.
    points = Points.place(x, make_mesh(devices))
    fit = lloyd(points, far, iterations=1)
    np.testing.assert_array_equal(fit.centres_kd, [[108.5], [130], [103]])
    assert fit.reseeded == 2
    settled = lloyd(points, far, iterations=10)
    assert len(settled.inertia) < 10
    np.testing.assert_array_equal(np.sort(settled.centres_kd, axis=0), [[100.5], [103], [130]])


def test_more_empty_clusters_than_points():
    centres = reseed(
        Points.place(np.array([[1.0], [2.0]])),
        jnp.zeros((5, 1)),
        jnp.array([1.0, 4.0]),
        np.array([1, 2, 4]),
    )
    np.testing.assert_array_equal(centres, [[0], [2], [1], [0], [2]])


def test_progress_every_five_seconds(monkeypatch):
    now = iter(range(0, 1000, 2))  # two seconds a look
    monkeypatch.setattr(kmeans, "time", types.SimpleNamespace(perf_counter=lambda: next(now)))
    lines = []
    x = np.array([[0.0], [2.0], [10.0], [14.0]])
    lloyd(Points.place(x), jnp.array([[1.0], [500.0]]), iterations=9, say=lines.append)
    # Settled in the fourth round, at 8 s.
    assert lines == ["  iteration 3/9, inertia 9 a point, 12 s left"]
    lines.clear()
    clock = Clock(lines.append, every=4)
    for done in range(1, 6):
        clock.tick(done, 5, "w")
    assert lines == ["  iteration 2/5, w, 6 s left", "  iteration 4/5, w, 2 s left"]


# ------------------------------------------------------------------------------------ mini-batch


def test_mini_batches_keep_running_means():
    """A centre is the mean of all points it was ever given, over batches and epochs."""
    x, start = cloud(58), cloud(58)[:K]
    batches = [x[:29], x[29:]]
    fit = mini_batch_lloyd(
        lambda rng: map(Points.place, batches), start, epochs=3, rng=np.random.default_rng(0)
    )
    centres, given = start.astype(np.float64), [[] for _ in start]
    inertia = []
    for _ in range(3):
        total = 0
        for batch in batches:
            square = distances(batch, centres)
            total += square.min(1).sum()
            for row, code in zip(batch, square.argmin(1), strict=True):
                given[code].append(row)
            centres = np.array([np.mean(rows, 0) if rows else 0 for rows in given])
        inertia.append(total)
    assert all(given)
    np.testing.assert_allclose(fit.centres_kd, centres, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(fit.inertia, inertia, rtol=1e-4)


def test_mini_batches_come_close_to_all_at_once():
    """On groups, from the same start: a point of each."""
    rng, groups = np.random.default_rng(0), 2 * cloud(K, seed=1)
    x = groups[np.arange(203) % K] + cloud()
    start = x[:K]

    def batches(rng):
        return (Points.place(x[rows]) for rows in rng.permutation(203).reshape(7, 29))

    fit = mini_batch_lloyd(batches, start, epochs=10, rng=rng)
    small, full = (
        distances(x, centres).min(1).sum()
        for centres in (fit.centres_kd, lloyd(Points.place(x), start, iterations=30).centres_kd)
    )
    assert small < 1.02 * full


def test_mini_batches_reseed_what_an_epoch_left_empty():
    x = np.array([[0.0], [1.0], [3.0], [30.0]])

    def fit(epochs):
        far = jnp.array([[1.0], [500.0], [900.0]])
        rng = np.random.default_rng(0)
        return mini_batch_lloyd(lambda rng: [Points.place(x)], far, epochs=epochs, rng=rng)

    first, second = fit(1), fit(2)
    assert first.reseeded == 0  # nothing to be gained at the end
    np.testing.assert_array_equal(first.centres_kd, [[8.5], [500], [900]])
    # New centres at 30 and 3; the latter then gets 0, 1 and 3.
    assert second.reseeded == 2
    np.testing.assert_allclose(second.centres_kd[1:], [[30], [4 / 3]])
    np.testing.assert_allclose(second.inertia, [1 + 0 + 4 + 841, 9 + 4 + 0 + 0])


def test_a_reseeded_centre_forgets():
    """A point in the first epoch, none in the second, then a mean of new points only."""
    epochs = iter([[[0.0], [100.0]], [[0.0], [2.0]], [[0.0], [3.0]]])
    fit = mini_batch_lloyd(
        lambda rng: [Points.place(np.array(next(epochs)))],
        jnp.array([[1.0], [99.0]]),
        epochs=3,
        rng=np.random.default_rng(0),
    )
    assert fit.reseeded == 1
    np.testing.assert_allclose(fit.centres_kd, [[0.5], [3]])
