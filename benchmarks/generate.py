"""Generation on the devices at hand: `python -m benchmarks.generate`.

Four parts, each with its own rows in the JSON:

search     whole beam searches of random users with full histories: latency of one batch after the
           other, users/s of batches sent without waiting, and MFU, which counts the FLOPs of valid
           tokens over the bf16 peak of the chip.
selection  the exact best `width` of width x codes, as a level of the search chooses them, beside
           `jax.lax.top_k` on the flat row.
trie       what masks add to a level, made from random nodes, laid over the logits, and the nodes of
           the chosen; and a search with the trie and without, of which a step is a third.
sessions   beams over lists of --session-items items (OneRec V0) beside those of a single item, both
           of --session-width and with the trie. What may be expected of the defaults (0.935B, full
           histories, m = 5, width 128) is counted in docs/sessions.md.

Batches lie on the device already. Experts are balanced first on the searches' own tokens, as
loss-free balancing leaves a trained model; `max_violation` says how evenly.

    python -m benchmarks.generate --users 1 8 32
    python -m benchmarks.generate --preset tiny --users 2 --width 32 --items 5000 \
        --codebook-size 256 --repeats 5
    python -m benchmarks.generate --parts sessions --users 1 8 32
"""

import dataclasses
import functools
import json
import os
import pathlib
import shlex
import sys
import time
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import results
from benchmarks.random_data import large_spec, lengths_of, random_users
from onerec_jax.config import PRESETS, ModelConfig
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.generation.beam import beam_search
from onerec_jax.generation.generator import compute_copy
from onerec_jax.generation.session_beam import session_beam_search
from onerec_jax.generation.topk import top_k_of_rows
from onerec_jax.generation.trie import Trie, build_trie
from onerec_jax.models import dropless
from onerec_jax.models.moe import max_violation, update_router_bias
from onerec_jax.models.onerec import OneRec
from onerec_jax.training.flops import generation_flops
from onerec_jax.training.profile import ONE_BY_ONE, by_part, kernels, peak_flops

Part = Literal["search", "selection", "trie", "sessions"]


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Time beam search and its parts."""

    preset: str = "v1-0.935b"
    model: ModelConfig = PRESETS["v1-0.935b"]
    parts: tuple[Part, ...] = ("search", "selection", "trie", "sessions")
    users: tuple[int, ...] = (1, 8, 32)
    """Batch sizes of the searches."""
    step_users: int = 16
    """Batch size of the parts `selection` and `trie`."""
    width: int = 512
    session_width: int = 128
    """Beams of the part `sessions`; those of V0."""
    session_items: int = 5
    """Items of a list there."""
    lengths: Literal["full", "realistic"] = "full"
    """Of the histories; see benchmarks/random_data.py."""
    items: int = 20_000_000
    """Random semantic IDs in the trie."""
    codebook_size: int = 8192
    embedded_items: int = 200_000
    authors: int = 50_000
    balancing_steps: int = 60
    common_load: float = dropless.COMMON_LOAD
    """Rows of an expert that run together, as a multiple of the mean; those over take a loop."""
    repeats: int = 100
    """Timed batches of a search."""
    calls: int = 50
    """Timed calls of a selection."""
    profile: pathlib.Path | None = None
    """Folder for traces of three more searches of each batch size; their parts go to the JSON.
    Kernels are launched one by one then, so that latencies are longer."""
    out: pathlib.Path = pathlib.Path("runs/benchmarks/generate.json")
    """JSON to write; further results are appended to its list."""

    def __post_init__(self):
        names = ("step_users", "width", "items", "codebook_size", "embedded_items", "authors")
        names += ("repeats", "calls", "session_width")
        require_at_least(self, "", **dict.fromkeys(names, 1), session_items=2)
        if not self.users or min(self.users) < 1:
            raise InputError(f"--users {self.users}: give positive batch sizes")


class WithLoads:
    """A model that keeps the load of its decoder's experts, level by level, as it is searched."""

    def __init__(self, model):
        self.model, self.cfg, self.spec, self.loads = model, model.cfg, model.spec, []

    def apply(self, variables, *args, method):
        found, written = self.model.apply(variables, *args, method=method, mutable=["router_stats"])
        if method == "decode_step":
            self.loads.append(written["router_stats"])
        return found


def balance(model, variables, batch, search, steps):
    """Variables with the router's bias moved until searches load the experts evenly.

    Args:
      search: such as `beam_search`, all but the model and its arguments given.

    Returns:
      Them, MaxVio, and the blocks over the common load that a search of this batch runs.
    """

    @jax.jit
    def step(variables, batch):
        counting = WithLoads(model)
        search(counting, variables, batch)
        stats = jax.tree.map(lambda *loads: sum(loads), *counting.loads)
        load = [x for path, x in jax.tree_util.tree_leaves_with_path(stats) if "load" in str(path)]
        worst = jnp.stack([max_violation(x).max() for x in load]).max()
        router = variables["router"]
        moved = {part: update_router_bias(router[part], stats[part], 0.02) for part in stats}
        return {**router, **moved}, worst, counting.loads

    worst, blocks = 0.0, 0
    for _ in range(steps if variables.get("router") else 0):
        router, worst, loads = step(variables, batch)
        variables = {**variables, "router": router}
    if variables.get("router"):
        _, worst, loads = step(variables, batch)
        for path, load in jax.tree_util.tree_leaves_with_path(jax.device_get(loads)):
            if "load" in str(path):
                tokens = int(load.sum(-1).max() / model.cfg.experts_per_token)
                rows = dropless.dropless_rows(tokens, load.shape[-1], model.cfg.experts_per_token)
                blocks += int(np.ceil(np.maximum(load - rows, 0) / dropless.BLOCK).sum())
    return variables, float(worst), blocks


def random_trie(config: BenchmarkConfig) -> tuple[Trie, dict]:
    """A trie of distinct random IDs, and what it cost to build."""
    rng = np.random.default_rng(0)
    size = config.codebook_size
    keys = np.unique(rng.integers(0, size**3, config.items))
    sids = np.stack([keys // size**2, keys // size % size, keys % size], axis=1).astype(np.int32)
    start = time.perf_counter()
    trie = jax.block_until_ready(build_trie(sids, size))
    seconds = time.perf_counter() - start
    held = sum(x.nbytes for x in jax.tree.leaves(trie))
    print(f"trie of {len(sids):,} IDs: {seconds:.1f} s, {held / len(sids):.1f} bytes an ID")
    return trie, {"ids": len(sids), "build_s": seconds, "bytes": held}


def milliseconds(function, *args, calls: int) -> float:
    """Of a call among many sent without waiting; the best of three such rows."""
    jax.block_until_ready(function(*args))
    rows = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            found = function(*args)
        jax.block_until_ready(found)
        rows.append((time.perf_counter() - start) / calls)
    return 1e3 * min(rows)


def time_search(config, model, variables, users, trie, *, width: int, items: int = 0) -> dict:
    """Searches of one batch size: for items, or with `items` for lists of so many."""
    cfg, spec = model.cfg, model.spec
    peak = peak_flops(jax.devices()[0])
    batch = jax.device_put(random_users(cfg, spec, users, lengths=config.lengths, seed=users))
    lengths = lengths_of(config.lengths, cfg, users, np.random.default_rng(users))
    flops = generation_flops(cfg, spec, width, lengths, items=items or 1)
    useful = float(sum(part.sum() for part in flops.values()))
    search = functools.partial(session_beam_search, items=items) if items else beam_search
    search = jax.jit(functools.partial(search, model, width=width))
    start = time.perf_counter()
    run = search.lower(variables, batch, trie=trie).compile()
    compile_s = time.perf_counter() - start
    call = functools.partial(run, variables, batch, trie=trie)
    found = jax.block_until_ready(call())
    waits = []
    for _ in range(config.repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        waits.append(1e3 * (time.perf_counter() - start))
    seconds = milliseconds(call, calls=max(config.repeats // 4, 2)) / 1e3
    memory = run.memory_analysis()
    parts = {}
    if config.profile is not None:
        folder = config.profile / f"{users}-{width}-{items}-{trie is not None}"
        with jax.profiler.trace(str(folder)):
            jax.block_until_ready([call() for _ in range(3)])
        longest = kernels(folder, run.as_text(), steps=3)
        spent = by_part(longest)
        # What no module is named in is no optimizer here.
        spent["selection and masks"] = spent.pop("optimizer", 0.0)
        parts = {"parts_ms": spent, "kernels": [k._asdict() for k in longest[:60]]}
    row = {
        "part": "search",
        "users": users,
        "width": width,
        "items": items or 1,
        "trie": trie is not None,
        "p50_ms": float(np.percentile(waits, 50)),
        "p99_ms": float(np.percentile(waits, 99)),
        "batch_ms": 1e3 * seconds,
        "users_s": users / seconds,
        "gflop_a_user": useful / users / 1e9,
        "useful_tflops": useful / seconds / 1e12,
        "mfu": useful / seconds / peak if peak else None,
        "alive": float(np.isfinite(found.logp).mean()),
        "compile_s": compile_s,
        "temporary_gib": memory.temp_size_in_bytes / 2**30 if memory else None,
        **parts,
    }
    print(
        f"{users} users, beam {width}, {f'lists of {items}' if items else 'single items'}, "
        f"{'no ' if trie is None else ''}trie: "
        f"p50 {row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f} ms; {row['batch_ms']:.2f} ms a batch "
        f"without waiting, {row['users_s']:,.0f} users/s, {row['useful_tflops']:.1f} TFLOP/s"
        + (f", MFU {row['mfu']:.1%}" if peak else ""),
        flush=True,
    )
    return row


def time_sessions(config, model, variables, trie) -> list[dict]:
    """Lists beside single items, by the same model and width; experts balanced on lists."""
    width, items = config.session_width, config.session_items
    batch = random_users(model.cfg, model.spec, config.step_users, lengths=config.lengths)
    search = functools.partial(session_beam_search, width=width, items=items)
    variables, worst, blocks = balance(
        model, variables, jax.device_put(batch), search, config.balancing_steps
    )
    rows = []
    for users in config.users:
        single, lists = (
            time_search(config, model, variables, users, trie, width=width, items=m)
            for m in (0, items)
        )
        for row in (single, lists):
            row |= {"part": "sessions", "max_violation": worst, "blocks_over": blocks}
        lists["times_single"] = lists["batch_ms"] / single["batch_ms"]
        lists["times_single_p50"] = lists["p50_ms"] / single["p50_ms"]
        lists["times_single_flops"] = lists["gflop_a_user"] / single["gflop_a_user"]
        rows += [single, lists]
        print(
            f"{users} users: a list of {items} costs {lists['times_single']:.2f} times a single "
            f"item ({lists['times_single_p50']:.2f} times its latency, "
            f"{lists['times_single_flops']:.2f} times its FLOPs)",
            flush=True,
        )
    return rows


def random_logits(config):
    """Logits `[B, W, V]` and scores `[B, W]` as a level of a search has them."""
    shape = (config.step_users, config.width, config.codebook_size)
    logits = jax.random.normal(jax.random.key(0), shape)
    score = -jnp.sort(jax.random.exponential(jax.random.key(1), shape[:2]), axis=1)
    return logits, score


def choose(logits, score, legal=None):
    """Selection of a level, as `beam_search` has it."""
    offset = score - jax.nn.logsumexp(logits, axis=-1)
    return top_k_of_rows(logits, offset, logits.shape[1], legal)


def time_selection(config) -> list[dict]:
    """The exact best of all continuations, and what plain sorting takes."""
    logits, score = random_logits(config)
    width = config.width

    def plain(logits, score):
        logp = score[..., None] + jax.nn.log_softmax(logits)
        return jax.lax.top_k(logp.reshape(len(logp), -1), width)

    ways = {
        "selection": lambda x, s: top_k_of_rows(x, s, width),
        "logsumexp and selection": choose,
        "log_softmax and lax.top_k": plain,
    }
    rows = []
    for name, way in ways.items():
        spent = milliseconds(jax.jit(way), logits, score, calls=config.calls)
        rows.append({"part": "selection", "way": name, "ms": spent})
        print(f"{config.step_users} x best {width} of {width} x {logits.shape[2]}, {name}: "
              f"{spent:.3f} ms", flush=True)  # fmt: skip
    return rows


def time_trie(config, trie: Trie) -> list[dict]:
    """Milliseconds that masks add to each level after the first."""
    logits, score = random_logits(config)
    rng = np.random.default_rng(0)
    rows = []

    def masked(logits, score, node, trie, level):
        exists = trie.following(node, level)
        score, index = choose(logits, score, exists)
        parent, code = index // logits.shape[2], index % logits.shape[2]
        node = jnp.take_along_axis(node, parent, axis=1)
        words = jnp.take_along_axis(exists, parent[..., None], axis=1)
        return score, code, trie.child(node, level, words, code)

    free = milliseconds(jax.jit(choose), logits, score, calls=config.calls)
    for level in range(1, trie.levels):
        nodes = int(np.asarray(trie.start[level - 1]).max())
        node = rng.integers(0, nodes, score.shape).astype(np.int32)
        node = jax.device_put(np.sort(node, axis=1))
        run = jax.jit(functools.partial(masked, level=level))
        spent = milliseconds(run, logits, score, node, trie, calls=config.calls)
        row = {"part": "trie", "level": level, "with_ms": spent, "without_ms": free}
        rows.append(row)
        print(f"level {level}: {spent:.3f} ms with the trie, {free:.3f} ms without", flush=True)
    return rows


def main(config: BenchmarkConfig) -> None:
    """Make the model and the trie, measure, print, write."""
    if config.profile is not None:  # before JAX starts its backend
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_BY_ONE}"
    dropless.COMMON_LOAD = config.common_load
    cfg = config.model
    if "sessions" in config.parts:
        cfg = dataclasses.replace(cfg, session_items=config.session_items)
    spec = large_spec(
        items=config.embedded_items,
        authors=config.authors,
        tags=500,
        codebook_size=config.codebook_size,
    )
    device = jax.devices()[0]
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.generate", *sys.argv[1:]]),
        "device": device.device_kind,
        "jax": jax.__version__,
        "settings": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "rows": [],
    }
    trie = None
    sizes = [(users, True) for users in config.users if "search" in config.parts]
    if "trie" in config.parts:
        sizes += [(config.step_users, masked) for masked in (True, False)]
    if sizes or "sessions" in config.parts:
        trie, result["trie"] = random_trie(config)
    if "selection" in config.parts:
        result["rows"] += time_selection(config)
    if "trie" in config.parts:
        result["rows"] += time_trie(config, trie)
    if trie is not None:
        model = OneRec(cfg, spec)
        batch = jax.device_put(random_users(cfg, spec, config.step_users, lengths=config.lengths))
        init = jax.jit(lambda key, batch: nn.unbox(model.init(key, batch)))
        variables = init(jax.random.key(0), jax.tree.map(lambda x: x[:1], batch))
        variables = jax.jit(functools.partial(compute_copy, model))(variables)
        result["parameters"] = sum(x.size for x in jax.tree.leaves(variables["params"]))
        print(f"{config.preset}: {result['parameters'] / 1e9:.3f} B", flush=True)
        if sizes:
            search = functools.partial(beam_search, width=config.width)
            variables, worst, blocks = balance(
                model, variables, batch, search, config.balancing_steps
            )
            result |= {"max_violation": worst, "blocks_over": blocks}
            print(f"MaxVio {worst:.2f}, {blocks} blocks over", flush=True)
        for users, masked in dict.fromkeys(sizes):
            chosen = trie if masked else None
            row = time_search(config, model, variables, users, chosen, width=config.width)
            result["rows"].append(row)
        if "sessions" in config.parts:
            result["rows"] += time_sessions(config, model, variables, trie)
        result["peak_gib"] = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    results.append(config.out, result)


if __name__ == "__main__":
    results.run_with_preset(main, BenchmarkConfig, prog="python -m benchmarks.generate")
