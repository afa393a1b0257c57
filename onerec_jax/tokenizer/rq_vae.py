"""RQ-VAE: an autoencoder whose bottleneck is a residual quantiser; `rq_vae_training` fits it.

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
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from onerec_jax.errors import InputError, require_at_least
from onerec_jax.files import atomic_folder, read_json

CHUNK = 8192
"""Items that are encoded at once."""
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
