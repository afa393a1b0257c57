"""A step of post-training on one device, part by part: `python -m benchmarks.posttrain`.

Draw, find items, judge, update, as `posttraining.trainer` turns them, on random users and items
under a law of popularity. Parts are timed one by one, each waited for; whole steps are timed
without waiting in between. Useful FLOPs are those of the search, of scoring and of both gradients
(`training/flops.py`, `training/reward_flops.py`): the sampler's log-probabilities, by teacher
forcing of what the search has just been through, count as a repetition, and padding, experts' spare
rows and recomputation not at all.

An untrained policy draws hardly an ID that exists. Here an ID that no item has stands for some item
all the same: there would be nothing to judge, and gradients of zeros are fast. Experts are balanced
first, as loss-free balancing leaves a trained model.

    python -m benchmarks.posttrain --users 128 --rollout.group 512 --rollout.parts 4
    python -m benchmarks.posttrain --preset tiny --users 4 --rollout.group 16 --items 2000 \
        --codebook-size 64 --steps 2
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shlex
import sys
import time
import types
from typing import Literal

import flax.linen as nn
import jax
import numpy as np
import polars as pl

from benchmarks import results
from benchmarks.generate import balance
from benchmarks.random_data import large_spec, lengths_of, popular, random_users
from onerec_jax.config import PRESETS, ModelConfig
from onerec_jax.data.exposures import RewardBatchBuilder
from onerec_jax.data.features import ActionLog, ItemFeatures
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.evaluation.ranking import tie_order
from onerec_jax.generation.beam import beam_search
from onerec_jax.generation.rollout import RolloutConfig, draw_ids
from onerec_jax.inputs import TIME_BUCKETS
from onerec_jax.losses.ecpo import PolicyConfig
from onerec_jax.models.onerec import OneRec
from onerec_jax.models.reward import PScore, RewardConfig
from onerec_jax.posttraining.step import (
    FormatConfig,
    LossWeights,
    ObjectiveConfig,
    PolicyBatch,
    init_policy_state,
    policy_step,
)
from onerec_jax.posttraining.trainer import PolicyTrainer, Rewarder
from onerec_jax.reward_run import Scorer
from onerec_jax.sharding import MeshConfig, make_mesh, put_batch
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.training.flops import forward_flops, generation_flops, train_flops
from onerec_jax.training.memory import Memory, policy_memory
from onerec_jax.training.optimizer import OptimizerConfig, make_optimizer
from onerec_jax.training.profile import ONE_BY_ONE, by_part, kernels, peak_flops
from onerec_jax.training.reward_flops import score_flops
from onerec_jax.training.step import Trainer

OBJECTIVES = ("click", "like", "follow", "comment", "forward", "long_view", "profile_enter", "vtr")


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Time the parts of a post-training step."""

    preset: str = "v1-0.935b"
    model: ModelConfig = PRESETS["v1-0.935b"]
    users: int = 128
    """With rollouts."""
    tuned_users: int = 128
    """Of supervised fine-tuning, in the same step."""
    accumulate: int = 1
    """Parts of supervised fine-tuning."""
    rollout: RolloutConfig = RolloutConfig(group=512, parts=4)
    reward: RewardConfig = RewardConfig()
    content: int = 128
    """Width of the codebooks' vectors, which the reward reads."""
    lengths: Literal["full", "realistic"] = "full"
    """Of the histories; see benchmarks/random_data.py."""
    items: int = 200_000
    authors: int = 50_000
    codebook_size: int = 8192
    balancing_steps: int = 60
    warmup: int = 2
    steps: int = 5
    """Timed, once part by part and once whole."""
    profile: pathlib.Path | None = None
    """Folder for a trace of three further updates; their parts are printed."""
    out: pathlib.Path = pathlib.Path("runs/benchmarks/posttrain.json")
    """JSON to write; further results are appended to its list."""

    def __post_init__(self):
        names = ("users", "tuned_users", "accumulate", "content", "items", "authors", "steps")
        require_at_least(self, "", **dict.fromkeys((*names, "codebook_size"), 1), warmup=1)
        for name, parts in (("users", self.rollout.parts), ("tuned_users", self.accumulate)):
            if getattr(self, name) % parts:
                raise InputError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} cannot be cut into {parts} "
                    "equal parts: choose a multiple"
                )


class Clock:
    """Seconds spent under each name, one entry a time."""

    def __init__(self):
        self.spent: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def __call__(self, name: str):
        start = time.perf_counter()
        yield
        self.spent.setdefault(name, []).append(time.perf_counter() - start)

    def median(self, name: str) -> float:
        return float(np.median(self.spent[name]))


# ------------------------------------------------------------------------------------ random data


def random_log(config: BenchmarkConfig, spec, rng) -> ActionLog:
    """So many actions of each user as the reward reads, one more for the request."""
    users, actions = config.users, config.reward.history_length + 1
    shape = (users, actions)
    return ActionLog(
        offsets=np.arange(users + 1, dtype=np.int64) * actions,
        item=popular(rng, config.items, shape).ravel(),
        positive_rows=np.arange(0, users * actions, 3),
        time_s=(1_600_000_000 + np.cumsum(rng.integers(1, 9_000, shape), axis=1)).ravel(),
        playtime=rng.integers(1, TIME_BUCKETS, users * actions).astype(np.uint8),
        label=rng.integers(0, 2, (users * actions, len(spec.labels))).astype(np.uint8),
        static=rng.integers(1, 65_537, (users, len(spec.static))).astype(np.int32),
    )


def random_scorer(config: BenchmarkConfig, spec, ids: SemanticIds, rng) -> Scorer:
    """An untrained P-Score over random histories."""
    spec = dataclasses.replace(spec, clustered=False)
    tags = 1 + popular(rng, len(spec.tags), (config.items, spec.tags_per_item))
    author = 1 + popular(rng, config.authors, config.items)
    duration = rng.integers(1, TIME_BUCKETS, config.items).astype(np.int32)
    features = ItemFeatures(ids.sids, tags, author, duration)
    known = np.ones(config.items, bool)
    builder = RewardBatchBuilder(random_log(config, spec, rng), features, config.reward, known)
    model = PScore(config.reward, spec, OBJECTIVES, ids.codebooks)
    one = np.zeros(1, np.int32)
    batch = builder.candidates(one, one, np.zeros((1, 1), np.int32))
    variables = jax.jit(lambda key: nn.unbox(model.init(key, batch)))(jax.random.key(1))
    return Scorer(model, variables, builder, config.users, OBJECTIVES)


class ForgivingIds(SemanticIds):
    """Semantic IDs under which every ID is some item's."""

    def find(self, sids):
        """As of `SemanticIds`; of an ID that no item has, the leaf that its codes are hashed to."""
        leaf, place = super().find(sids), np.zeros(sids.shape[:-1], np.int64)
        for level in range(sids.shape[-1]):
            place = (place + sids[..., level]) * 2_654_435_761 % 2**31
        return np.where(leaf < 0, place % len(self.leaf_sids), leaf)


def random_run(config: BenchmarkConfig, spec, rng):
    """As much of a run as drawing and judging look at."""
    sids = popular(rng, config.codebook_size, (config.items, spec.levels))
    shape = (spec.levels, config.codebook_size, config.content)
    ids = ForgivingIds(sids, rng.standard_normal(shape).astype(np.float32), {})
    return types.SimpleNamespace(
        model=lambda: OneRec(config.model, spec),
        ids=ids,
        tie_order=tie_order(np.bincount(popular(rng, config.items, 10**6), minlength=config.items)),
        dataset=types.SimpleNamespace(items={"item_id": pl.Series(np.arange(config.items))}),
    )


@dataclasses.dataclass(frozen=True)
class Judge:
    """A scorer whose halves are timed."""

    scorer: Scorer
    clock: Clock

    def __call__(self, examples, item_rows):
        with self.clock("features of items to be scored"):
            batch = self.scorer.builder.candidates(examples.user, examples.position, item_rows)
        with self.clock("scoring, to the device and back"):
            found = jax.device_get(self.scorer._apply(self.scorer.variables, batch))
        return {"p": found[..., 0]}


# ------------------------------------------------------------------------------------------ parts


def one_by_one(policy: PolicyTrainer, state, batch: PolicyBatch, search, clock: Clock):
    """A step as `PolicyTrainer.step`, every part waited for."""
    done = jax.block_until_ready
    with clock("search"):
        done(search(state.sampler, batch.rl))
    with clock("search and log-probabilities"):
        drawn_here = done(policy.draw(state.step, state.sampler, batch.rl, batch.user))
    with clock("draws to the host"):
        drawn, user, position = jax.device_get((drawn_here, batch.user, batch.position))
    with clock("judging"):
        _, parts, _ = policy.rewarder(user, position, drawn)
    with clock("rewards to the device"):
        parts = done(put_batch(parts, policy.mesh))
    batch = batch.replace(sid=drawn_here.sid, logp=drawn_here.logp, alive=drawn_here.alive, **parts)
    with clock("update"):
        state, metrics = done(policy.update(state, batch))
    return state, batch, metrics


def milliseconds(clock: Clock) -> dict[str, float]:
    """Of the parts of a step, in the order in which they come."""
    spent = {name: 1e3 * clock.median(name) for name in clock.spent}
    spent["log-probabilities"] = spent.pop("search and log-probabilities") - spent["search"]
    features, scoring = "features of items to be scored", "scoring, to the device and back"
    spent["finding items"] = spent.pop("judging") - spent[features] - spent[scoring]
    order = ("search", "log-probabilities", "draws to the host", "finding items", features, scoring)
    return {name: spent[name] for name in (*order, "rewards to the device", "update")}


def useful_flops(config: BenchmarkConfig, spec) -> dict[str, dict[str, float]]:
    """By part of the step, what is useful and what repeats."""
    cfg, draw = config.model, config.rollout
    lengths = lengths_of(config.lengths, cfg, config.users, np.random.default_rng(0))
    tuned = lengths_of(config.lengths, cfg, config.tuned_users, np.random.default_rng(0))

    def total(parts):
        return float(sum(np.sum(part) for part in parts.values()))

    search = generation_flops(cfg, spec, draw.group, lengths, independent=draw.method == "sample")
    forced = total(forward_flops(cfg, spec, draw.group, lengths))
    score = score_flops(
        config.reward,
        spec,
        objectives=len(OBJECTIVES),
        content=config.content,
        history=np.full(config.users, config.reward.history_length),
        items=draw.group,
    )
    score = {name: np.broadcast_to(part, config.users) for name, part in score.items()}
    return {
        "useful": {
            "search": total(search),
            "scoring, to the device and back": total(score),
            "update": 3 * forced + float(np.sum(train_flops(cfg, spec, 1, tuned))),
        },
        "repeated": {"log-probabilities": forced},
    }


def table(spent: dict[str, float], flops: dict, peak: float | None) -> list[str]:
    """Lines: part, milliseconds, share of their sum, GFLOP, share of the peak."""
    every = {**flops["useful"], **flops["repeated"]}
    lines, total = [], sum(spent.values())
    for name, part in spent.items():
        line = f"{part:10.2f} ms {part / total:6.1%}  {name:<32}"
        if name in every:
            line += f"{every[name] / 1e9:12,.1f} GFLOP"
            if peak:
                line += f" {every[name] / part * 1e3 / peak:6.1%} of the peak"
            line += " (repeated)" if name in flops["repeated"] else ""
        lines.append(line)
    return lines


# ------------------------------------------------------------------------------------------- main


def make_trainer(config: BenchmarkConfig, spec, mesh, example) -> Trainer:
    """The joint step on a mesh; `example` is any batch of supervised fine-tuning."""
    objective = ObjectiveConfig(
        PolicyConfig(),
        LossWeights(),
        FormatConfig(k=min(5, config.rollout.group)),
        config.rollout.group,
        config.rollout.refresh_every,
        config.rollout.parts,
    )
    return Trainer(
        OneRec(config.model, spec, train=True),
        make_optimizer(OptimizerConfig(learning_rate=1e-6), 10_000),
        mesh,
        example,
        seed=0,
        step=policy_step,
        init=init_policy_state,
        cfg=objective,
        accumulate=config.accumulate,
    )


def make_policy(config: BenchmarkConfig, spec, clock: Clock):
    """The trainer, its first state with balanced experts, and a batch on the device."""
    cfg, rng = config.model, np.random.default_rng(0)
    mesh = make_mesh(data=1)
    sft, rl = (
        random_users(cfg, spec, users, lengths=config.lengths, seed=0)
        for users in (config.tuned_users, config.users)
    )
    trainer = make_trainer(config, spec, mesh, jax.tree.map(lambda x: x[:1], sft))
    run = random_run(config, spec, rng)
    judge = Judge(random_scorer(config, spec, run.ids, rng), clock)

    def start(abstract):
        del abstract
        one = jax.tree.map(lambda x: x[:1], rl)
        init = jax.jit(lambda key: nn.unbox(OneRec(cfg, spec).init(key, one)))
        variables = init(jax.random.key(0))
        variables = {name: variables.get(name, {}) for name in ("params", "router")}
        some = jax.device_put(jax.tree.map(lambda x: x[:16], rl))
        search = functools.partial(beam_search, width=config.rollout.group)
        return balance(OneRec(cfg, spec), variables, some, search, config.balancing_steps)[0]

    policy = PolicyTrainer(
        trainer,
        start,
        run,
        Rewarder(run, judge, {"p": 1.0}),
        config.rollout,
        seed=0,
        record=lambda *_: None,
    )
    user = np.arange(config.users, dtype=np.int32)
    position = np.full(config.users, config.reward.history_length, np.int32)
    batch = put_batch(PolicyBatch(sft, rl, user, position), mesh)
    return policy, policy.init(0), batch


def needed_memory(config: BenchmarkConfig, spec) -> Memory:
    """The estimate for an update."""
    return policy_memory(
        config.model,
        spec,
        make_optimizer(OptimizerConfig(), 100),
        MeshConfig(data=1),
        users=config.tuned_users,
        accumulate=config.accumulate,
        rollout_users=config.users,
        group=config.rollout.group,
        parts=config.rollout.parts,
    )


def main(config: BenchmarkConfig) -> None:
    """Make random data and models, measure, print, write."""
    if config.profile is not None:  # before JAX starts its backend
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_BY_ONE}"
    spec = large_spec(
        items=config.items, authors=config.authors, tags=500, codebook_size=config.codebook_size
    )
    clock = Clock()
    needed = needed_memory(config, spec)
    print(
        f"an update needs about {needed.total / 2**30:.1f} GiB: state {needed.state / 2**30:.1f}, "
        f"gradients {needed.gradients / 2**30:.1f}, activations "
        f"{needed.activations / 2**30:.1f} of a part, copies {needed.copies / 2**30:.1f}",
        flush=True,
    )
    policy, state, batch = make_policy(config, spec, clock)
    keys = jax.random.split(jax.random.key(0), config.users)
    draw = functools.partial(draw_ids, OneRec(config.model, spec), cfg=config.rollout)
    search = jax.jit(lambda variables, batch: draw(variables, batch, keys))
    for _ in range(config.warmup):
        state, full, metrics = one_by_one(policy, state, batch, search, clock)
    clock.spent.clear()
    for _ in range(config.steps):
        state, full, metrics = one_by_one(policy, state, batch, search, clock)
    spent = milliseconds(clock)
    start = time.perf_counter()
    for _ in range(config.steps):
        state, metrics = policy.step(state, batch)
    jax.block_until_ready(state)
    step_s = (time.perf_counter() - start) / config.steps

    device = jax.devices()[0]
    peak, flops = peak_flops(device), useful_flops(config, spec)
    useful = sum(flops["useful"].values())
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.posttrain", *sys.argv[1:]]),
        "device": device.device_kind,
        "jax": jax.__version__,
        "settings": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "parameters": parameters,
        "step_s": step_s,
        "parts_ms": spent,
        "flops": flops,
        "useful_tflops": useful / step_s / 1e12,
        "mfu": useful / step_s / peak if peak else None,
        "peak_gib": memory,
        "estimated_gib": needed.total / 2**30,
        "valid": float(metrics["valid"]),
        "grad_norm_policy": float(metrics["grad_norm_policy"]),
    }
    if config.profile is not None:
        result["update_parts_ms"] = profile(config, policy, state, full)
    for line in table(spent, flops, peak):
        print(line)
    print(
        f"{config.preset} on {device.device_kind}, {parameters / 1e9:.3f} B parameters, "
        f"{config.users} users x {config.rollout.group} items ({config.rollout.method}): "
        f"{1e3 * step_s:.1f} ms a step, {result['useful_tflops']:.1f} useful TFLOP/s"
        + (f", {result['mfu']:.1%} of the peak" if peak else "")
        + f", peak {memory:.1f} GiB",
        flush=True,
    )
    results.append(config.out, result)


def profile(config: BenchmarkConfig, policy: PolicyTrainer, state, batch) -> dict[str, float]:
    """Milliseconds of an update by module, printed."""
    update = policy.update.lower(state, batch).compile()
    with jax.profiler.trace(str(config.profile)):
        for _ in range(3):
            state, metrics = update(state, batch)
        jax.block_until_ready(metrics)
    spent = by_part(kernels(config.profile, update.as_text(), steps=3))
    for name, part in spent.items():
        print(f"{part:10.2f} ms  update: {name}")
    return spent


if __name__ == "__main__":
    results.run_with_preset(main, BenchmarkConfig, prog="python -m benchmarks.posttrain")
