"""The joint step of post-training: next-token prediction and policy optimisation in one update.

`L = w_ntp L_NTP(RSFT users) + w_preference L_ECPO(preference) + w_format L_ECPO(format)`, OneRec
Technical Report (arXiv 2506.13695), section 2.4. The report prints no weights. There is no KL term:
the first loss is what keeps the policy where it is.

Axes: B users of supervised fine-tuning, R of them with rollouts, G items of a group, S levels.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct

from onerec_jax.errors import InputError, require_at_least
from onerec_jax.generation.rollout import policy_log_probs
from onerec_jax.inputs import Batch
from onerec_jax.losses.ecpo import PolicyConfig, policy_loss
from onerec_jax.models.onerec import OneRec
from onerec_jax.rewards.advantage import group_advantages
from onerec_jax.rewards.format import format_advantages
from onerec_jax.rewards.industrial import IndustrialConfig, flagged_share, industrial_rewards
from onerec_jax.sharding import collect, deal
from onerec_jax.training.step import TrainState, init_state, ntp_gradients, update


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Of the three losses; the report prints none."""

    ntp: float = 1.0
    """0 takes away what holds the policy (there is no KL term): an ablation."""
    preference: float = 1.0
    format: float = 1.0

    def __post_init__(self):
        require_at_least(self, "weights.", ntp=0, preference=0, format=0)


@dataclasses.dataclass(frozen=True)
class FormatConfig:
    """Which items the format reward pushes up."""

    k: int = 5
    """Items chosen of each group (5 of 128 in the report); 0: no format reward."""
    choose: Literal["random", "top"] = "random"
    """top: the K most probable, the report's ablation."""

    def __post_init__(self):
        require_at_least(self, "format.", k=0)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """All that a joint step is a function of, beside state and batch."""

    policy: PolicyConfig
    weights: LossWeights
    format: FormatConfig
    group: int
    refresh_every: int
    parts: int = 1
    """Of the users with rollouts, one after the other; see `RolloutConfig`."""
    industrial: IndustrialConfig | None = None

    def __post_init__(self):
        if self.format.k > self.group:
            raise InputError(
                f"--format.k {self.format.k} items of groups of {self.group}: lower it, or raise "
                "--rollout.group"
            )


@struct.dataclass
class PolicyBatch:
    """B users of supervised fine-tuning, and the groups of R of them."""

    sft: Batch
    rl: Batch  # R users; `target` is not read
    user: jax.Array  # int32 [R], user row
    position: jax.Array  # int32 [R], of the request within the user
    sid: jax.Array | None = None  # int32 [R, G, S], as drawn; the rest is known then
    logp: jax.Array | None = None  # float32 [R, G, S], of the policy that drew
    alive: jax.Array | None = None  # bool [R, G]
    reward: jax.Array | None = None  # float32 [R, G]
    first: jax.Array | None = None  # bool [R, G], legal and not drawn before in its group
    flagged: jax.Array | None = None  # bool [R, G], of the industrial reward


def init_policy_state(key, batch: Batch, *, model: OneRec, tx) -> TrainState:
    """Fresh state whose sampler is the policy itself; for its shapes, above all."""
    state = init_state(key, batch, model=model, tx=tx)
    return state.replace(sampler=state.variables)


def policy_step(
    state: TrainState,
    batch: PolicyBatch,
    *,
    model: OneRec,
    tx,
    seed: int,
    cfg: ObjectiveConfig,
    accumulate: int = 1,
):
    """One AdamW step on the three losses; the sampler becomes the new policy when it is time.

    Groups go through the model as in sampling (dropless experts, no dropout), so that the ratio
    compares parameters and nothing else; only the users of supervised fine-tuning move the
    routers' bias.

    Returns:
      The next state, and the metrics of `train_step` (of the NTP loss; `grad_norm` of the sum) with
      `loss_preference`, `loss_format`, `grad_norm_policy` (of their weighted sum), `entropy` `[S]`
      (nats, of the present policy, over all items drawn), the statistics of `policy_loss` on the
      preference groups, and with flagged items `flagged` (their share of the items that count).
    """
    policy = model.clone(train=False)
    ntp, level, stats = ntp_gradients(state, batch.sft, model, seed=seed, accumulate=accumulate)
    weights, reward, metrics = cfg.weights, batch.reward, {}
    if batch.flagged is not None:
        metrics["flagged"] = flagged_share(batch.flagged, batch.first)
        reward = industrial_rewards(reward, batch.flagged, metrics["flagged"], cfg.industrial)
    groups = {"preference": group_advantages(reward, batch.first)}
    if cfg.format.k:
        # A key of its own: that of the state's step alone is dropout's.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), 1)
        groups["format"] = format_advantages(
            key,
            batch.first,
            cfg.format.k,
            choose=cfg.format.choose,
            logp_bg=jnp.where(batch.alive, batch.logp.sum(-1), -jnp.inf),
        )

    count = {name: counts.sum() for name, (_, counts) in groups.items()}

    def loss_fn(params, part):
        rl, sid, old, groups = part
        logp, entropy = policy_log_probs(
            policy, {"params": params, "router": state.router}, rl, sid
        )
        total = 0.0
        for name, group in groups.items():
            loss, _ = policy_loss(logp, old, *group, cfg.policy, count=count[name])
            total += getattr(weights, name) * loss
        return total, (logp, entropy)

    drawn = batch.rl, batch.sid, batch.logp, groups
    grads, (logp, entropy) = _in_parts(jax.grad(loss_fn, has_aux=True), state.params, drawn, cfg)
    found = {}
    for name, group in groups.items():
        found[f"loss_{name}"], statistics = policy_loss(logp, batch.logp, *group, cfg.policy)
        if name == "preference":
            found |= statistics
    found["entropy"] = jnp.mean(entropy, axis=(0, 1), where=batch.alive[..., None])
    metrics |= found | {"grad_norm_policy": optax.tree.norm(grads)}
    grads = jax.tree.map(lambda a, b: weights.ntp * a + b, ntp, grads)
    state, of_ntp = update(state, grads, level, stats, model, tx)
    return refresh_sampler(state, cfg.refresh_every), of_ntp | metrics


def refresh_sampler(state: TrainState, every: int) -> TrainState:
    """After `every` steps the sampler becomes the present policy; 0: never."""
    if not every:
        return state
    now = state.step % every == 0
    sampler = jax.lax.cond(now, lambda: state.variables, lambda: state.sampler)
    return state.replace(sampler=sampler)


def _in_parts(gradient, params, batch, cfg: ObjectiveConfig):
    """Sum of the gradients of a batch's parts, and what each gives beside them, in order of users.

    Nothing is computed twice: the objective of an item reads the others only by their number.
    """
    if cfg.parts == 1:
        return gradient(params, batch)

    def add(total, part):
        grads, found = gradient(params, part)
        return jax.tree.map(jnp.add, total, grads), found

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, found = jax.lax.scan(add, zeros, deal(batch, cfg.parts))
    return total, collect(found)
