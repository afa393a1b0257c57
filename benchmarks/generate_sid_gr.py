"""Beam search behind a causal history encoder: `python -m benchmarks.generate_sid_gr`.

The published grid of NVIDIA's SID-GR example (recsys-examples, examples/sid_gr/benchmark): batch 1
to 16, histories up to 256 to 2048 items of four tokens each, beam 200 over four levels of 256
codes, bf16, the history's prefill included; median of 20 after 5 to warm up. It needs no trained
weights. Lengths are drawn uniformly from 1 to the history's maximum, the seed being the cell's, or
all are the maximum (--lengths full).

The model exists for this benchmark alone, of our layers, in the sizes of theirs: 8 pre-norm blocks
of width 1024 with 8 heads of 128; per block the matrices q, k, v, o (1024 x 1024) and a
feed-forward layer of 1024 x 4096 and 4096 x 1024 with GELU (four times the width, Megatron's
default); a head of 1024 x 256 a level. RMSNorm stands for their LayerNorm, and positions have
learned embeddings. Codes see the history, BOS and the codes before them, as in their tree mask.

What makes it fast: products run on valid tokens alone, packed row by row, of which the number is
rounded up to sixteenths of all slots; keys and values of the history lie once a user, whatever the
number of beams; one compiled program.

    python -m benchmarks.generate_sid_gr
    python -m benchmarks.generate_sid_gr --batches 2 --histories 16 --width 20 --layers 2 \
        --d-model 64 --head-dim 16
"""

import dataclasses
import functools
import pathlib
import shlex
import sys
import time
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from flax import struct

from benchmarks import results
from onerec_jax import cli
from onerec_jax.errors import require_at_least
from onerec_jax.generation.beam import beam_search
from onerec_jax.models.layers import (
    FeedForward,
    Projections,
    attention,
    embedding,
    lookup,
    resolve_attention,
    rms_norm,
)
from onerec_jax.training.profile import peak_flops

PUBLISHED_MS = {
    # generate_beam_decode, H100 80 GB, by batch; histories 256, 512, 1024, 2048.
    1: (21.5, 21.5, 21.5, 30.1),
    4: (21.9, 23.6, 27.6, 43.9),
    8: (22.2, 23.8, 30.7, 50.0),
    16: (23.4, 28.9, 41.7, 79.9),
}
PUBLISHED_HISTORIES = (256, 512, 1024, 2048)


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Time the cells of a grid."""

    batches: tuple[int, ...] = tuple(PUBLISHED_MS)
    histories: tuple[int, ...] = PUBLISHED_HISTORIES
    """Most items of a history."""
    width: int = 200
    layers: int = 8
    d_model: int = 1024
    head_dim: int = 128
    lengths: Literal["uniform", "full"] = "uniform"
    """Of the histories: from 1 to the maximum, as in the published grid, or all the maximum."""
    levels: int = 4
    codebook_size: int = 256
    warmup: int = 5
    repeats: int = 20
    out: pathlib.Path = pathlib.Path("runs/benchmarks/generate_sid_gr.json")
    """JSON to write; further results are appended to its list."""

    def __post_init__(self):
        names = ("width", "layers", "d_model", "head_dim", "levels", "codebook_size", "repeats")
        require_at_least(self, "", **dict.fromkeys(names, 1))


@struct.dataclass
class History:
    """Valid tokens of all users in a row, and where each belongs. N rows, B users, T slots."""

    token: jax.Array  # int32 [N], code + level * codebook size; rows past the valid ones repeat one
    position: jax.Array  # int32 [N], in the user's history
    slot: jax.Array  # int32 [N], b * T + position
    row: jax.Array  # int32 [B, T], row of each slot; any for slots past a length
    length: jax.Array  # int32 [B], at least 1


class Context(NamedTuple):
    """Keys and values of the histories."""

    kv: list  # of each layer, a pair [B, T, H, K]
    length: jax.Array  # int32 [B]


@struct.dataclass
class BeamCache:
    """Keys and values of BOS and codes: a list of positions, each a list of layers."""

    positions: tuple = ()  # pairs [B, W or 1, H, K]

    def take(self, parent_bw):
        """The caches of the beams that survive."""

        def gather(x):
            if x.shape[1] == 1:
                return x
            return jnp.take_along_axis(x, parent_bw[..., None, None], axis=1)

        return jax.tree.map(gather, self)


def attend_history(q_bwhk, k_bthk, v_bthk, length_b):
    """Attention of beams to a history: `[B, W, H, K]` and float32 logsumexp `[B, W, H]`."""
    if resolve_attention("auto", q_bwhk.dtype) == "xla":
        return jax.nn.dot_product_attention(
            q_bwhk, k_bthk, v_bthk, key_value_seq_lengths=length_b, return_residual=True
        )
    # jax.nn would round the logsumexp to the type of the values.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    width, head_dim = q_bwhk.shape[1], q_bwhk.shape[3]
    q_bwhk = jnp.pad(q_bwhk, ((0, 0), (0, width % 2), (0, 0), (0, 0)))
    y, logsumexp_bhw = dot_product_attention(
        q_bwhk, k_bthk, v_bthk, None, None, jnp.full_like(length_b, q_bwhk.shape[1]), length_b,
        scale=head_dim**-0.5, mask_type=MaskType.PADDING, return_residual=True,
    )  # fmt: skip
    return y[:, :width], logsumexp_bhw.transpose(0, 2, 1)[:, :width]


class Block(nn.Module):
    """A causal block over packed histories, or over one position of many beams."""

    d_model: int
    heads: int
    dtype: jnp.dtype

    def setup(self):
        self.maps = Projections(self.d_model, self.heads, self.dtype)
        self.norm_attention = rms_norm(dtype=self.dtype, name="norm_attention")
        self.norm_ff = rms_norm(dtype=self.dtype, name="norm_ff")
        self.ff = FeedForward(4 * self.d_model, self.dtype)

    def prefill(self, x_nd, history: History):
        """Returns the tokens and their keys and values by slot."""
        maps, x = self.maps, self.norm_attention(x_nd)
        q, k, v = (
            jnp.take(m(x), history.row, axis=0, mode="clip") for m in (maps.q, maps.k, maps.v)
        )
        y = attention(
            q, k, v, key_length_b=history.length, causal=True, implementation="auto",
            zero_empty=False,
        )  # fmt: skip
        y_nhk = jnp.take(y.reshape(-1, *y.shape[2:]), history.slot, axis=0, mode="clip")
        x_nd = x_nd + maps.o(y_nhk)
        return x_nd + self.ff(self.norm_ff(x_nd)), (k, v)

    def step(self, x_bwd, context, length_b, earlier):
        """Returns the position and its keys and values; `earlier` are those before it."""
        maps, x = self.maps, self.norm_attention(x_bwd)
        q, k, v = maps.q(x), maps.k(x), maps.v(x)
        y, logsumexp = attend_history(q, *context, length_b)
        pairs = [*earlier, (k, v)]
        wide = q.astype(jnp.float32) * q.shape[-1] ** -0.5
        score = [(wide * key.astype(jnp.float32)).sum(-1) for key, _ in pairs]
        weight = jax.nn.softmax(jnp.stack([logsumexp.astype(jnp.float32), *score]), axis=0)
        values = [y, *(value for _, value in pairs)]
        y = sum(w[..., None] * value for w, value in zip(weight, values, strict=True))
        x_bwd = x_bwd + maps.o(y.astype(self.dtype))
        return x_bwd + self.ff(self.norm_ff(x_bwd)), (k, v)


class CausalModel(nn.Module):
    """What `beam_search` asks of a model: `start` and `decode_step`."""

    config: BenchmarkConfig
    slots: int
    dtype: jnp.dtype

    @property
    def spec(self):
        """Levels and codebook size."""
        return self.config

    def setup(self):
        cfg = self.config
        size = cfg.levels * cfg.codebook_size
        self.codes = self.param("codes", *embedding(size + 1, cfg.d_model))  # and BOS
        self.position = self.param("position", *embedding(self.slots + cfg.levels, cfg.d_model))
        heads = cfg.d_model // cfg.head_dim
        self.blocks = [Block(cfg.d_model, heads, self.dtype) for _ in range(cfg.layers)]
        self.norm = rms_norm(dtype=self.dtype, name="norm")
        self.heads = [
            nn.Dense(cfg.codebook_size, use_bias=False, dtype=self.dtype, name=f"head_{i}")
            for i in range(cfg.levels)
        ]

    def embed(self, token, position):
        return lookup(self.codes, token, self.dtype) + lookup(self.position, position, self.dtype)

    def start(self, history: History):
        x_nd, kv = self.embed(history.token, history.position), []
        for block in self.blocks:
            x_nd, pair = block.prefill(x_nd, history)
            kv.append(pair)
        return Context(kv, history.length), BeamCache()

    def decode_step(self, code, context: Context, cache: BeamCache, level: int):
        cfg = self.config
        token = code + (level - 1) * cfg.codebook_size
        if level == 0:
            token = jnp.full_like(code, cfg.levels * cfg.codebook_size)
        x_bwd = self.embed(token, context.length[:, None] + level)
        here = []
        for i, block in enumerate(self.blocks):
            earlier = [layers[i] for layers in cache.positions]
            x_bwd, pair = block.step(x_bwd, context.kv[i], context.length, earlier)
            here.append(pair)
        logits = self.heads[level](self.norm(x_bwd)).astype(jnp.float32)
        return logits, BeamCache((*cache.positions, here))

    def __call__(self, history: History):
        """Touches every parameter, for `init`."""
        context, cache = self.start(history)
        code = jnp.zeros((len(history.length), 1), jnp.int32)
        for level in range(self.config.levels):
            logits, cache = self.decode_step(code, context, cache, level)
        return logits


def random_history(config: BenchmarkConfig, users: int, items: int) -> History:
    """Histories of at most `items` items."""
    rng = np.random.default_rng([users, items])
    slots = items * config.levels
    length = rng.integers(1, items + 1, users) * config.levels
    if config.lengths == "full":
        length[:] = items * config.levels
    sixteenth = -(-users * slots // 16)
    rows = -(-int(length.sum()) // sixteenth) * sixteenth
    user = np.repeat(np.arange(users), length)
    position = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    token = rng.integers(0, config.codebook_size, len(user))
    token += position % config.levels * config.codebook_size
    row = np.zeros((users, slots), int)
    row[user, position] = np.arange(len(user))

    def packed(x):
        return np.pad(x, (0, rows - len(x))).astype(np.int32)

    return History(
        token=packed(token),
        position=packed(position),
        slot=packed(user * slots + position),
        row=row.astype(np.int32),
        length=length.astype(np.int32),
    )


def useful_flops(config: BenchmarkConfig, length) -> float:
    """FLOPs of valid tokens: products, attention to what is visible, heads of all beams."""
    d, layers = config.d_model, config.layers
    rows, decoded = 1, 0.0
    length = np.asarray(length, float)
    for level in range(config.levels):
        attended = 2 * (length + level + 1) * d
        macs = layers * (12 * d * d + attended) + d * config.codebook_size
        decoded += rows * macs.sum()
        rows = min(config.width, rows * config.codebook_size)
    prefill = layers * (12 * d * d * length + length * (length + 1) * d)
    return 2 * (prefill.sum() + decoded)


def time_cell(config: BenchmarkConfig, users: int, items: int) -> dict:
    """One cell of the grid."""
    dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    history = jax.device_put(random_history(config, users, items))
    model = CausalModel(config, items * config.levels, dtype)

    @jax.jit
    def init(key):
        few = random_history(config, 1, 1)
        params = nn.unbox(model.init(key, few))
        return jax.tree.map(lambda x: x.astype(dtype), params)

    variables = init(jax.random.key(0))
    search = jax.jit(functools.partial(beam_search, model, width=config.width))
    start = time.perf_counter()
    run = search.lower(variables, history).compile()
    compile_s = time.perf_counter() - start
    for _ in range(config.warmup):
        found = jax.block_until_ready(run(variables, history))
    spent = []
    for _ in range(config.repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(variables, history))
        spent.append(1e3 * (time.perf_counter() - start))
    median = float(np.median(spent))
    flops = useful_flops(config, jax.device_get(history.length))
    peak = peak_flops(jax.devices()[0])
    published = None
    uniform = config.lengths == "uniform"
    if uniform and users in PUBLISHED_MS and items in PUBLISHED_HISTORIES:
        published = PUBLISHED_MS[users][PUBLISHED_HISTORIES.index(items)]
    row = {
        "users": users,
        "items": items,
        "tokens": int(history.length.sum()),
        "rows": len(history.token),
        "gflop": flops / 1e9,
        "ms": median,
        "ms_range": [min(spent), max(spent)],
        "mfu": flops / median * 1e3 / peak if peak else None,
        "published_ms": published,
        "alive": float(np.isfinite(jax.device_get(found.logp)).mean()),
        "compile_s": compile_s,
    }
    print(
        f"{users} users, up to {items} items, {row['tokens']:,} tokens, {row['gflop']:,.0f} GFLOP: "
        f"{median:.2f} ms [{min(spent):.2f}, {max(spent):.2f}]"
        + (f", published {published} ms" if published else ""),
        flush=True,
    )
    return row


def main(config: BenchmarkConfig) -> None:
    """Measure the grid, print, write."""
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}")
    rows = [
        time_cell(config, users, items) for users in config.batches for items in config.histories
    ]
    table = rich.table.Table("users", *(f"{items} items" for items in config.histories))
    for users in config.batches:
        cells = [row for row in rows if row["users"] == users]
        table.add_row(
            str(users),
            *(
                f"{c['ms']:.1f}" + (f" of {c['published_ms']}" if c["published_ms"] else "")
                for c in cells
            ),
        )
    rich.console.Console().print(table)
    gains = [row["published_ms"] / row["ms"] for row in rows if row["published_ms"]]
    if gains:
        print(
            f"published / ours: geometric mean {np.exp(np.mean(np.log(gains))):.2f}, "
            f"faster in {sum(gain > 1 for gain in gains)} of {len(gains)} cells"
        )
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.generate_sid_gr", *sys.argv[1:]]),
        "device": device.device_kind,
        "jax": jax.__version__,
        "settings": dataclasses.asdict(config),
        "rows": rows,
    }
    results.append(config.out, result)


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, prog="python -m benchmarks.generate_sid_gr")
