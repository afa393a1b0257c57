"""RQ-VAE: its quantiser against loops, its gradients by hand, its training on small sets."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.tokenizer import rq_vae, rq_vae_training
from onerec_jax.tokenizer.rq_vae import (
    RQVAE,
    RQVAEConfig,
    networks,
    quantise,
    quantiser_losses,
    straight_through,
)
from onerec_jax.tokenizer.rq_vae_training import fit_rq_vae, reseed

SMALL = RQVAEConfig(
    hidden=(16,),
    latent=4,
    activation="relu",
    skip=False,
    codebook="gradient",
    quantiser_weight=1.0,
    batch_size=64,
    warmup_epochs=0,
    epochs=4,
    reseed_every=3,
)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def clusters(n=256, d=8, seed=0):
    """Sixteen groups and some noise."""
    rng = np.random.default_rng(seed)
    return (random(16, d)[rng.integers(0, 16, n)] + 0.3 * random(n, d, seed=seed + 1)).astype("f4")


def fit(x, cfg=SMALL, *, levels=2, codebook_size=8, seed=0):
    return fit_rq_vae(
        x, levels=levels, codebook_size=codebook_size, cfg=cfg, seed=seed, say=lambda line: None
    )


def error(x, model):
    return ((x - model.encode(x)[1]) ** 2).mean()


def test_quantiser_and_losses_against_loops():
    z, codebooks = random(20, 4), random(3, 6, 4, seed=1)
    codes, quantised, residuals = jax.jit(quantise)(z, codebooks)
    chex.assert_type([codes, quantised, residuals], [jnp.int32, jnp.float32, jnp.float32])
    chex.assert_shape([codes, quantised, residuals], [(20, 3), (20, 4), (3, 20, 4)])
    loss = 0.0
    for item in range(20):
        residual = z[item].astype(np.float64)
        for level in range(3):
            np.testing.assert_allclose(residuals[level, item], residual, atol=1e-5)
            distances = [((residual - code) ** 2).sum() for code in codebooks[level]]
            code = int(np.argmin(distances))
            assert codes[item, level] == code
            loss += distances[code] / (20 * 4)
            residual = residual - codebooks[level, code]
        np.testing.assert_allclose(quantised[item], z[item] - residual, atol=1e-5)
    codebook, commitment = quantiser_losses(codes, residuals, codebooks)
    np.testing.assert_allclose([codebook, commitment], [loss, loss], rtol=1e-5)


def test_gradients_of_the_losses_by_hand():
    """Codes move to their own residuals, latents to the codes of every level; nothing else."""
    z, codebooks = random(20, 4), random(3, 6, 4, seed=1)

    def loss(kind, z, codebooks):
        codes, _, residuals = quantise(z, codebooks)
        return quantiser_losses(codes, residuals, codebooks)[kind]

    codes, _, residuals = jax.tree.map(np.asarray, quantise(z, codebooks))
    off = np.stack([residuals[i] - codebooks[i][codes[:, i]] for i in range(3)])
    z_grad, code_grad = jax.grad(loss, argnums=(1, 2))(0, z, codebooks)
    assert not np.asarray(z_grad).any()
    expected = np.zeros_like(codebooks)
    for level in range(3):
        np.add.at(expected[level], codes[:, level], -2 * off[level] / z.size)
    np.testing.assert_allclose(code_grad, expected, atol=1e-6)
    z_grad, code_grad = jax.grad(loss, argnums=(1, 2))(1, z, codebooks)
    assert not np.asarray(code_grad).any()
    np.testing.assert_allclose(z_grad, 2 * off.sum(0) / z.size, atol=1e-6)


def test_the_encoder_gets_the_gradient_of_what_the_decoder_saw():
    z, codebooks, x = random(20, 4), random(3, 6, 4, seed=1), random(20, 8, seed=2)
    _, decoder = networks(SMALL, 8)
    params = decoder.init(jax.random.key(0), z)

    def loss(seen):
        return ((decoder.apply(params, seen) - x) ** 2).mean()

    _, quantised, _ = quantise(z, codebooks)
    through = jax.grad(lambda z: loss(straight_through(z, quantise(z, codebooks)[1])))(z)
    np.testing.assert_allclose(through, jax.grad(loss)(quantised), atol=1e-6)
    np.testing.assert_allclose(straight_through(z, quantised), quantised, atol=1e-6)
    plain = jax.grad(lambda c: loss(straight_through(z, quantise(z, c)[1])))(codebooks)
    assert not np.asarray(plain).any()  # codes learn from their own loss only


def test_reseeding_moves_only_what_served_nobody():
    codebooks, residuals = random(2, 5, 4), random(2, 9, 4, seed=1)
    usage = np.array([[3, 0, 1, 0, 2], [1, 1, 0, 1, 1]])
    new = np.asarray(reseed(jax.random.key(0), codebooks, usage, residuals))
    np.testing.assert_array_equal(new[usage > 0], codebooks[usage > 0])
    for level, code in zip(*np.nonzero(usage == 0), strict=True):
        assert (residuals[level] == new[level, code]).all(1).any()


@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_dead_codes_come_back(monkeypatch, codebook):
    x = clusters()

    def far_away(z, *, levels, codebook_size, **_):
        codebooks = np.full((levels, codebook_size, z.shape[1]), 100, np.float32)
        codebooks[:, 0] = 0  # one code a level serves all
        return codebooks

    monkeypatch.setattr(rq_vae_training, "start_codebooks", far_away)
    model = fit(x, dataclasses.replace(SMALL, codebook=codebook))
    codes, _ = model.encode(x)
    assert min(len(np.unique(codes[:, level])) for level in range(2)) >= 6
    if codebook == "gradient":  # without re-seeding they stay dead
        model = fit(x, dataclasses.replace(SMALL, reseed_every=0))
        assert not model.encode(x)[0].any()


def test_training_and_levels_lower_the_error():
    x = clusters()
    cfg = dataclasses.replace(SMALL, learning_rate=3e-3, epochs=30)
    one, three = (error(x, fit(x, cfg, levels=levels)) for levels in (1, 3))
    assert three < one < x.var()
    briefly = dataclasses.replace(cfg, epochs=1)
    assert one < error(x, fit(x, briefly, levels=1))


def test_adagrad_and_a_warm_up():
    x = clusters()
    cfg = dataclasses.replace(SMALL, optimizer="adagrad", learning_rate=0.1, epochs=30)
    warm = dataclasses.replace(cfg, warmup_epochs=5, skip=True, hidden=(16, 8), activation="gelu")
    assert error(x, fit(x, warm)) < 0.7 * x.var()


def test_moving_averages_end_at_the_means_of_what_codes_serve():
    x = clusters()
    cfg = dataclasses.replace(
        SMALL, codebook="ema", ema_decay=0.5, learning_rate=0.0, batch_size=256, epochs=30
    )
    model = fit(x, cfg, levels=1)
    # The encoder stands still: every code is the mean of its latents.
    scaled = (x - model.params["shift"]) / model.params["scale"]
    z = np.asarray(networks(cfg, 8)[0].apply({"params": model.params["encoder"]}, scaled))
    codes, _ = model.encode(x)
    for code in np.unique(codes):
        np.testing.assert_allclose(
            model.codebooks[0, code], z[codes[:, 0] == code].mean(0), atol=1e-3
        )


def test_vectors_of_any_scale_train_alike():
    x = clusters()
    codes, reconstruction = fit(x).encode(x)
    codes_far, reconstruction_far = fit(64 * x).encode(64 * x)  # exact in float32
    assert (codes == codes_far).mean() > 0.99
    np.testing.assert_allclose(reconstruction_far / 64, reconstruction, atol=1e-3)


def test_same_seed_same_codes():
    x = clusters()
    first, again, other = fit(x, seed=3), fit(x, seed=3), fit(x, seed=4)
    chex.assert_trees_all_equal(first.params, again.params)
    assert (first.codebooks != other.codebooks).any()


def test_encoding_in_chunks(monkeypatch):
    x = clusters()
    model = fit(x)
    codes, reconstruction = model.encode(x)
    chex.assert_shape([codes, reconstruction], [(256, 2), (256, 8)])
    assert codes.dtype == np.int32
    assert reconstruction.dtype == np.float32
    chex.assert_shape(model.codebooks, (2, 8, 4))
    monkeypatch.setattr(rq_vae, "CHUNK", 100)  # 2.56 chunks
    parts = model.encode(x)
    np.testing.assert_array_equal(parts[0], codes)
    np.testing.assert_allclose(parts[1], reconstruction, atol=1e-6)
    assert [len(part) for part in model.encode(x[:0])] == [0, 0]


def test_round_trip(tmp_path):
    x = clusters()
    model = fit(x)
    model.save(tmp_path / "model")
    loaded = RQVAE.load(tmp_path / "model")
    assert loaded.config == model.config
    chex.assert_trees_all_equal(loaded.params, model.params)
    np.testing.assert_array_equal(loaded.encode(x)[0], model.encode(x)[0])
    (tmp_path / "model" / "rq_vae.npz").write_bytes(b"half")
    with pytest.raises(InputError, match="holds no RQ-VAE"):
        RQVAE.load(tmp_path / "model")
    with pytest.raises(InputError, match=r"rq_vae\.json"):
        RQVAE.load(tmp_path / "nowhere")


def test_one_line_of_progress_at_least():
    lines = []
    fit_rq_vae(clusters(), levels=2, codebook_size=8, cfg=SMALL, seed=0, say=lines.append)
    assert lines[-1].startswith("RQ-VAE epoch 4/4, loss ")
    assert lines[-1].endswith("codes in use 8 8")


def test_what_cannot_be_fitted_is_refused():
    x = clusters()
    with pytest.raises(InputError, match="300 codes a level for 256 items"):
        fit(x, codebook_size=300)
    with pytest.raises(InputError, match="row 7 is not finite"):
        fit(np.where(np.arange(256)[:, None] == 7, np.nan, x))
    with pytest.raises(InputError, match="0 levels"):
        fit(x, levels=0)
    with pytest.raises(InputError, match="shape"):
        fit(x[0])
    with pytest.raises(InputError, match="no longer finite|loss of the RQ-VAE is"):
        fit(x, dataclasses.replace(SMALL, learning_rate=1e30))
    with pytest.raises(InputError, match="--rq-vae.ema-decay 1.0"):
        RQVAEConfig(ema_decay=1.0)
    with pytest.raises(InputError, match="--rq-vae.epochs 0"):
        RQVAEConfig(epochs=0)
    with pytest.raises(InputError, match="--rq-vae.hidden"):
        RQVAEConfig(hidden=(8, 0))


def test_all_vectors_alike():
    model = fit(np.ones((256, 8), np.float32))
    np.testing.assert_allclose(model.encode(np.ones((2, 8)))[1], 1, atol=1e-2)
