"""A TIGER-shaped model on the CPU, ours beside transformers' T5: `python -m benchmarks.train_cpu`.

Encoder-decoder over semantic IDs as in TIGER (arXiv 2305.05065): 20 items of three codes each in,
three codes out, width 128, 4 + 4 layers. Both models have the same sizes, the same activation
(ReLU, T5's own: the same shape means the same arithmetic), the same batches, AdamW, float32, no
dropout and all cores; both are timed in turns in one process, so that a busy machine slows both.
Tokens are those of encoder and decoder. T5 runs as it comes, eagerly.

    pip install torch transformers   # the extra `text` has them
    python -m benchmarks.train_cpu
"""

import dataclasses
import json
import os
import pathlib
import platform
import shlex
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from onerec_jax import cli
from onerec_jax.config import ModelConfig
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.files import write_text
from onerec_jax.losses.ntp import ntp_loss
from onerec_jax.models.decoder import BeamCache, Decoder
from onerec_jax.models.encoder import EncoderGroup
from onerec_jax.models.layers import embedding, lookup, rms_norm


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Time training steps of both."""

    d_model: int = 128
    layers: int = 4
    """Of the encoder, and of the decoder."""
    heads: int = 4
    ff_dim: int = 1024
    items: int = 20
    levels: int = 3
    codebook_size: int = 256
    batch_size: int = 64
    steps: int = 10
    """Of each turn."""
    turns: int = 5
    learning_rate: float = 1e-3
    out: pathlib.Path = pathlib.Path("runs/benchmarks/train_cpu.json")
    """JSON to write."""

    def __post_init__(self):
        names = ("d_model", "layers", "heads", "ff_dim", "items", "levels", "codebook_size")
        names += ("batch_size", "steps", "turns")
        require_at_least(self, "", **dict.fromkeys(names, 1))


class Tiger(nn.Module):
    """Codes of a history to logits of the next item's codes, of our layers."""

    cfg: ModelConfig
    levels: int
    codebook_size: int
    positions: int

    def setup(self):
        cfg = self.cfg
        self.vocabulary = self.levels * self.codebook_size
        self.codes = self.param("codes", *embedding(self.vocabulary + 1, cfg.d_model))  # and BOS
        self.position = self.param("position", *embedding(self.positions, cfg.d_model))
        encoder = nn.scan(
            EncoderGroup,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=cfg.encoder_layers,
            unroll=cfg.encoder_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.encoder = encoder(cfg, jnp.float32, True)
        self.norm_encoder = rms_norm(dtype=jnp.float32, name="norm_encoder")
        self.decoder = Decoder(cfg, jnp.float32, True)
        self.norm_decoder = rms_norm(dtype=jnp.float32, name="norm_decoder")
        self.head = nn.Dense(self.vocabulary, use_bias=False)

    def encode(self, code_bt, length_b):
        z, _ = self.encoder(lookup(self.codes, code_bt, jnp.float32) + self.position, length_b)
        return self.norm_encoder(z)

    def __call__(self, code_bt, length_b, target_bs):
        read_bs = jnp.pad(target_bs[:, :-1], ((0, 0), (1, 0)), constant_values=self.vocabulary)
        x = lookup(self.codes, read_bs, jnp.float32)[:, None]
        x = self.decoder(x, self.encode(code_bt, length_b), length_b)[:, 0]
        return self.head(self.norm_decoder(x))

    def start(self, history):
        """For `beam_search`: history = (codes `[B, T]`, lengths `[B]`)."""
        return self.decoder.cross_cache(self.encode(*history), history[1]), BeamCache()

    def decode_step(self, code, cross, cache, level):
        """Logits over the whole vocabulary, as T5 has them."""
        code = code if level else jnp.full_like(code, self.vocabulary)
        x, cache = self.decoder.step(lookup(self.codes, code, jnp.float32), cross, cache)
        return self.head(self.norm_decoder(x)), cache


def batches(config: BenchmarkConfig, count=4):
    """Codes `[B, T]` and targets `[B, S]` as numbers of one vocabulary."""
    rng = np.random.default_rng(0)
    offset = np.arange(config.levels) * config.codebook_size
    for _ in range(count):
        code = rng.integers(
            config.codebook_size, size=(config.batch_size, config.items + 1, config.levels)
        )
        code = (code + offset).astype(np.int32)
        yield code[:, :-1].reshape(config.batch_size, -1), code[:, -1]


def model_config(config: BenchmarkConfig) -> ModelConfig:
    """Ours of the sizes of both."""
    return ModelConfig(
        d_model=config.d_model,
        encoder_layers=config.layers,
        decoder_layers=config.layers,
        num_heads=config.heads,
        ff_dim=config.ff_dim,
        activation="relu",
        compute_dtype="float32",
        unroll=True,
    )


def our_steps(config: BenchmarkConfig):
    """A function that runs so many steps, and the number of parameters."""
    cfg = model_config(config)
    positions = config.items * config.levels
    model = Tiger(cfg, config.levels, config.codebook_size, positions)
    length = jnp.full(config.batch_size, positions, jnp.int32)
    data = [jax.device_put(pair) for pair in batches(config)]
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), data[0][0], length, data[0][1]))
    tx = optax.adamw(config.learning_rate)

    @jax.jit
    def step(params, state, code, target):
        def loss(params):
            logits = model.apply(params, code, length, target)
            return ntp_loss(logits, target).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    box = [params, tx.init(params)]

    def run(count):
        for i in range(count):
            *box[:], value = step(*box, *data[i % len(data)])
        return float(value)

    return run, sum(x.size for x in jax.tree.leaves(params))


def t5(config: BenchmarkConfig):
    """transformers' T5 of the same sizes, and torch."""
    try:
        import torch
        from transformers import T5Config, T5ForConditionalGeneration
    except ImportError as error:
        raise InputError(f"{error}: pip install torch transformers") from error
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    vocabulary = config.levels * config.codebook_size
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary + 1,
            d_model=config.d_model,
            d_kv=config.d_model // config.heads,
            d_ff=config.ff_dim,
            num_layers=config.layers,
            num_decoder_layers=config.layers,
            num_heads=config.heads,
            dropout_rate=0.0,
            decoder_start_token_id=vocabulary,
            pad_token_id=vocabulary,
            eos_token_id=None,
            tie_word_embeddings=False,
        )
    )
    return model, torch


def t5_steps(config: BenchmarkConfig):
    """The same of T5."""
    model, torch = t5(config)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    data = [tuple(torch.from_numpy(x.astype(np.int64)) for x in pair) for pair in batches(config)]
    mask = torch.ones_like(data[0][0])

    def run(count):
        for i in range(count):
            code, target = data[i % len(data)]
            loss = model(input_ids=code, attention_mask=mask, labels=target).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    return run, sum(x.numel() for x in model.parameters())


def product_rate(size=1024, repeats=10) -> float:
    """GFLOP/s of a float32 matrix product by XLA: what the machine can do."""
    x = jnp.ones((size, size))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    start = time.perf_counter()
    for _ in range(repeats):
        product(x).block_until_ready()
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e9


def main(config: BenchmarkConfig) -> None:
    """Measure in turns, print, write."""
    tokens = config.batch_size * (config.items + 1) * config.levels
    runners = {"onerec_jax": our_steps(config), "transformers T5": t5_steps(config)}
    rates = {name: [] for name in runners}
    for name, (run, parameters) in runners.items():
        print(f"{name}: {parameters:,} parameters, loss after 4 steps {run(4):.3f}")
    for _ in range(config.turns):
        for name, (run, _) in runners.items():
            start = time.perf_counter()
            run(config.steps)
            rates[name].append(config.steps * tokens / (time.perf_counter() - start))
    ratios = np.array(rates["onerec_jax"]) / np.array(rates["transformers T5"])
    for name, values in rates.items():
        spread = f"[{min(values):,.0f}, {max(values):,.0f}]"
        print(f"{name}: {np.median(values):,.0f} tokens/s {spread}")
    print(f"ours / T5: {np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}]")
    product, cores = product_rate(), len(os.sched_getaffinity(0))
    print(f"float32 product of this machine: {product:,.0f} GFLOP/s")
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.train_cpu", *sys.argv[1:]]),
        "machine": f"{platform.processor() or platform.machine()}, {cores} cores",
        "jax": jax.__version__,
        "settings": dataclasses.asdict(config),
        "tokens_s": rates,
        "ratio": ratios.tolist(),
        "product_gflops": product,
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.out, json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, prog="python -m benchmarks.train_cpu")
