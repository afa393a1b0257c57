"""The device mesh, and which axis of it each logical axis lies on.

Modules name the axes of their parameters ("experts", "embed", …); the one table below maps those
names to mesh axes. `jax.jit` with these shardings does the rest.
"""

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from onerec_jax.errors import InputError

RULES = (
    ("experts", "expert"),  # each device of the expert axis holds its share of every layer
    ("layers", None),
    ("embed", None),
    ("heads", None),
    ("kv", None),
    ("ff", None),
    ("vocabulary", None),
)

BATCH = P(("data", "expert"))
"""Users are split over both axes: outside the experts the expert axis works as more data axis."""


def make_mesh(data: int = 0, expert: int = 1) -> Mesh:
    """A mesh with axes `data` and `expert`.

    Args:
      data: devices along `data`; 0 takes all that `expert` leaves.
      expert: devices along `expert`.

    Raises:
      InputError: the mesh needs more devices than there are.
    """
    devices = jax.device_count()
    if data < 0 or expert < 1:
        raise InputError(f"--mesh.data {data} and --mesh.expert {expert} must be at least 0 and 1")
    data = data or max(devices // expert, 1)
    if data * expert > devices:
        raise InputError(
            f"--mesh.data {data} x --mesh.expert {expert} needs {data * expert} devices, "
            f"this machine has {devices}: lower one of them"
        )
    # Explicit axes, make_mesh's default, would ask for annotations at every gather and top_k.
    return jax.make_mesh(
        (data, expert),
        ("data", "expert"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: data * expert],
    )


def check_mesh(mesh: Mesh, *, batch_size: int, num_experts: int) -> None:
    """Refuses a batch or a number of experts that does not divide over the mesh.

    Raises:
      InputError: with the flag to change.
    """
    devices, expert = mesh.devices.size, mesh.shape["expert"]
    if batch_size < 1 or batch_size % devices:
        raise InputError(
            f"--train.batch-size {batch_size} is no positive multiple of the {devices} devices of "
            f"the mesh: use {max(batch_size // devices, 1) * devices}"
        )
    if num_experts % expert:
        raise InputError(
            f"--mesh.expert {expert} does not divide --model.num-experts {num_experts}: "
            "change one of them"
        )


def shardings_of(boxed, mesh: Mesh):
    """Shardings of a tree whose leaves carry logical axis names (`nn.Partitioned`)."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put_batch(batch, mesh: Mesh):
    """NumPy arrays of this process, `[B / processes, ...]`, to global arrays split over users."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )
