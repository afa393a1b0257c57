"""Training of an RQ-VAE: the autoencoder alone, its codebooks started, then all of it.

Axes: N items, B a batch, D width of the vectors, Z width of the latents, L levels, K codes.
"""

import functools
import time
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from onerec_jax.errors import InputError
from onerec_jax.tokenizer.rq_vae import (
    RQVAE,
    RQVAEConfig,
    networks,
    quantise,
    quantiser_losses,
    straight_through,
)

SAY_EVERY = 5.0
"""Seconds between two lines of progress."""


def reseed(key, codebooks_lkz, usage_lk, residuals_lbz) -> jax.Array:
    """Codes without usage move to residuals of their level, drawn from the batch: `[L, K, Z]`."""
    levels, size, _ = codebooks_lkz.shape
    draw_lk = jax.random.randint(key, (levels, size), 0, residuals_lbz.shape[1])
    seeds_lkz = jax.vmap(lambda residual_bz, draw_k: residual_bz[draw_k])(residuals_lbz, draw_lk)
    return jnp.where((usage_lk == 0)[..., None], seeds_lkz, codebooks_lkz)


@struct.dataclass
class TrainState:
    """All that training carries from step to step."""

    params: dict  # encoder, decoder
    codebooks: jax.Array  # float32 [L, K, Z]
    opt_state: optax.OptState  # of both; of params alone where codes are moving averages
    count: jax.Array  # float32 [L, K], moving average of the items a code serves in a batch
    total: jax.Array  # float32 [L, K, Z], and of the sum of their residuals
    usage: jax.Array  # int32 [L, K], items served since the last re-seeding
    step: jax.Array  # int32


def make_optimizer(cfg: RQVAEConfig, steps: int) -> optax.GradientTransformation:
    rise = max(1, steps // 50)
    schedule = optax.warmup_cosine_decay_schedule(0.0, cfg.learning_rate, rise, max(steps, 2))
    if cfg.optimizer == "adagrad":
        return optax.adagrad(schedule)
    matrices = functools.partial(jax.tree.map, lambda leaf: leaf.ndim == 2)  # no codes, no biases
    return optax.adamw(schedule, weight_decay=cfg.weight_decay, mask=matrices)


@functools.partial(jax.jit, static_argnames=("width", "levels", "codebook_size", "cfg", "steps"))
def start_state(key, *, width, levels, codebook_size, cfg: RQVAEConfig, steps: int) -> TrainState:
    """Drawn networks, and codebooks of zeros until `with_quantiser`."""
    encoder_key, decoder_key = jax.random.split(key)
    encoder, decoder = networks(cfg, width)
    params = {
        "encoder": encoder.init(encoder_key, jnp.zeros((1, width)))["params"],
        "decoder": decoder.init(decoder_key, jnp.zeros((1, cfg.latent)))["params"],
    }
    return TrainState(
        params=params,
        codebooks=jnp.zeros((levels, codebook_size, cfg.latent)),
        opt_state=make_optimizer(cfg, steps).init(params),
        count=jnp.zeros((levels, codebook_size)),
        total=jnp.zeros((levels, codebook_size, cfg.latent)),
        usage=jnp.zeros((levels, codebook_size), jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("cfg", "n", "steps"))
def with_quantiser(state: TrainState, codebooks_lkz, *, n: int, cfg: RQVAEConfig, steps: int):
    """The state with started codebooks and a new optimizer."""
    trained = state.params if cfg.codebook == "ema" else (state.params, codebooks_lkz)
    count = jnp.full_like(state.count, min(cfg.batch_size, n) / codebooks_lkz.shape[1])
    return state.replace(
        codebooks=codebooks_lkz,
        opt_state=make_optimizer(cfg, steps).init(trained),
        count=count,
        total=codebooks_lkz * count[..., None],
    )


def batches(key, n: int, batch_size: int) -> jax.Array:
    """Shuffled item rows, int32 `[steps, B]`; what fills no batch waits for another epoch."""
    batch_size = min(batch_size, n)
    steps = n // batch_size
    return jax.random.permutation(key, n)[: steps * batch_size].reshape(steps, batch_size)


@functools.partial(jax.jit, static_argnames=("cfg", "steps"), donate_argnames="state")
def warmup_epoch(state: TrainState, key, x_nd, *, cfg: RQVAEConfig, steps: int):
    """One epoch of the autoencoder alone: the next state and the mean loss."""
    encoder, decoder = networks(cfg, x_nd.shape[1])
    optimizer = make_optimizer(cfg, steps)

    def loss_fn(params, x_bd):
        z_bz = encoder.apply({"params": params["encoder"]}, x_bd)
        return ((decoder.apply({"params": params["decoder"]}, z_bz) - x_bd) ** 2).mean()

    def step(carry, row_b):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, x_nd[row_b])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    rows_sb = batches(key, len(x_nd), cfg.batch_size)
    (params, opt_state), losses = jax.lax.scan(step, (state.params, state.opt_state), rows_sb)
    return state.replace(params=params, opt_state=opt_state), losses.mean()


@functools.partial(jax.jit, static_argnames=("cfg", "steps"), donate_argnames="state")
def train_epoch(state: TrainState, key, x_nd, *, cfg: RQVAEConfig, steps: int):
    """One epoch: the next state and metrics (loss, reconstruction, codes in use a level)."""
    encoder, decoder = networks(cfg, x_nd.shape[1])
    optimizer = make_optimizer(cfg, steps)
    batch_key, reseed_key = jax.random.split(key)
    size = state.codebooks.shape[1]

    def loss_fn(trained, x_bd):
        params, codebooks_lkz = trained
        z_bz = encoder.apply({"params": params["encoder"]}, x_bd)
        codes_bl, quantised_bz, residuals_lbz = quantise(z_bz, codebooks_lkz)
        y_bd = decoder.apply({"params": params["decoder"]}, straight_through(z_bz, quantised_bz))
        reconstruction = ((y_bd - x_bd) ** 2).mean()
        codebook, commitment = quantiser_losses(codes_bl, residuals_lbz, codebooks_lkz)
        loss = reconstruction + cfg.quantiser_weight * (codebook + cfg.commitment * commitment)
        return loss, (reconstruction, codes_bl, residuals_lbz)

    def step(carry, row_b):
        state, used_lk = carry
        (loss, aux), (grads, codebook_grads) = jax.value_and_grad(loss_fn, has_aux=True)(
            (state.params, state.codebooks), x_nd[row_b]
        )
        reconstruction, codes_bl, residuals_lbz = aux
        one_hot_lbk = jax.nn.one_hot(codes_bl.T, size)
        served_lk = one_hot_lbk.sum(1)
        count, total = state.count, state.total
        if cfg.codebook == "ema":
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            sum_lkz = jnp.einsum("lbk,lbz->lkz", one_hot_lbk, residuals_lbz, precision="highest")
            count = cfg.ema_decay * count + (1 - cfg.ema_decay) * served_lk
            total = cfg.ema_decay * total + (1 - cfg.ema_decay) * sum_lkz
            alive_lk1 = (count > 1e-6)[..., None]  # long unused codes stay where they are
            codebooks = jnp.where(alive_lk1, total / count[..., None], state.codebooks)
        else:
            trained, all_grads = (state.params, state.codebooks), (grads, codebook_grads)
            updates, opt_state = optimizer.update(all_grads, state.opt_state, trained)
            params, codebooks = optax.apply_updates(trained, updates)
        usage = state.usage + served_lk.astype(jnp.int32)
        if cfg.reseed_every:
            due = (state.step + 1) % cfg.reseed_every == 0
            dead = (usage == 0) & due
            step_key = jax.random.fold_in(reseed_key, state.step)
            codebooks = reseed(step_key, codebooks, jnp.where(due, usage, 1), residuals_lbz)
            # A re-seeded average weighs as much as a code of mean popularity.
            count = jnp.where(dead, len(row_b) / size, count)
            total = jnp.where(dead[..., None], codebooks * count[..., None], total)
            usage = jnp.where(due, 0, usage)
        state = TrainState(params, codebooks, opt_state, count, total, usage, state.step + 1)
        return (state, used_lk | (served_lk > 0)), (loss, reconstruction)

    rows_sb = batches(batch_key, len(x_nd), cfg.batch_size)
    carry = (state, jnp.zeros_like(state.usage, bool))
    (state, used_lk), (losses, reconstructions) = jax.lax.scan(step, carry, rows_sb)
    return state, (losses.mean(), reconstructions.mean(), used_lk.sum(-1))


def start_codebooks(z_nz, *, levels, codebook_size, iterations, seed) -> np.ndarray:
    """Residual k-means of latents, float32 `[L, K, Z]`."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    residual_nz, codebooks = np.asarray(z_nz, np.float32), []
    # One thread: several add up in whichever order they end.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than codes
        for level in range(levels):
            fit = KMeans(codebook_size, n_init=1, max_iter=iterations, random_state=seed + level)
            label_n = fit.fit(residual_nz).labels_
            codebooks.append(fit.cluster_centers_)
            residual_nz = residual_nz - fit.cluster_centers_[label_n]
    return np.stack(codebooks).astype(np.float32)


@functools.partial(jax.jit, static_argnames="cfg")
def apply_encoder(params, x_nd, *, cfg: RQVAEConfig):
    """Latents `[N, Z]` of centred and scaled vectors."""
    return networks(cfg, x_nd.shape[1])[0].apply({"params": params["encoder"]}, x_nd)


def check(x_nd: np.ndarray, levels: int, codebook_size: int) -> None:
    """Refuses what cannot be fitted (InputError)."""
    if x_nd.ndim != 2:
        raise InputError(f"vectors have shape {x_nd.shape}: give one row an item")
    if levels < 1 or codebook_size < 1:
        raise InputError(
            f"{levels} levels of {codebook_size} codes cannot be: give at least one of each"
        )
    if codebook_size > len(x_nd):
        raise InputError(f"{codebook_size} codes a level for {len(x_nd)} items: give fewer codes")
    finite_n = np.isfinite(x_nd).all(1)
    if not finite_n.all():
        row = int(np.flatnonzero(~finite_n)[0])
        raise InputError(f"vectors: row {row} is not finite: mend or drop the item")


def fit_rq_vae(
    x_nd,
    *,
    levels: int,
    codebook_size: int,
    cfg: RQVAEConfig,
    seed: int,
    say: Callable[[str], None] = print,
) -> RQVAE:
    """Trains encoder, codebooks and decoder on the vectors.

    The same seed gives the same codes on a CPU.

    Args:
      x_nd: float `[N, D]` with N >= codebook_size.
      say: prints one line of progress, every few seconds.

    Raises:
      InputError: vectors that cannot be fitted; the loss is no longer finite.
    """
    x_nd = np.asarray(x_nd, np.float32)
    check(x_nd, levels, codebook_size)
    shift_d = x_nd.mean(0)
    scale = np.float32(np.sqrt(((x_nd - shift_d) ** 2).mean())) or np.float32(1)
    scaled_nd = jnp.asarray((x_nd - shift_d) / scale)
    n, width = x_nd.shape

    steps_an_epoch = n // min(cfg.batch_size, n)
    warmup_steps, steps = cfg.warmup_epochs * steps_an_epoch, cfg.epochs * steps_an_epoch
    init_key, train_key = jax.random.split(jax.random.key(seed))
    state = start_state(
        init_key,
        width=width,
        levels=levels,
        codebook_size=codebook_size,
        cfg=cfg,
        steps=warmup_steps,
    )
    said = time.monotonic()
    for epoch in range(cfg.warmup_epochs + cfg.epochs):
        key = jax.random.fold_in(train_key, epoch)
        if epoch == cfg.warmup_epochs:
            rows = np.random.default_rng(seed).permutation(n)[
                : max(cfg.kmeans_items, codebook_size)
            ]
            codebooks_lkz = start_codebooks(
                apply_encoder(state.params, scaled_nd[rows], cfg=cfg),
                levels=levels,
                codebook_size=codebook_size,
                iterations=cfg.kmeans_iterations,
                seed=seed,
            )
            state = with_quantiser(state, codebooks_lkz, n=n, cfg=cfg, steps=steps)
        if epoch < cfg.warmup_epochs:
            state, loss = warmup_epoch(state, key, scaled_nd, cfg=cfg, steps=warmup_steps)
            line = f"warm-up epoch {epoch + 1}/{cfg.warmup_epochs}, loss {loss:.4f}"
        else:
            state, metrics = train_epoch(state, key, scaled_nd, cfg=cfg, steps=steps)
            loss, reconstruction, used_l = metrics
            line = (
                f"epoch {epoch + 1 - cfg.warmup_epochs}/{cfg.epochs}, loss {loss:.4f}, "
                f"error a dimension {reconstruction * scale**2:.3g}, "
                f"codes in use {' '.join(str(used) for used in used_l)}"
            )
        if not np.isfinite(loss):
            raise InputError(
                f"the loss of the RQ-VAE is {loss} in epoch {epoch + 1}: "
                f"lower --rq-vae.learning-rate {cfg.learning_rate}"
            )
        last = epoch + 1 == cfg.warmup_epochs + cfg.epochs
        if last or time.monotonic() - said > SAY_EVERY:
            say(f"RQ-VAE {line}")
            said = time.monotonic()
    arrays = {**state.params, "codebooks": state.codebooks, "shift": shift_d, "scale": scale}
    return RQVAE(jax.tree.map(np.asarray, arrays), cfg)
