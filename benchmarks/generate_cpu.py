"""Beam search over a catalogue on the CPU, ours beside T5's: `python -m benchmarks.generate_cpu`.

The models of `benchmarks.train_cpu`, untrained: histories of 20 items of three codes, width 128,
4 + 4 layers, float32. Both give the best 50 IDs of a catalogue of 12,101 random ones: ours by
`beam_search` with the trie, T5 by `generate` with `prefix_allowed_tokens_fn`, as TIGER's
re-implementations do it. Both are timed in turns in one process, on all cores, so that a busy
machine slows both; beams of both are checked against the catalogue, ours against a forward pass.

    pip install torch transformers   # the extra `text` has them
    python -m benchmarks.generate_cpu
"""

import collections
import dataclasses
import functools
import importlib.metadata
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

from benchmarks.train_cpu import BenchmarkConfig as SizeConfig
from benchmarks.train_cpu import Tiger, batches, model_config, product_rate, t5
from onerec_jax import cli
from onerec_jax.errors import require_at_least
from onerec_jax.files import write_text
from onerec_jax.generation.beam import beam_search
from onerec_jax.generation.trie import build_trie
from onerec_jax.inputs import FeatureSpec


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Time the searches of both."""

    sizes: SizeConfig = SizeConfig()
    """Of the models; steps and learning rate are not read."""
    width: int = 50
    catalogue: int = 12_101
    """Items; random IDs, of which some coincide."""
    turns: int = 3
    """Batches of each."""
    out: pathlib.Path = pathlib.Path("runs/benchmarks/generate_cpu.json")
    """JSON to write."""

    def __post_init__(self):
        require_at_least(self, "", width=1, catalogue=1, turns=1)


class Searchable:
    """`Tiger` as `beam_search` asks for a model, all levels' codes in one vocabulary."""

    def __init__(self, model: Tiger):
        self.apply = model.apply
        codes = model.levels * model.codebook_size
        self.spec = FeatureSpec(num_items=1, levels=model.levels, codebook_size=codes)


def catalogue(config: BenchmarkConfig) -> np.ndarray:
    """Distinct IDs of the vocabulary of both models, sorted."""
    sizes = config.sizes
    sids = np.random.default_rng(1).integers(
        sizes.codebook_size, size=(config.catalogue, sizes.levels)
    )
    return np.unique(sids, axis=0).astype(np.int32) + sizes.codebook_size * np.arange(
        sizes.levels, dtype=np.int32
    )


def our_search(config: BenchmarkConfig, sids):
    """A function that searches one batch: IDs `[B, W, levels]`."""
    sizes = config.sizes
    positions = sizes.items * sizes.levels
    model = Tiger(model_config(sizes), sizes.levels, sizes.codebook_size, positions)
    length = jnp.full(sizes.batch_size, positions, jnp.int32)
    code, target = next(batches(sizes))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), code, length, target))
    trie = build_trie(sids, sizes.levels * sizes.codebook_size)
    search = jax.jit(functools.partial(beam_search, Searchable(model), width=config.width))

    def run(code):
        return jax.device_get(search(params, (code, length), trie=trie))

    def check(code, found):
        """Scores of the first user's beams are those of a forward pass."""
        beams = found.sid[0]
        history = np.broadcast_to(code[:1], (len(beams), positions))
        logits = model.apply(params, history, jnp.full(len(beams), positions), beams)
        logp = np.take_along_axis(jax.nn.log_softmax(logits), beams[..., None], axis=-1)
        np.testing.assert_allclose(found.logp[0], logp.sum((1, 2)), rtol=1e-4, atol=1e-4)

    return run, check


def t5_search(config: BenchmarkConfig, sids):
    """The same of T5."""
    model, torch = t5(config.sizes)
    model.eval()
    levels = config.sizes.levels
    children = collections.defaultdict(set)
    for sid in sids.tolist():
        for level, code in enumerate(sid):
            children[tuple(sid[:level])].add(code)
    children = {prefix: sorted(codes) for prefix, codes in children.items()}

    def allowed(_, prefix):
        # `generate` asks for beams of probability 0 too, whose prefixes need not exist.
        return children.get(tuple(prefix.tolist()[1:]), [0])

    def run(code):
        with torch.inference_mode():
            found = model.generate(
                input_ids=torch.from_numpy(code.astype(np.int64)),
                attention_mask=torch.ones(code.shape, dtype=torch.int64),
                num_beams=config.width,
                num_return_sequences=config.width,
                min_new_tokens=levels,
                max_new_tokens=levels,
                do_sample=False,
                prefix_allowed_tokens_fn=allowed,
            )
        return found[:, 1:].numpy().reshape(len(code), config.width, levels)

    return run


def legal_share(found, sids) -> float:
    """Share of IDs `[..., levels]` that the catalogue has."""
    known = set(map(tuple, sids.tolist()))
    found = list(map(tuple, found.reshape(-1, sids.shape[1]).tolist()))
    return sum(sid in known for sid in found) / len(found)


def main(config: BenchmarkConfig) -> None:
    """Search in turns, print, write."""
    sids, users = catalogue(config), config.sizes.batch_size
    ours, check = our_search(config, sids)
    theirs = t5_search(config, sids)
    codes = [code for code, _ in batches(config.sizes)]
    found = ours(codes[0])
    check(codes[0], found)
    legal = {"onerec_jax": legal_share(found.sid, sids)}
    legal["transformers T5"] = legal_share(theirs(codes[0]), sids)
    rates = {name: [] for name in legal}
    for turn in range(config.turns):
        for name, run in (("onerec_jax", ours), ("transformers T5", theirs)):
            start = time.perf_counter()
            run(codes[turn % len(codes)])
            rates[name].append(users / (time.perf_counter() - start))
    ratios = np.array(rates["onerec_jax"]) / np.array(rates["transformers T5"])
    for name, values in rates.items():
        spread = f"[{min(values):,.1f}, {max(values):,.1f}]"
        print(f"{name}: {np.median(values):,.1f} users/s {spread}, {legal[name]:.1%} legal")
    print(f"ours / T5: {np.median(ratios):.1f} [{ratios.min():.1f}, {ratios.max():.1f}]")
    product = product_rate()
    print(f"float32 product of this machine: {product:,.0f} GFLOP/s")
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.generate_cpu", *sys.argv[1:]]),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {x: importlib.metadata.version(x) for x in ("jax", "torch", "transformers")},
        "settings": dataclasses.asdict(config),
        "users_s": rates,
        "legal": legal,
        "ratio": ratios.tolist(),
        "product_gflops": product,
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.out, json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, prog="python -m benchmarks.generate_cpu")
