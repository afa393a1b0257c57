"""Factories of tiny configurations, batches and data sets, shared by the tests."""

import functools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from flax import struct

from onerec_jax.config import ModelConfig
from onerec_jax.data.examples import Examples
from onerec_jax.data.schema import Dataset, build_dataset
from onerec_jax.inputs import TIME_BUCKETS, Batch, FeatureSpec, Pathway, StaticFeature
from onerec_jax.tokenizer.semantic_ids import SemanticIds

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""`jax.jit` for programs that run once: half the compile time, slower code."""


def tiny_config(**changes) -> ModelConfig:
    """A model with every part of the real one, eight experts for eight devices, in float32."""
    values = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_heads": 2,
        "ff_dim": 24,
        "num_experts": 8,
        "experts_per_token": 2,
        "expert_dim": 12,
        "short_length": 4,
        "positive_length": 3,
        "lifelong_length": 6,
        "lifelong_queries": 2,
        "lifelong_blocks": 1,
        "pathway_dim": 16,
        "author_dim": 8,
        "feature_dim": 4,
        "static_dim": 4,
        "compute_dtype": "float32",
    }
    return ModelConfig(**{**values, **changes})


def full_spec(**changes) -> FeatureSpec:
    """A specification with every feature present."""
    values = {
        "num_items": 30,
        "levels": 3,
        "codebook_size": 5,
        "tags": ("a", "b", "c"),
        "tags_per_item": 2,
        "num_authors": 4,
        "has_time": True,
        "has_playtime": True,
        "has_duration": True,
        "labels": ("like", "rating=5"),
        "static": (
            StaticFeature("gender", "words", 2, ("f", "m")),
            StaticFeature("age", "words", 2, ("old", "young")),
        ),
    }
    return FeatureSpec(**{**values, **changes})


def bare_spec(**changes) -> FeatureSpec:
    """Semantic IDs and nothing else, as from bare item sequences."""
    return FeatureSpec(**{"num_items": 30, "levels": 3, "codebook_size": 5, **changes})


def random_pathway(rng, spec, length, slots) -> Pathway:
    """A pathway whose slots all hold values, those past `length` too (garbage within range)."""
    users = len(length)

    def draw(high, *more, low=0):
        return rng.integers(low, high, (users, slots, *more)).astype(np.int32)

    return Pathway(
        length=np.asarray(length, np.int32),
        sid=draw(spec.codebook_size, spec.levels),
        item=draw(spec.num_items),
        tags=draw(len(spec.tags) + 1, spec.tags_per_item) if spec.tags else None,
        author=draw(spec.num_authors + 1) if spec.num_authors else None,
        age=draw(TIME_BUCKETS) if spec.has_time else None,
        playtime=draw(TIME_BUCKETS) if spec.has_playtime else None,
        duration=draw(TIME_BUCKETS) if spec.has_duration else None,
        label=draw(2, len(spec.labels)).astype(np.uint8) if spec.labels else None,
    )


def random_batch(cfg, spec, users, *, seed=0, targets=1, **lengths) -> Batch:
    """B users with random histories; `short=[…]` and so on fix the lengths of a pathway."""
    rng = np.random.default_rng(seed)
    slots = {
        "short": cfg.short_length,
        "positive": cfg.positive_length,
        "lifelong": cfg.lifelong_length,
    }
    pathways = {
        name: random_pathway(rng, spec, lengths.get(name, rng.integers(0, size + 1, users)), size)
        for name, size in slots.items()
    }
    if spec.clustered:
        shape = (users, cfg.lifelong_length)
        count = rng.integers(1, TIME_BUCKETS, shape).astype(np.int32)
        pathways["lifelong"] = pathways["lifelong"].replace(count=count)
    static = [rng.integers(0, feature.size + 1, users) for feature in spec.static]
    target = rng.integers(0, spec.codebook_size, (users, targets, spec.levels))
    return Batch(
        static=np.array(static, np.int32).reshape(len(spec.static), users).T,
        target=target.astype(np.int32),
        target_count=rng.integers(1, targets + 1, users).astype(np.int32),
        **pathways,
    )


def poison(batch: Batch, cfg, spec, seed=99) -> Batch:
    """The same batch with other values in every slot past a pathway's length."""
    changed = {}
    for number, name in enumerate(("short", "positive", "lifelong")):
        old = getattr(batch, name)
        slots = old.item.shape[1]
        new = random_pathway(np.random.default_rng(seed + number), spec, old.length, slots)
        valid = np.arange(slots) < old.length[:, None]
        values = {}
        for field in ("sid", "item", "tags", "author", "age", "playtime", "duration", "label"):
            kept, other = getattr(old, field), getattr(new, field)
            if kept is not None:
                mask = valid.reshape(*valid.shape, *(1,) * (kept.ndim - 2))
                kept = np.where(mask, kept, other)
            values[field] = kept
        changed[name] = old.replace(**values)
    return batch.replace(**changed)


def examples_of(user, position) -> Examples:
    """Examples at the given users and positions."""
    return Examples(np.asarray(user, np.int32), np.asarray(position, np.int32))


def random_ids(num_items, *, levels=3, codebook_size=5, seed=0) -> SemanticIds:
    """A table of random codes, collisions included."""
    rng = np.random.default_rng(seed)
    sids = rng.integers(0, codebook_size, (num_items, levels)).astype(np.int32)
    codebooks = rng.standard_normal((levels, codebook_size, 2)).astype(np.float32)
    return SemanticIds(sids, codebooks, {"dataset": "toy"})


class ToyModel:
    """Logits of a prefix by one line, to test searches over many codes without an encoder.

    The batch is a vector of each user, float32 `[B, D]`; a beam's state is `tanh(state + code)`.
    """

    def __init__(self, levels, codebook_size, width=6, seed=0):
        self.spec = bare_spec(levels=levels, codebook_size=codebook_size)
        rng = np.random.default_rng(seed)
        self.codes = rng.standard_normal((levels, codebook_size, width)).astype(np.float32)
        self.heads = rng.standard_normal((levels, width, codebook_size)).astype(np.float32)
        self.users = functools.partial(self._users, rng, width)

    @staticmethod
    def _users(rng, width, users):
        return rng.standard_normal((users, width)).astype(np.float32)

    def apply(self, variables, *args, method):
        return getattr(self, method)(*args)

    def start(self, batch):
        return ToyCross(jnp.zeros(len(batch)), batch), ToyCache(batch[:, None])

    def decode_step(self, code, cross, cache, level):
        state = cache.state
        if level:
            state = jnp.tanh(state + jnp.asarray(self.codes)[level - 1, code])
        return state @ self.heads[level], ToyCache(state)

    def continuations(self, batch, prefixes):
        """log P of every next code: int `[B, n, l]` -> float64 `[B, n, V]`."""
        state = np.repeat(np.float64(batch)[:, None], prefixes.shape[1], axis=1)
        for level in range(prefixes.shape[2]):
            state = np.tanh(state + self.codes[level][prefixes[..., level]])
        logits = state @ np.float64(self.heads[prefixes.shape[2]])
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def logp(self, batch, sids):
        """log P of every code of IDs, int `[B, n, levels]` -> float64 `[B, n, levels]`."""
        found = [
            np.take_along_axis(
                self.continuations(batch, sids[..., :level]), sids[..., level, None], axis=-1
            )
            for level in range(sids.shape[2])
        ]
        return np.concatenate(found, axis=-1)

    def plain_search(self, batch, width, legal):
        """Beam search in plain Python: `[(ID, score), …]` of each user, best first.

        Args:
          legal: for each user a set of IDs, or None for all.
        """
        results = []
        for user, allowed in zip(batch, legal, strict=True):
            beams = [((), 0.0)]
            for level in range(self.spec.levels):
                found = []
                for prefix, score in beams:
                    known = np.array(prefix, int).reshape(1, 1, level)
                    logp = self.continuations(user[None], known)[0, 0]
                    found += [((*prefix, c), score + float(p)) for c, p in enumerate(logp)]
                if allowed is not None:
                    prefixes = {sid[: level + 1] for sid in allowed}
                    found = [beam for beam in found if beam[0] in prefixes]
                beams = sorted(found, key=lambda beam: -beam[1])[:width]
            results.append(beams)
        return results


@struct.dataclass
class ToyCross:
    length: jax.Array
    user: jax.Array


@struct.dataclass
class ToyCache:
    state: jax.Array

    def take(self, parent):
        return ToyCache(jnp.take_along_axis(self.state, parent[..., None], axis=1))


def full_dataset(seed=0, users=7, items=12, split="leave-one-out") -> Dataset:
    """A random data set with every column that the model knows, gaps and equal times included."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 14, users)
    n = int(lengths.sum())
    words = ["war", "love", "space", "dog", "sea", "war"]

    def holes(values, share=0.15):
        empty = rng.random(n) < share
        return [None if hole else value for value, hole in zip(values, empty, strict=True)]

    frame = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(users), lengths),
            "item_id": rng.integers(0, items, n),
            "time_s": 1_000_000 + rng.integers(0, 9, n) * 3_600,  # many ties
            "rating": pl.Series(holes(rng.choice([1.0, 3.5, 5.0], n).tolist()), dtype=pl.Float32),
            "playtime_s": pl.Series(holes((rng.random(n) * 90).tolist()), dtype=pl.Float32),
            "like": pl.Series(holes(rng.integers(0, 2, n).tolist()), dtype=pl.Int8),
            "click": pl.Series(rng.integers(0, 2, n).tolist(), dtype=pl.Int8),
        }
    )
    catalogue = pl.DataFrame(
        {
            "item_id": np.arange(items),
            "text": [" ".join(rng.choice(words, 3)) for _ in range(items)],
            "tags": pl.Series(
                [rng.choice(words[:5], rng.integers(0, 4)).tolist() for _ in range(items)],
                dtype=pl.List(pl.String),
            ),
            "author_id": pl.Series([None, *(f"a{i % 4}" for i in range(items - 1))]),
            "duration_s": pl.Series(
                [0.0, None, *(rng.random(items - 2) * 100).tolist()], dtype=pl.Float32
            ),
        }
    )
    people = pl.DataFrame(
        {
            "user_id": np.arange(users),
            "gender": pl.Series([None, *("fm"[i % 2] for i in range(users - 1))]),
            "age": [20 + 10 * (i % 3) for i in range(users)],
        }
    )
    meta = {"origin": "a test", "licence": "none"}
    return build_dataset("toy", catalogue, people, frame, meta=meta, split=split)


def logged(path) -> list[dict]:
    """Rows of a metrics.jsonl without the speed, in which no two runs agree."""
    rows = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "speed"} for row in rows]


def random_variables(model, *args, seed=0, **options):
    """Random weights in the shapes of `model.init`, without compiling it.

    Louder than real ones: norms scale, biases and positions count, routers tell experts apart.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        *_, layer, name = ("", *jax.tree_util.keystr(path, simple=True, separator="/").split("/"))
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if name == "scale":
            return 1 + 0.2 * noise
        if name == "bias":
            return 0.1 * noise
        if name == "position":
            return noise
        fan_in = leaf.shape[-3 if layer in ("q", "k", "v") else -2] if leaf.ndim > 1 else 1
        return noise * np.float32((3 if name == "router" else 1) / fan_in**0.5)

    init = jax.eval_shape(lambda key: model.init(key, *args, **options), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, nn.unbox(init))
