"""State and step of item alignment: a pure function under one `jit`.

`cfg` is an `alignment.AlignmentConfig` throughout.

Axes: B entries of a batch, N items of one entry (2 for a pair, else 1), T tokens, D width,
Q queries, S caption positions.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding

from onerec_jax.losses.caption import caption_loss
from onerec_jax.losses.contrastive import contrastive_loss
from onerec_jax.models.item import CaptionDecoder, ItemAligner
from onerec_jax.models.onerec import resolve_dtype
from onerec_jax.sharding import BATCH, replicated, shardings_of
from onerec_jax.tokenizer.alignment_batches import BOS
from onerec_jax.training.optimizer import OptimizerConfig, make_optimizer

HOTTEST, COLDEST = 1.0, 0.01
"""Bounds of a learnt temperature; the lower one is CLIP's (arXiv 2103.00020)."""


def aligner_module(cfg) -> ItemAligner:
    return ItemAligner(
        queries=cfg.queries,
        layers=cfg.layers,
        heads=cfg.heads,
        width=cfg.width,
        ff_dim=cfg.ff_dim,
        dtype=resolve_dtype(cfg.compute_dtype),
        implementation=cfg.attention,
        dropout=cfg.dropout,
    )


def _caption_module(cfg) -> CaptionDecoder:
    return CaptionDecoder(
        vocabulary=cfg.caption_vocabulary,
        layers=cfg.caption_layers,
        heads=cfg.heads,
        width=cfg.caption_width,
        dtype=resolve_dtype(cfg.compute_dtype),
        dropout=cfg.dropout,
    )


@struct.dataclass
class AlignmentState:
    """All that a training step reads and writes."""

    seed: jax.Array  # int32 []
    step: jax.Array  # int32 []
    params: dict  # compressor, and as configured decoder and temperature
    opt_state: optax.OptState


def init_state(seed, *, cfg, tx, input_dim: int) -> AlignmentState:
    """Fresh state; leaves still carry their logical axes (`nn.Partitioned`)."""
    aligner_key, decoder_key = jax.random.split(jax.random.key(seed))
    tokens, length = jnp.zeros((1, 2, input_dim)), jnp.ones(1, jnp.int32)
    params = {"compressor": aligner_module(cfg).init(aligner_key, tokens, length)["params"]}
    if cfg.captions:
        z = jnp.zeros((1, cfg.queries, cfg.width))
        caption = jnp.zeros((1, cfg.caption_length), jnp.int32)
        decoder = _caption_module(cfg).init(decoder_key, z, caption, bos=BOS)
        params["decoder"] = decoder["params"]
    if cfg.pairs and cfg.learn_temperature:
        # "scale" is a name that weight decay leaves alone.
        params["temperature"] = {"scale": jnp.asarray(math.log(cfg.temperature), jnp.float32)}
    step = jnp.zeros((), jnp.int32)
    return AlignmentState(jnp.asarray(seed, jnp.int32), step, params, tx.init(params))


def _alignment_loss(params, batch, key, *, cfg):
    """Loss of one batch and its parts, float32 scalars."""
    entries, per_entry, slots, width = batch["tokens"].shape
    aligner_key, decoder_key = jax.random.split(key)
    z = aligner_module(cfg).apply(
        {"params": params["compressor"]},
        batch["tokens"].reshape(entries * per_entry, slots, width),
        batch["length"].reshape(-1),
        train=True,
        rngs={"dropout": aligner_key},
    )
    z_bnqd = z.reshape(entries, per_entry, cfg.queries, cfg.width)
    loss, metrics = jnp.zeros(()), {}
    if cfg.pairs:
        temperature = cfg.temperature
        if cfg.learn_temperature:
            temperature = jnp.exp(params["temperature"]["scale"]).clip(COLDEST, HOTTEST)
            metrics["temperature"] = temperature
        loss_b, aux = contrastive_loss(
            z_bnqd[:, 0],
            z_bnqd[:, 1],
            temperature,
            exclude_bb=batch["exclude"],
            symmetric=cfg.symmetric,
        )
        metrics |= {"contrastive": loss_b.mean(), **aux}
        loss = loss + metrics["contrastive"]
    if cfg.captions:
        logits = _caption_module(cfg).apply(
            {"params": params["decoder"]},
            z_bnqd[:, 0],
            batch["caption"],
            bos=BOS,
            train=True,
            rngs={"dropout": decoder_key},
        )
        sum_b, count_b = caption_loss(logits, batch["caption"], batch["caption_length"])
        metrics["caption"] = sum_b.sum() / jnp.maximum(count_b.sum(), 1)
        loss = loss + cfg.caption_weight * metrics["caption"]
    return loss, metrics


def alignment_step(state: AlignmentState, batch, *, cfg, tx):
    """One AdamW step. The dropout key is a function of (seed, step).

    Args:
      batch: dict of `tokens` `[B, N, T, D]`, `length` int32 `[B, N]`; with pairs `exclude` bool
        `[B, B]`; with captions, those of each entry's first item, `caption` int32 `[B, S]` and
        `caption_length` int32 `[B]`.

    Returns:
      The next state and metrics: `loss`, `grad_norm`, `contrastive` (nats a pair), `accuracy`,
      `negatives`, `temperature` (if learnt), `caption` (nats a word).
    """
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    loss_fn = functools.partial(_alignment_loss, batch=batch, key=key, cfg=cfg)
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, **metrics, "grad_norm": optax.tree.norm(grads)}
    return AlignmentState(state.seed, state.step + 1, params, opt_state), metrics


@functools.lru_cache(maxsize=8)  # another seed compiles nothing
def compiled(cfg, mesh, input_dim: int):
    """Compiled `init(seed) -> state` and `step(state, batch) -> (state, metrics)` on one mesh.

    The step gives the memory of its state away. It compiles once for every number of token slots.
    """
    optimizer = OptimizerConfig(
        learning_rate=cfg.learning_rate,
        warmup_steps=cfg.warmup_steps,
        weight_decay=cfg.weight_decay,
    )
    tx = make_optimizer(optimizer, cfg.steps)
    init = functools.partial(init_state, cfg=cfg, tx=tx, input_dim=input_dim)
    shardings = shardings_of(jax.eval_shape(init, 0), mesh)
    step = jax.jit(
        functools.partial(alignment_step, cfg=cfg, tx=tx),
        in_shardings=(shardings, NamedSharding(mesh, BATCH)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    return jax.jit(lambda seed: nn.unbox(init(seed)), out_shardings=shardings), step
