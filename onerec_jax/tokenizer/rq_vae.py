"""RQ-VAE: an autoencoder whose bottleneck is a residual quantiser, trained as one.

The comparison that the OneRec Technical Report (arXiv 2506.13695, Table 11) makes with residual
k-means. TIGER (arXiv 2305.05065), section 3.1, with the straight-through estimator; Lee et al.
(arXiv 2203.01941) for the residual quantiser and codebooks by moving averages.

Where the sources differ or are silent: vectors are centred and divided by one number, so that the
settings fit vectors of any scale; all squared errors are means over the width, so that they fit
any width, which shifts the balance of the losses where latents are narrower than vectors; the
gradient of a level's commitment reaches the encoder past all levels above, as in Lee et al., and
that of a codebook stays in its level.

Axes: N items, B a batch, D width of the vectors, Z width of the latents, L levels, K codes.
"""

import dataclasses
import functools
import json
import pathlib
import time
import warnings
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util

from onerec_jax.errors import InputError, require_at_least
from onerec_jax.files import atomic_folder, read_json

CHUNK = 8192
"""Items that are encoded at once."""
SAY_EVERY = 5.0
"""Seconds between two lines of progress."""

ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu}


@dataclasses.dataclass(frozen=True)
class RQVAEConfig:
    """Architecture, losses and training. Defaults were tuned on sentence vectors, 12,101 x 384."""

    hidden: tuple[int, ...] = (1024,)
    """Hidden widths of the encoder; the decoder has them in reverse. () is one linear map each.
    TIGER's are 512, 256, 128."""
    latent: int = 128
    """Width of the latents and of the codes; TIGER's is 32."""
    activation: Literal["relu", "gelu"] = "gelu"
    """Between the layers."""
    skip: bool = True
    """A linear map beside the layers of encoder and decoder."""
    codebook: Literal["gradient", "ema"] = "ema"
    """gradient: the optimizer moves the codes; ema: each is a moving average of what it serves."""
    ema_decay: float = 0.99
    """A step, for `codebook` ema."""
    commitment: float = 0.25
    """Weight of the pull of latents to their codes (beta; 0.25 in both papers)."""
    quantiser_weight: float = 0.3
    """Weight of codebook and commitment losses beside the reconstruction; TIGER's is 1."""
    optimizer: Literal["adamw", "adagrad"] = "adamw"
    """TIGER's is Adagrad at 0.4."""
    learning_rate: float = 1e-3
    """The highest: it rises over the first 2% of the steps, then falls to 0 as a cosine."""
    weight_decay: float = 0.1
    """Of the layers' matrices; adamw only."""
    batch_size: int = 128
    """Items a step; the whole set if that is smaller."""
    warmup_epochs: int = 10
    """Epochs without the quantiser, before its codebooks start from what the encoder learned."""
    epochs: int = 60
    """Epochs with the quantiser."""
    kmeans_items: int = 65_536
    """Items, drawn at random, whose latents start the codebooks."""
    kmeans_iterations: int = 10
    """Lloyd iterations of that start, a level."""
    reseed_every: int = 100
    """Steps after which codes that served nobody move to latents of the batch; 0 is never."""

    def __post_init__(self):
        counts = {"latent": 1, "batch_size": 1, "epochs": 1, "kmeans_items": 1}
        require_at_least(self, "rq-vae.", **counts, kmeans_iterations=1)
        require_at_least(self, "rq-vae.", warmup_epochs=0, reseed_every=0, weight_decay=0)
        require_at_least(self, "rq-vae.", commitment=0, quantiser_weight=0, learning_rate=0)
        if not all(width >= 1 for width in self.hidden):
            raise InputError(f"--rq-vae.hidden {self.hidden}: widths must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"--rq-vae.ema-decay {self.ema_decay} must be at least 0 and below 1")


class MLP(nn.Module):
    """Layers of the given widths, the last one linear: `[..., D_in] -> [..., widths[-1]]`."""

    widths: tuple[int, ...]
    activation: str
    skip: bool

    @nn.compact
    def __call__(self, x):
        # Full float32: in tf32, a GPU would give other codes than a CPU.
        dense = functools.partial(nn.Dense, precision="highest")
        h = x
        for i, width in enumerate(self.widths[:-1]):
            h = ACTIVATIONS[self.activation](dense(width, name=f"layer_{i}")(h))
        y = dense(self.widths[-1], name="out")(h)
        if self.skip and len(self.widths) > 1:
            y = y + dense(self.widths[-1], use_bias=False, name="skip")(x)
        return y


def networks(cfg: RQVAEConfig, width: int) -> tuple[MLP, MLP]:
    """Encoder `[..., D] -> [..., Z]` and decoder `[..., Z] -> [..., D]` for vectors of `width`."""
    encoder = MLP((*cfg.hidden, cfg.latent), cfg.activation, cfg.skip)
    return encoder, MLP((*cfg.hidden[::-1], width), cfg.activation, cfg.skip)


def quantise(z_bz, codebooks_lkz) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The nearest code to what the levels before left over, level after level.

    Codes count as constants in the residuals: gradients of these reach the latents alone.

    Returns:
      codes int32 `[B, L]`; their sum float32 `[B, Z]`, without a gradient to the latents; the
      residual that each level saw, float32 `[L, B, Z]`.
    """
    residual_bz, codes, residuals = z_bz, [], []
    total_bz = jnp.zeros_like(z_bz)
    for codebook_kz in codebooks_lkz:
        product_bk = jnp.einsum("bz,kz->bk", residual_bz, codebook_kz, precision="highest")
        code_b = jnp.argmin((codebook_kz**2).sum(-1) - 2 * product_bk, axis=1).astype(jnp.int32)
        chosen_bz = codebook_kz[code_b]
        residuals.append(residual_bz)
        codes.append(code_b)
        residual_bz = residual_bz - jax.lax.stop_gradient(chosen_bz)
        total_bz = total_bz + chosen_bz
    return jnp.stack(codes, axis=1), total_bz, jnp.stack(residuals)


def straight_through(z, quantised):
    """The value of `quantised` with the gradient of `z` (Bengio et al., arXiv 1308.3432)."""
    return z + jax.lax.stop_gradient(quantised - z)


def quantiser_losses(codes_bl, residuals_lbz, codebooks_lkz) -> tuple[jax.Array, jax.Array]:
    """Codebook and commitment loss (TIGER, L_rqvae), each a sum over levels of mean squares.

    The first moves codes to residuals, the second, before its weight, residuals to codes.
    """
    chosen_lbz = jax.vmap(lambda codebook_kz, code_b: codebook_kz[code_b])(
        codebooks_lkz, codes_bl.T
    )
    stop = jax.lax.stop_gradient
    codebook = ((stop(residuals_lbz) - chosen_lbz) ** 2).mean((1, 2)).sum()
    commitment = ((residuals_lbz - stop(chosen_lbz)) ** 2).mean((1, 2)).sum()
    return codebook, commitment


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


@functools.partial(jax.jit, static_argnames="cfg")
def _encode(params, x_nd, *, cfg: RQVAEConfig):
    encoder, decoder = networks(cfg, x_nd.shape[1])
    scaled_nd = (x_nd - params["shift"]) / params["scale"]
    z_nz = encoder.apply({"params": params["encoder"]}, scaled_nd)
    codes_nl, quantised_nz, _ = quantise(z_nz, params["codebooks"])
    y_nd = decoder.apply({"params": params["decoder"]}, quantised_nz)
    return codes_nl, y_nd * params["scale"] + params["shift"]


@dataclasses.dataclass(frozen=True)
class RQVAE:
    """A trained RQ-VAE."""

    params: dict
    """encoder and decoder (Flax), codebooks `[L, K, Z]`, shift `[D]` and scale `[]` of the vectors:
    float32."""
    config: RQVAEConfig

    @property
    def codebooks(self) -> np.ndarray:
        """Codes in the space of the latents, float32 `[L, K, Z]`."""
        return np.asarray(self.params["codebooks"])

    def encode(self, x_nd) -> tuple[np.ndarray, np.ndarray]:
        """Codes int32 `[N, L]` and reconstruction float32 `[N, D]` of any vectors `[N, D]`."""
        x_nd = np.asarray(x_nd, np.float32)
        size = min(CHUNK, max(len(x_nd), 1))
        codes = np.zeros((len(x_nd), len(self.codebooks)), np.int32)
        reconstruction = np.zeros_like(x_nd)
        for first in range(0, len(x_nd), size):
            chunk = x_nd[first : first + size]
            rows = slice(first, first + len(chunk))
            chunk = np.pad(chunk, ((0, size - len(chunk)), (0, 0)))  # one shape, one compilation
            code, vector = _encode(self.params, chunk, cfg=self.config)
            codes[rows] = np.asarray(code)[: rows.stop - first]
            reconstruction[rows] = np.asarray(vector)[: rows.stop - first]
        return codes, reconstruction

    def save(self, folder: pathlib.Path) -> None:
        """Writes arrays and settings; the folder appears whole or not at all."""
        with atomic_folder(folder) as tmp:
            arrays = traverse_util.flatten_dict(self.params, sep="/")
            np.savez(tmp / "rq_vae.npz", **{name: np.asarray(a) for name, a in arrays.items()})
            (tmp / "rq_vae.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=1))

    @classmethod
    def load(cls, folder: pathlib.Path) -> "RQVAE":
        """Reads what `save` wrote.

        Raises:
          InputError: the folder is missing, incomplete or from another version.
        """
        folder = pathlib.Path(folder)
        settings = read_json(folder / "rq_vae.json")
        try:
            cfg = RQVAEConfig(**{**settings, "hidden": tuple(settings["hidden"])})
            with np.load(folder / "rq_vae.npz") as file:
                params = traverse_util.unflatten_dict({k: file[k] for k in file.files}, sep="/")
            params["codebooks"], params["shift"], params["scale"]
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise InputError(f"{folder} holds no RQ-VAE ({error}): fit it again") from error
        return cls(params, cfg)


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
