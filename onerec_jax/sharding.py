"""The device mesh, and which axis of it each logical axis lies on.

Modules name the axes of their parameters ("experts", "embed", …); the one table below maps those
names to mesh axes, and `jax.jit` with these shardings does the rest. What has to run device by
device (routing, and gathers that must not cross users) goes through `per_device`.

data     users; parameters whole on every device, optimizer state split (ZeRO-1)
fsdp     users; parameters split by the model width, embedding tables by rows
expert   users; each device holds its share of the experts of every layer
tensor   heads and hidden widths of every layer; users whole
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from onerec_jax.errors import InputError

AXES = ("data", "fsdp", "expert", "tensor")

RULES = (
    ("experts", "expert"),
    ("vocabulary", "fsdp"),  # before "embed": a table is split by rows
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("ff", "tensor"),
    ("codes", "tensor"),
    ("layers", None),
    ("kv", None),
)

USER_AXES = ("data", "fsdp", "expert")
BATCH = P(USER_AXES)
"""Users are split over all axes but `tensor`: outside the experts `expert` is more `data`."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh."""

    data: int = 0
    """Users are split over these devices; 0 takes all that the others leave."""
    fsdp: int = 1
    """Users and parameters are split over these devices."""
    expert: int = 1
    """Experts, and users, are split over these devices."""
    tensor: int = 1
    """Heads and hidden widths are split over these devices."""


def make_mesh(data: int = 0, expert: int = 1, *, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of AXES.

    Args:
      data: devices along `data`; 0 takes all that the others leave.
      expert, fsdp, tensor: devices along these axes.

    Raises:
      InputError: the mesh needs more devices than there are, or would leave some idle.
    """
    devices = jax.device_count()
    others = {"fsdp": fsdp, "expert": expert, "tensor": tensor}
    for name, size in {"data": data + 1, **others}.items():
        if size < 1:
            least = 0 if name == "data" else 1
            given = data if name == "data" else size
            raise InputError(f"--mesh.{name} {given} must be at least {least}")
    rest = math.prod(others.values())
    data = data or max(devices // rest, 1)
    asked = " x ".join(f"--mesh.{k} {v}" for k, v in ({"data": data} | others).items() if v > 1)
    if data * rest > devices:
        raise InputError(
            f"{asked} needs {data * rest} devices, there are {devices}: lower one of them"
        )
    if jax.process_count() > 1 and data * rest < devices:
        raise InputError(
            f"{asked or '--mesh.data 1'} leaves {devices - data * rest} of {devices} devices idle, "
            "some of them a whole process's: use all"
        )
    # Explicit axes, make_mesh's default, would ask for annotations at every gather and top_k.
    return jax.make_mesh(
        (data, fsdp, expert, tensor),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=jax.devices()[: data * rest],
    )


def local_mesh() -> Mesh:
    """The first device of this process alone, as a mesh."""
    shape = (1,) * len(AXES)
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.local_devices()[:1]
    )


def check_mesh(mesh: Mesh, cfg, *, batch_size: int, accumulate: int = 1) -> None:
    """Refuses what does not divide over the mesh: users, experts, heads, widths.

    Args:
      cfg: `ModelConfig`.
      batch_size: users of a step, over all devices.
      accumulate: parts of a step.

    Raises:
      InputError: with the flag to change.
    """
    users = math.prod(mesh.shape[axis] for axis in USER_AXES) * accumulate
    if batch_size < 1 or batch_size % users:
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        raise InputError(
            f"--train.batch-size {batch_size} is no positive multiple of the {users} shares that "
            f"the mesh splits it into{parts}: use {max(batch_size // users, 1) * users}"
        )
    for axis, flags in (
        ("expert", {"num-experts": cfg.num_experts}),
        ("tensor", {"num-heads": cfg.num_heads, "ff-dim": cfg.ff_dim}),
        ("tensor", {"expert-dim": cfg.expert_dim if cfg.num_experts else 0}),
        ("fsdp", {"d-model": cfg.d_model}),
    ):
        for flag, size in flags.items():
            if size % mesh.shape[axis]:
                raise InputError(
                    f"--mesh.{axis} {mesh.shape[axis]} does not divide --model.{flag} {size}: "
                    "change one of them"
                )


def shardings_of(boxed, mesh: Mesh):
    """Shardings of a tree whose leaves carry logical axis names (`nn.Partitioned`).

    An axis that does not divide a dimension (a vocabulary of odd size) leaves it whole.
    """
    named = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)

    def whole_where_odd(sharding, leaf):
        spec = [
            axis if axis is None or size % mesh.shape[axis] == 0 else None
            for axis, size in zip(sharding.spec, leaf.shape, strict=False)
        ]
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(whole_where_odd, named, nn.unbox(boxed))


def split_over_data(shardings, tree, mesh: Mesh):
    """The same shardings with one free dimension more split over `data` (ZeRO-1).

    For optimizer state: each device then updates its share, and what it updated is gathered. It is
    the first dimension that divides, for then a share is in one piece; but not that of the layers
    if it can be helped, for the gradients of one layer are summed while those of the next are
    computed.

    Args:
      shardings: of `tree`, whose leaves have shapes.
    """
    data = mesh.shape["data"]

    def split(sharding, leaf):
        spec = [*sharding.spec, *(None,) * (leaf.ndim - len(sharding.spec))]
        free = [
            i
            for i, axis in enumerate(spec)
            if (axis is None or mesh.shape[axis] == 1) and leaf.shape[i] % data == 0
        ]
        if data > 1 and free:
            layers = leaf.ndim > 2 and len(free) > 1 and free[0] == 0
            spec[free[1] if layers else free[0]] = "data"
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(split, shardings, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put_batch(batch, mesh: Mesh):
    """NumPy arrays of this process, `[B / processes, ...]`, to global arrays split over users."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def deal(tree, parts: int):
    """Leaves `[B, ...]` to `[parts, B / parts, ...]`: users in turn, so that every device keeps its
    own."""
    return jax.tree.map(
        lambda x: x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree
    )


def collect(tree):
    """What `deal` has dealt, back in order: `[parts, B / parts, ...]` to `[B, ...]`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def on_mesh(function, mesh: Mesh):
    """The function with the mesh as its context, in which `per_device` splits work."""

    def call(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    # The compiled program, and its traces and dumps, are called after the function.
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    call.__name__ = call.__qualname__ = inner.__name__
    return call


def per_device(function, in_specs, out_specs):
    """The function on every device's own part of its arguments, under the mesh of `on_mesh`.

    Without a mesh around, or on a mesh of one device, it is the function itself. Inside, the
    function may use collectives over mesh axes if `sharded()`.
    """
    if not sharded():
        return function
    mesh = jax.sharding.get_abstract_mesh()
    # Types of varying axes are off: with them, indices of a sort count as equal on all devices and
    # gradients come out wrong (design notes, trap 1).
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def sharded() -> bool:
    """Whether a mesh of several devices, made by `make_mesh`, is the context."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and mesh.axis_names == AXES
