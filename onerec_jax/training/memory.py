"""Memory of a training step on one device, before anything is allocated.

The state is counted exactly, from the shapes and shardings of its leaves. Activations are an
estimate: what the backward pass keeps of every block, in the compute type.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh

from onerec_jax.config import ModelConfig
from onerec_jax.errors import InputError
from onerec_jax.inputs import FeatureSpec
from onerec_jax.models.dropless import COMMON_LOAD
from onerec_jax.models.onerec import OneRec
from onerec_jax.sharding import AXES, USER_AXES, MeshConfig, shardings_of, split_over_data
from onerec_jax.training.flops import abstract_batch, decoder_positions, feature_width
from onerec_jax.training.step import init_state


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: int
    """Master weights, float32, and the routers' biases."""
    optimizer: int
    gradients: int
    """As large as the parameters, float32."""
    activations: int
    copies: int = 0
    """Of the parameters in the compute type, where several parts share them."""

    @property
    def state(self) -> int:
        """What lies there between steps."""
        return self.parameters + self.optimizer

    @property
    def total(self) -> int:
        return self.state + self.gradients + self.activations + self.copies


def step_memory(
    cfg: ModelConfig,
    spec: FeatureSpec,
    tx,
    mesh: MeshConfig,
    *,
    users: int,
    targets: int | None = None,
    accumulate: int = 1,
) -> Memory:
    """Memory of one device of a mesh, which need not exist here.

    Args:
      tx: optimizer.
      users: of a step, over all devices.
      targets: of a user, as `forward_flops`.
      accumulate: parts of a step.
    """
    sizes = dataclasses.asdict(mesh) | {"data": mesh.data or 1}
    shape = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
    model = OneRec(cfg, spec, train=True)
    init = functools.partial(init_state, model=model, tx=tx)
    boxed = jax.eval_shape(init, jax.random.key(0), abstract_batch(cfg, spec))
    state, shardings = nn.unbox(boxed), shardings_of(boxed, shape)
    optimizer = split_over_data(shardings.opt_state, state.opt_state, shape)

    def held(tree, where):
        leaves = jax.tree.map(
            lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, where
        )
        return sum(jax.tree.leaves(leaves))

    parameters = held(state.params, shardings.params)
    here = users / accumulate / math.prod(sizes[axis] for axis in USER_AXES)
    return Memory(
        parameters + held(state.router, shardings.router),
        held(state.opt_state, optimizer),
        parameters,
        int(here * user_activations(cfg, spec, targets=targets) / sizes["tensor"]),
    )


def policy_memory(
    cfg: ModelConfig,
    spec: FeatureSpec,
    tx,
    mesh: MeshConfig,
    *,
    users: int,
    accumulate: int = 1,
    rollout_users: int,
    group: int,
    parts: int = 1,
) -> Memory:
    """Memory of a joint step of post-training; other arguments as `step_memory`.

    The policy that draws lies beside the one that learns. Of gradients there are two at a time:
    those of the groups, the sum so far or all of them, and those that a part or fine-tuning is
    making. Activations are of the larger of both; uneven loads of experts take time and no more
    memory. XLA's own plans are in docs/performance.md, "Post-training".

    Args:
      rollout_users: users with rollouts, over all devices, in `parts`.
      group: items drawn for each.
    """
    tuned = step_memory(cfg, spec, tx, mesh, users=users, accumulate=accumulate)
    groups = dataclasses.replace(cfg, capacity_factor=COMMON_LOAD)
    drawn = step_memory(
        groups, spec, tx, mesh, users=rollout_users, targets=group, accumulate=parts
    )
    return Memory(
        2 * drawn.parameters,
        drawn.optimizer,
        2 * drawn.gradients,
        max(tuned.activations, drawn.activations),
        0 if cfg.compute_dtype == "float32" else drawn.gradients // 2,
    )


def user_activations(cfg: ModelConfig, spec: FeatureSpec, *, targets: int | None = None) -> int:
    """Bytes that the backward pass needs of one user with full histories; `targets` as
    `forward_flops`."""
    targets = cfg.session_items if targets is None else targets
    d, f = cfg.d_model, cfg.ff_dim
    width = feature_width(cfg, spec)
    lifelong = cfg.slots("lifelong")
    history = cfg.slots("short") + cfg.slots("positive") + lifelong
    tokens, codes = cfg.encoder_length, targets * spec.levels
    pathways = history * (width + 2 * cfg.pathway_dim + d)  # features, hidden twice, output
    qformer = lifelong * d * (1 + 2 * cfg.lifelong_blocks)  # normed input, keys and values
    qformer += cfg.lifelong_queries * cfg.lifelong_blocks * (8 * d + 2 * f) * (lifelong > 0)
    # Inputs of both norms and both normed ones, query, key, value, result; hidden twice.
    dense, attention = 2 * f, 8 * d
    # Rows of all experts together, for a token; without a limit every expert has one.
    rows = cfg.experts_per_token * cfg.capacity_factor or cfg.num_experts
    experts = rows * (2 * d + 3 * cfg.expert_dim)

    def stack(name, layers, tokens, more):
        with_experts = cfg.expert_layers(name)
        hidden = with_experts * experts + (layers - with_experts) * dense
        kept = layers * (attention + more) + hidden
        return tokens * (layers * d + kept / layers if cfg.remat and layers else kept)

    encoder = stack("encoder", cfg.encoder_layers, tokens, 0)
    positions, _ = decoder_positions(cfg, spec, targets)
    decoder = stack("decoder", cfg.decoder_layers, positions, 4 * d)
    decoder += cfg.decoder_layers * tokens * 2 * d  # keys and values of the encoder's tokens
    itemsize = 4 if cfg.compute_dtype == "float32" else 2  # "auto": as on an accelerator
    logits = 2 * codes * spec.codebook_size * 4 / itemsize
    return int(itemsize * (pathways + qformer + encoder + decoder + logits))


def device_limit() -> int | None:
    """Bytes that the first device here has for us; None on CPUs, which do not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def check_fits(memory: Memory, limit: int) -> None:
    """Refuses a state that cannot lie on a device.

    Args:
      limit: bytes that the device has for us.

    Raises:
      InputError: with what is missing, and the flags that help.
    """
    need = memory.state + memory.gradients
    if need > limit:
        raise InputError(
            f"parameters, optimizer and gradients take {need / 2**30:.1f} GiB a device, "
            f"{(need - limit) / 2**30:.1f} GiB more than it has: split them with --mesh.fsdp or "
            "--mesh.expert, or choose a smaller --preset"
        )
