"""Residual k-means level by level against NumPy; its options, memory and real vectors."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer import rq_kmeans
from onerec_jax.tokenizer.kmeans import lloyd, start_centres
from onerec_jax.tokenizer.nearest import Points
from onerec_jax.tokenizer.rq_kmeans import (
    KMeansConfig,
    decode,
    device_bytes,
    encode,
    fit_rq_kmeans,
    refuse_too_large,
    too_large,
)

N, D, K = 203, 5, 8


def cloud(n=N, d=D, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def residual_chain(x, codebooks):
    """Nearest codes `[N, L]` and what every level leaves over, in float64."""
    residual, codes, left = x.astype(np.float64), [], []
    for centres in codebooks.astype(np.float64):
        codes.append(((residual[:, None] - centres) ** 2).sum(-1).argmin(1))
        residual = residual - centres[codes[-1]]
        left.append(residual)
    return np.stack(codes, 1), left


@functools.cache
def fitted(assignment="plain", seed=1):
    cfg = KMeansConfig(iterations=30, assignment=assignment)
    return fit_rq_kmeans(cloud(), levels=3, codebook_size=K, cfg=cfg, seed=seed)


def test_levels_code_what_the_levels_before_left_over():
    fit, x = fitted(), cloud()
    chex.assert_shape(fit.codebooks, (3, K, D))
    assert (fit.codebooks.dtype, fit.codes.dtype) == (np.float32, np.int32)
    codes, left = residual_chain(x, fit.codebooks)
    np.testing.assert_array_equal(fit.codes, codes)
    np.testing.assert_array_equal(encode(x, fit.codebooks), codes)
    np.testing.assert_allclose(decode(codes, fit.codebooks), x - left[-1], atol=1e-5)
    before = x.astype(np.float64)
    for level in range(3):
        # Converged: every centre is the mean of the residuals it serves.
        means = [before[codes[:, level] == code].mean(0) for code in range(K)]
        np.testing.assert_allclose(fit.codebooks[level], means, atol=1e-4)
        before = left[level]
        log = fit.levels[level]
        assert set(log) == {"inertia", "reseeded", "seconds"}
        np.testing.assert_allclose(log["inertia"][-1], (before**2).sum(), rtol=1e-4)
        assert log["inertia"][-1] < log["inertia"][0]


@pytest.mark.parametrize("assignment", ["balanced", "sweep"])
def test_balanced_levels(assignment):
    """Stored codes are the balanced ones, and the next level gets what they left over."""
    fit, residual = fitted(assignment), cloud().astype(np.float64)
    for level in range(3):
        code = fit.codes[:, level]
        np.testing.assert_array_equal(np.sort(np.bincount(code)), [25] * 5 + [26] * 3)
        means = np.array([residual[code == c].mean(0) for c in range(K)])
        np.testing.assert_allclose(fit.codebooks[level], means, atol=1e-4)
        residual = residual - means[code]
        np.testing.assert_allclose(fit.levels[level]["inertia"][-1], (residual**2).sum(), rtol=1e-4)
        assert set(fit.levels[level]) == {"inertia", "moved", "seconds"}
    assert (encode(cloud(), fit.codebooks) != fit.codes).any()  # new items get the nearest


@pytest.mark.parametrize("assignment", ["plain", "balanced", "sweep"])
def test_same_seed_same_ids(assignment):
    again = fitted.__wrapped__(assignment)
    np.testing.assert_array_equal(again.codes, fitted(assignment).codes)
    np.testing.assert_array_equal(again.codebooks, fitted(assignment).codebooks)
    assert (fitted(assignment, seed=2).codes != again.codes).any()


def test_eight_devices():
    """Five rows of padding, which no level may count."""
    x = cloud() + 3  # far from the padding
    cfg = KMeansConfig(iterations=30, init="random")
    options = {"levels": 2, "codebook_size": K, "cfg": cfg}
    one, eight = (fit_rq_kmeans(x, **options, mesh=make_mesh(n)) for n in (1, 8))
    chex.assert_equal_shape([one.codes, eight.codes])
    for level in range(2):
        totals = [fit.levels[level]["inertia"][-1] for fit in (one, eight)]
        np.testing.assert_allclose(*totals, rtol=1e-3)
    np.testing.assert_array_equal(eight.codes, residual_chain(x, eight.codebooks)[0])


def test_a_code_does_not_depend_on_the_other_points(monkeypatch):
    """Nor on the blocks that they are coded in."""
    x, fit = cloud(), fitted()
    np.testing.assert_array_equal(encode(x[7:12], fit.codebooks), fit.codes[7:12])
    monkeypatch.setattr(rq_kmeans, "BLOCK_BYTES", 4 * D * 40)  # blocks of 40, the last one of 3
    for given in (x, jnp.asarray(x)):
        np.testing.assert_array_equal(encode(given, fit.codebooks), fit.codes)


def test_decoding_by_hand():
    codebooks = np.array([[[1, 2], [3, 4]], [[10, 20], [30, 40]]], np.float32)
    expected = [[31, 42], [13, 24]]
    np.testing.assert_array_equal(decode(np.array([[0, 1], [1, 0]]), codebooks), expected)


def test_the_best_restart_stays():
    x = cloud(seed=5)
    cfg = KMeansConfig(iterations=4, restarts=4)
    fit = fit_rq_kmeans(x, levels=1, codebook_size=K, cfg=cfg, seed=3)
    key, points, totals = jax.random.fold_in(jax.random.key(3), 0), Points.place(x), []
    for restart in range(4):
        start = start_centres(jax.random.fold_in(key, restart), points, K, "k-means++")
        centres = np.asarray(lloyd(points, start, iterations=4).centres_kd)
        totals.append(((x[:, None] - centres) ** 2).sum(-1).min(1).sum())
        if totals[-1] == min(totals):
            best = centres
    assert np.argmin(totals) > 0  # not the one that a single start would have given
    np.testing.assert_array_equal(fit.codebooks[0], best)
    np.testing.assert_allclose(fit.levels[0]["inertia"][-1], min(totals), rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_the_callers_points_are_left_alone(kind, devices):
    x, mesh = kind(cloud()), make_mesh(devices)
    cfg = KMeansConfig(iterations=2)
    fit = fit_rq_kmeans(x, levels=2, codebook_size=K, cfg=cfg, mesh=mesh)
    encode(x, fit.codebooks, mesh=mesh)
    np.testing.assert_array_equal(x, cloud())


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_consumed_points_give_the_same_codes(kind):
    cfg = KMeansConfig(iterations=2)
    options = {"levels": 2, "codebook_size": K, "cfg": cfg}
    x = kind(cloud())
    fit, expected = fit_rq_kmeans(x, **options, consume=True), fit_rq_kmeans(cloud(), **options)
    np.testing.assert_array_equal(fit.codes, expected.codes)
    np.testing.assert_array_equal(fit.codebooks, expected.codebooks)
    # Whoever looks again sees the old values or an error, never residuals.
    if isinstance(x, np.ndarray) or not x.is_deleted():
        np.testing.assert_array_equal(x, cloud())


def test_more_centres_than_distinct_points_do_not_crash():
    x = np.resize(cloud(3), (N, D))
    fit = fit_rq_kmeans(x, levels=2, codebook_size=K, cfg=KMeansConfig(iterations=3))
    assert np.isfinite(fit.codebooks).all()
    np.testing.assert_allclose(decode(fit.codes, fit.codebooks), x, atol=1e-5)


def test_random_start():
    """One iteration from the drawn points themselves."""
    cfg = KMeansConfig(iterations=1, init="random")
    fit = fit_rq_kmeans(cloud(), levels=1, codebook_size=K, cfg=cfg, seed=4)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(4), 0), 0)
    start = np.asarray(start_centres(key, Points.place(cloud()), K, "random"))
    codes = residual_chain(cloud(), start[None])[0][:, 0]
    means = [cloud()[codes == code].mean(0) for code in range(K)]
    np.testing.assert_allclose(fit.codebooks[0], means, rtol=1e-4, atol=1e-5)


def test_progress_names_the_level():
    lines = []
    cfg = KMeansConfig(iterations=1)
    fit_rq_kmeans(cloud(), levels=2, codebook_size=K, cfg=cfg, say=lines.append)
    assert lines == [f"level {level} of 2: 8 centres, 203 points" for level in (1, 2)]


# ------------------------------------------------------------------------------------ mini-batch


class Counted:
    """An array that notes how many rows are asked for."""

    def __init__(self, x):
        self.x, self.shape, self.dtype, self.asked = x, x.shape, x.dtype, []

    def __getitem__(self, rows):
        part = self.x[rows]
        self.asked.append(len(part))
        return part

    def __array__(self, *args, **kwargs):
        raise AssertionError("all rows were asked for")


def test_mini_batches_from_a_file(tmp_path, monkeypatch):
    """Never all of it in memory, and hardly worse than with all of it."""
    monkeypatch.setattr(rq_kmeans, "BLOCK_BYTES", 4 * D * 32)
    monkeypatch.setattr(rq_kmeans, "RUN", 8)
    x = cloud().astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    given = Counted(np.load(tmp_path / "x.npy", mmap_mode="r"))
    cfg = KMeansConfig(iterations=8, mini_batch=32)
    fit = fit_rq_kmeans(given, levels=2, codebook_size=K, cfg=cfg, seed=2)
    assert max(given.asked) == 32
    assert given.asked.count(32) >= 2 * 8 * 6  # 6 whole batches in each of 8 epochs, 2 levels
    codes, left = residual_chain(x, fit.codebooks)
    np.testing.assert_array_equal(fit.codes, codes)
    np.testing.assert_array_equal(encode(x, fit.codebooks), codes)
    full = fit_rq_kmeans(x, levels=2, codebook_size=K)
    for level in range(2):
        total = (left[level] ** 2).sum()
        assert total < 1.1 * full.levels[level]["inertia"][-1]
        assert len(fit.levels[level]["inertia"]) == 8
    np.testing.assert_array_equal(
        fit_rq_kmeans(x, levels=2, codebook_size=K, cfg=cfg, seed=2).codes, codes
    )


def test_mini_batches_hold_every_row_once(monkeypatch):
    """But for the rows that do not fill a batch, others each epoch."""
    seen = []

    def record(blocks, start, *, epochs, rng, **options):
        seen.extend(np.concatenate([p.x_nd[:, 0] for p in blocks(rng)]) for _ in range(epochs))
        return types.SimpleNamespace(centres_kd=start, inertia=[], reseeded=0)

    monkeypatch.setattr(rq_kmeans, "mini_batch_lloyd", record)
    monkeypatch.setattr(rq_kmeans, "RUN", 4)
    x = np.arange(30, dtype=np.float32)[:, None]
    cfg = KMeansConfig(iterations=3, mini_batch=8, init="random")
    fit_rq_kmeans(x, levels=1, codebook_size=2, cfg=cfg)
    assert len({epoch.tobytes() for epoch in seen}) == 3
    for epoch in seen:
        chex.assert_shape(epoch, (24,))
        assert len(set(epoch.tolist()) & set(range(30))) == 24
        for batch in epoch.reshape(3, 8):
            assert (np.diff(batch) > 0).all()  # in the order of the file


def test_mini_batches_smaller_than_the_codebook():
    cfg = KMeansConfig(iterations=1, mini_batch=8, init="random")
    fit = fit_rq_kmeans(cloud(40), levels=1, codebook_size=12, cfg=cfg)
    chex.assert_shape(fit.codebooks, (1, 12, D))
    assert len(np.unique(fit.codebooks[0], axis=0)) == 12


def test_a_mini_batch_of_everything_is_no_mini_batch():
    cfg = KMeansConfig(iterations=30, mini_batch=N)
    fit = fit_rq_kmeans(cloud(), levels=3, codebook_size=K, cfg=cfg, seed=1)
    np.testing.assert_array_equal(fit.codebooks, fitted().codebooks)


# ---------------------------------------------------------------------------- settings and memory


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"iterations": 0}, "--tokenizer.kmeans.iterations 0 must be at least 1"),
        ({"restarts": 0}, "--tokenizer.kmeans.restarts 0 must be at least 1"),
        ({"slack": -0.1}, "--tokenizer.kmeans.slack -0.1 must be at least 0"),
        ({"slack": float("nan")}, "--tokenizer.kmeans.slack nan must be"),
        ({"mini_batch": -1}, "--tokenizer.kmeans.mini-batch -1 must be at least 0"),
        ({"chunk": -1}, "--tokenizer.kmeans.chunk -1 must be at least 0"),
        ({"assignment": "balanced", "mini_batch": 9}, "--tokenizer.kmeans.mini-batch works with"),
        ({"assignment": "sweep", "restarts": 2}, "--tokenizer.kmeans.restarts works with"),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(InputError) as error:
        KMeansConfig(**changes)
    assert str(error.value).startswith(words)


def test_precision_of_the_fit(monkeypatch):
    assert KMeansConfig().fit_precision == "highest"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert KMeansConfig().fit_precision == "default"
    assert KMeansConfig(precision="high").fit_precision == "high"


def test_memory_grows_with_chunks_and_points_but_not_with_their_product():
    cfg = KMeansConfig(chunk=1000)

    def need(n=10_000_000, d=64, k=8192, cfg=cfg, **options):
        return device_bytes((n, d), k, cfg, **options)

    # What a further point costs is the same with any number of centres.
    more = [need(20_000_000, k=k) - need(k=k) for k in (256, 8192)]
    assert more[0] == more[1]
    assert 10_000_000 * 64 * 4 <= more[0] <= 2 * 10_000_000 * 64 * 4
    assert need() < 10_000_000 * 8192  # far from all distances
    large = KMeansConfig(chunk=1_000_000)
    grown = need(cfg=large) - need()
    assert grown > 999_000 * 8192 * 4 * 0.9
    assert need(cfg=large, devices=8) < need(cfg=large)
    batch = KMeansConfig(mini_batch=100_000, chunk=1000)
    assert need(cfg=batch) == need(1_000_000, cfg=batch) < 0.5 * need()


def mesh_of(device, count):
    return types.SimpleNamespace(devices=np.array([device] * count, object))


def test_a_fit_too_large_names_the_flags():
    shape, k, cfg = (10_000_000, 1024), 8192, KMeansConfig(chunk=4096)
    for stats in (None, {}):  # a backend that does not tell
        device = types.SimpleNamespace(memory_stats=lambda stats=stats: stats)
        refuse_too_large(shape, k, cfg, mesh_of(device, 1))
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 16_000_000_000})
    with pytest.raises(InputError) as error:
        refuse_too_large(shape, k, cfg, mesh_of(device, 1))
    need = device_bytes(shape, k, cfg) / 1e9
    assert 41 < need < 90  # points alone are 41 GB
    words = (
        f"k-means of 10,000,000 x 1024 points with 8,192 centres needs about {need:.1f} GB a "
        "device, which has 16.0 GB: lower --tokenizer.kmeans.chunk (now 4,096), use more devices "
        "or set --tokenizer.kmeans.mini-batch"
    )
    assert str(error.value) == words
    assert words == too_large(shape, k, cfg, mesh_of(device, 1), "has 16.0 GB")
    refuse_too_large(shape, k, cfg, mesh_of(device, 8))
    smaller = KMeansConfig(chunk=4096, mini_batch=1 << 16)
    refuse_too_large(shape, k, smaller, mesh_of(device, 1))


def test_the_fit_asks_for_the_memory(monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000})
    with pytest.raises(InputError, match="lower --tokenizer.kmeans.chunk"):
        fit_rq_kmeans(cloud(), levels=1, codebook_size=K, mesh=mesh_of(device, 1))


# ------------------------------------------------------------------------------------- real data


def test_beauty(real_data):
    """Text vectors of 12,101 articles, 3 x 256 codes."""
    x = np.load(real_data / "amazon-beauty" / "Beauty.minilm-l6-v2.f16.npy")
    cfg = KMeansConfig(iterations=3)
    fit = fit_rq_kmeans(x, levels=3, codebook_size=256, cfg=cfg, seed=1)
    error = ((decode(fit.codes, fit.codebooks) - x.astype(np.float32)) ** 2).mean()
    assert 0.00062 < error < 0.00069
    cfg = KMeansConfig(iterations=1, assignment="balanced")
    fit = fit_rq_kmeans(x, levels=1, codebook_size=256, cfg=cfg, seed=1)
    assert set(np.bincount(fit.codes[:, 0], minlength=256)) == {47, 48}
