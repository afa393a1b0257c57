"""The nearest centre of every point, on a device mesh, and the sums of the clusters.

Points are split over all devices of a mesh and go through in chunks, so that memory grows with the
chunk and never with points × centres. One reading of the points ends in one `psum` of
`[K, D + 2]`: the sum of the points of every cluster, their number, and the squared distances.

Axes: N points, B points of a chunk, D width, K centres.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from onerec_jax.sharding import BATCH, make_mesh

CHUNK_BYTES = {"cpu": 4 << 20, "gpu": 1 << 30, "tpu": 256 << 20}
"""Distances `[B, K]` held at once by default: a CPU's cache; enough rows to fill a GPU."""


def default_chunk(k: int) -> int:
    """Points whose distances to K centres are held at once on this backend."""
    rows = CHUNK_BYTES.get(jax.default_backend(), CHUNK_BYTES["gpu"]) // (4 * k)
    return int(np.clip(2 ** int(np.log2(max(rows, 1))), 256, 1 << 17))


# ------------------------------------------------------------------------------------- distances


@struct.dataclass
class Assignment:
    """Points and the centres they went to."""

    index_n: jax.Array  # int32 [N], centre of every point
    distance_n: jax.Array  # float32 [N], squared distance to it
    margin_n: jax.Array | None  # float32 [N], how much dearer the second choice is; with prices
    sums_kd: jax.Array | None
    """float32 [K, D + 2]: sums of points, their numbers; all squared distances in [0, D + 1]."""


def nearest_block(x_bd, centres_kd, price_k=None, *, precision="highest"):
    """Nearest centre of every point of one chunk, the lowest of equals.

    Args:
      x_bd: float32 `[B, D]`.
      centres_kd: float32 `[K, D]`.
      price_k: float32 `[K]`, added to the squared distance of each centre in the choice.
      precision: of the product; "highest" is float32, "default" is tf32 on a GPU.

    Returns:
      Index int32 `[B]`; squared distance float32 `[B]`, the price not included; and with prices
      the margin float32 `[B]`: how much dearer the second choice is (None without).
    """
    # |x|^2 is the same for all centres.
    score_k = (centres_kd**2).sum(-1)
    if price_k is not None:
        score_k = score_k + price_k
    k = len(centres_kd)
    if jax.default_backend() == "cpu":
        # Plain reductions over the major axis are vectorised there; argmin is not.
        product_kb = jnp.einsum("kd,bd->kb", -2 * centres_kd, x_bd, precision=precision)
        score_kb = product_kb + score_k[:, None]
        least_b = score_kb.min(0)
        centre_k1 = jnp.arange(k, dtype=jnp.int32)[:, None]
        index_b = jnp.where(score_kb == least_b, centre_k1, k - 1).min(0)
    else:
        product_bk = jnp.einsum("bd,kd->bk", x_bd, -2 * centres_kd, precision=precision)
        score_kb = (product_bk + score_k).T  # a view of the same memory
        index_b = jnp.argmin(score_kb, axis=0).astype(jnp.int32)
        least_b = score_kb.min(0)
    margin_b = None
    if price_k is not None:
        other_kb = jnp.arange(k, dtype=jnp.int32)[:, None] != index_b
        margin_b = jnp.where(other_kb, score_kb, jnp.inf).min(0) - least_b
        least_b = least_b - price_k[index_b]
    return index_b, jnp.maximum(least_b + (x_bd**2).sum(-1), 0), margin_b


def add_up(total_kd, x_bd, to_b, *, integers: bool | None = None):
    """Adds points to the sums of their clusters, float32 `[K, D]`, the same bits every time.

    A GPU adds in whatever order its threads come along, and float32 sums then differ from run to
    run. Sums of integers do not, so there points are split into two integers of as many bits as B
    of them can be added without overflow: together 30 bits at B = 65,536, more than float32 has.

    Args:
      to_b: int32 `[B]`, clusters; K is left out.
      integers: the integer way; default: everywhere but on a CPU, which adds in order.
    """
    if integers is None:
        integers = jax.default_backend() != "cpu"
    if not integers:
        return total_kd.at[to_b].add(x_bd, mode="drop")
    limit = min((2**31 - 1) // len(x_bd), 2**24)  # float32 has all integers up to there
    scale = jnp.maximum(jnp.abs(x_bd).max(), 1e-30)
    scaled_bd = jnp.clip(x_bd / scale, -1, 1) * limit
    high_bd = jnp.round(scaled_bd)
    low_bd = jnp.round((scaled_bd - high_bd) * limit)
    high_kd, low_kd = (
        jnp.zeros(total_kd.shape, jnp.int32).at[to_b].add(part_bd.astype(jnp.int32), mode="drop")
        for part_bd in (high_bd, low_bd)
    )
    return total_kd + (high_kd + low_kd / limit) / limit * scale


def _pass(x_nd, valid, centres_kd, price_k, *, chunk, precision, sums):
    """One reading of the points of one device.

    Args:
      valid: rows from here on are padding and count for nothing.

    Returns:
      `Assignment`; its `sums_kd` is None without `sums`, its margin without prices.
    """
    n, k = x_nd.shape[0], len(centres_kd)

    def block(x_bd, begin, fresh_b, carry):
        points, total_kd, count_k, inertia = carry
        found = nearest_block(x_bd, centres_kd, price_k, precision=precision)
        points = jax.tree.map(
            lambda to_n, from_b: jax.lax.dynamic_update_slice_in_dim(to_n, from_b, begin, 0),
            points,
            found,
        )
        if sums:
            to_b = jnp.where(fresh_b, found[0], k)
            total_kd = add_up(total_kd, x_bd, to_b)
            count_k = count_k.at[to_b].add(1, mode="drop")
            inertia = inertia + jnp.where(fresh_b, found[1], 0).sum()
        return points, total_kd, count_k, inertia

    margin_n = None if price_k is None else jnp.zeros(n, jnp.float32)
    points = (jnp.zeros(n, jnp.int32), jnp.zeros(n, jnp.float32), margin_n)
    start = (points, jnp.zeros_like(centres_kd), jnp.zeros(k, jnp.int32), jnp.float32(0))
    points, *total = _by_chunks(block, x_nd, valid, start, chunk=chunk)
    return Assignment(*points, _pack(*total) if sums else None)


def _pack(total_kd, count_k, inertia):
    """What is added over the mesh, in one array: `Assignment.sums_kd`."""
    last_k = jnp.zeros(len(count_k)).at[0].set(inertia)
    return jnp.concatenate([total_kd, count_k[:, None], last_k[:, None]], axis=1, dtype=jnp.float32)


def _by_chunks(block, x_nd, valid, carry, *, chunk):
    """`carry = block(x_bd, begin, fresh_b, carry)` for every chunk of the points.

    The last chunk is moved back to be whole: `fresh_b` says which of its points are new, and no
    padding.
    """
    n = x_nd.shape[0]
    chunk = min(chunk, n)

    def step(i, carry):
        begin = jnp.minimum(i * chunk, n - chunk)
        x_bd = jax.lax.dynamic_slice_in_dim(x_nd, begin, chunk)
        row_b = begin + jnp.arange(chunk)
        return block(x_bd, begin, (row_b >= i * chunk) & (row_b < valid), carry)

    return jax.lax.fori_loop(0, -(-n // chunk), step, carry)


# ------------------------------------------------------------------------------ points on a mesh


@dataclasses.dataclass(eq=False)
class Points:
    """Points split over the devices of a mesh, padded to a multiple of their number."""

    x_nd: jax.Array
    valid: int
    """Rows that are points; the rest is padding."""
    mesh: Mesh

    @classmethod
    def place(cls, x_nd, mesh: Mesh | None = None, *, consume: bool = False) -> "Points":
        """Copies float points `[N, D]` to the mesh (default: one device) as float32.

        Args:
          consume: take a JAX array as it is; its memory is used for the residuals.
        """
        mesh = mesh or make_mesh(data=1)
        n, d = x_nd.shape
        rows = -(-n // mesh.devices.size) * mesh.devices.size

        def shard(index):
            begin, end, _ = index[0].indices(rows)
            part = np.zeros((end - begin, d), np.float32)
            part[: max(min(end, n) - begin, 0)] = x_nd[begin : min(end, n)]
            return part

        sharding = NamedSharding(mesh, BATCH)
        if isinstance(x_nd, jax.Array):
            if rows != n:
                x_nd = jnp.pad(x_nd, ((0, rows - n), (0, 0)))
            x_nd = jax.device_put(x_nd.astype(jnp.float32), sharding, may_alias=consume)
            return cls(x_nd, n, mesh)
        return cls(jax.make_array_from_callback((rows, d), sharding, shard), n, mesh)

    @property
    def known(self) -> jax.Array:
        """Which rows are points and no padding, bool `[rows]`."""
        return jnp.arange(len(self.x_nd)) < self.valid

    def padded(self, values_n, fill) -> jax.Array:
        """One value a point, placed as the points are; the padding gets `fill`."""
        values_n = np.pad(
            np.asarray(values_n), (0, len(self.x_nd) - self.valid), constant_values=fill
        )
        return jax.device_put(values_n, NamedSharding(self.mesh, BATCH))

    def subtract(self, centres_kd, index_n) -> None:
        """Replaces the points by what their centres leave over, in place."""
        self.x_nd = _subtract(self.x_nd, centres_kd, index_n)

    def rows(self, rows) -> jax.Array:
        """Some points, on every device. `[len(rows), D]`."""
        return _take(self.x_nd, jnp.asarray(rows), replicated=NamedSharding(self.mesh, P()))


@functools.partial(jax.jit, donate_argnums=0)
def _subtract(x_nd, centres_kd, index_n):
    return x_nd - centres_kd[index_n]


@functools.partial(jax.jit, static_argnames="replicated")
def _take(x_nd, rows, *, replicated):
    return jax.lax.with_sharding_constraint(x_nd[rows], replicated)


@functools.partial(jax.jit, static_argnames=("mesh", "chunk", "precision", "sums"))
def _mesh_pass(x_nd, valid, centres_kd, price_k, *, mesh, chunk, precision, sums):
    def local(x_nd, centres_kd, price_k):
        here = jax.lax.axis_index(BATCH[0]) * x_nd.shape[0]
        out = _pass(
            x_nd, valid - here, centres_kd, price_k, chunk=chunk, precision=precision, sums=sums
        )
        return out.replace(sums_kd=jax.lax.psum(out.sums_kd, BATCH[0]) if sums else None)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(BATCH, P(), P()),
        out_specs=Assignment(BATCH, BATCH, BATCH, P()),
        check_vma=False,  # the loop's carry starts alike on all devices and then differs
    )(x_nd, centres_kd, price_k)


def assign(
    points: Points, centres_kd, price_k=None, *, chunk=0, precision="highest", sums=False
) -> Assignment:
    """Sends every point to its nearest (cheapest) centre, each device its own points.

    Args:
      chunk: points whose distances are held at once; 0 = `default_chunk`.
      sums: also add up the clusters, over the whole mesh in one `psum`.
    """
    return _mesh_pass(
        points.x_nd,
        points.valid,
        centres_kd,
        price_k,
        mesh=points.mesh,
        chunk=chunk or default_chunk(len(centres_kd)),
        precision=precision,
        sums=sums,
    )


@functools.partial(jax.jit, static_argnames=("k", "mesh", "chunk"))
def cluster_sums(x_nd, valid, index_n, *, k: int, mesh: Mesh, chunk: int):
    """Sums and sizes of given clusters, as `Assignment.sums_kd` has them (no distances)."""

    def local(x_nd, index_n):
        def block(x_bd, begin, fresh_b, carry):
            total_kd, count_k = carry
            index_b = jax.lax.dynamic_slice_in_dim(index_n, begin, len(x_bd))
            to_b = jnp.where(fresh_b, index_b, k)
            return add_up(total_kd, x_bd, to_b), count_k.at[to_b].add(1, mode="drop")

        here = jax.lax.axis_index(BATCH[0]) * x_nd.shape[0]
        start = (jnp.zeros((k, x_nd.shape[1])), jnp.zeros(k, jnp.int32))
        total = _by_chunks(block, x_nd, valid - here, start, chunk=chunk)
        return jax.lax.psum(_pack(*total, 0.0), BATCH[0])

    return jax.shard_map(local, mesh=mesh, in_specs=(BATCH, BATCH), out_specs=P(), check_vma=False)(
        x_nd, index_n
    )
