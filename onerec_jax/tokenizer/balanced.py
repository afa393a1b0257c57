"""Balanced k-means: every code is used by as many items as any other.

Two ways to the same end. `sweep_kmeans` is OneRec V0's Algorithm 1 (arXiv 2502.18965): centres take
turns, each takes its N / K nearest points of those that are left. `market_kmeans` lets all centres
choose at once: a centre with too many points raises its price until the excess goes to its second
choice (Bertsekas' auction for the transport problem), which costs far less in distance; a last step
moves the points that are still too many. docs/tokenizer.md has what either loses against plain
k-means.

Axes: N points, D width, K centres.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax.errors import InputError
from onerec_jax.tokenizer.kmeans import Clock, means
from onerec_jax.tokenizer.nearest import Points, assign, cluster_sums, default_chunk

SWEEP_CELLS = 1 << 28
"""Largest N × K of Algorithm 1, which holds all distances: 1 GiB."""
ROUNDS = 3
"""Price changes between two moves of the centres."""
LAST_ROUNDS = 100
"""Price changes after the last move, at most."""
LAST_EXCESS = 1e-3
"""Share of the points that may be too many for their centres when price changes end."""
RAISE, LOWER = 0.3, 0.3
"""Share of the full price change that is made; all centres move at once, so less is steadier."""


@dataclasses.dataclass(frozen=True)
class BalancedFit:
    """Centres, and the balanced assignment that their means were taken of."""

    centres_kd: jax.Array
    index_n: np.ndarray  # int32 [N]
    inertia: list[float]
    """Sum of squared distances to the assigned centres, a round of moves."""
    moved: int
    """Points that prices alone had not placed within the limits."""


def capacities(n: int, k: int, slack: float = 0.0) -> np.ndarray:
    """Points that each centre may have, int64 `[K]`.

    Without slack N mod K centres take one more than the others, and all are full. With it every
    centre takes up to `(1 + slack) N / K`.
    """
    if slack > 0:
        return np.full(k, max(math.floor((1 + slack) * n / k + 1e-9), math.ceil(n / k)))
    return n // k + (np.arange(k) < n % k)


# ------------------------------------------------------------------------------- V0, Algorithm 1


def sweep(distance_kn, sizes) -> np.ndarray:
    """One sweep of Algorithm 1: centre after centre takes its nearest points of those left.

    Args:
      distance_kn: float `[K, N]`, rows in the order of the turns.
      sizes: int `[K]`, points for each turn, N in all.

    Returns:
      Turn of every point, int32 `[N]`.
    """
    left = np.arange(distance_kn.shape[1])
    turn_n = np.empty(len(left), np.int32)
    for turn, size in enumerate(sizes):
        cut = np.arange(len(left))
        if 0 < size < len(left):
            cut = np.argpartition(distance_kn[turn, left], size - 1)
        turn_n[left[cut[:size]]] = turn
        left = left[cut[size:]]
    return turn_n


def sweep_kmeans(
    points: Points,
    centres_kd,
    *,
    sweeps: int = 50,
    seed: int = 0,
    least_moved: float = 1e-3,
    chunk: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> BalancedFit:
    """OneRec V0, Algorithm 1. Sizes differ by at most one.

    A centre's mean is taken when its turn is over and read in the next sweep only, so a sweep needs
    the distances once. The order of turns is drawn once: drawn anew each sweep, as the centres with
    the leftovers change, seven points in ten keep moving and nothing converges.

    Args:
      sweeps: at most; it stops once a share of less than `least_moved` changes its centre.

    Raises:
      InputError: all distances would not fit.
    """
    n, k = points.valid, len(centres_kd)
    if n * k > SWEEP_CELLS:
        raise InputError(
            f"--tokenizer.kmeans.assignment sweep holds all {n:,} x {k:,} distances, too many for "
            "one machine: use --tokenizer.kmeans.assignment balanced"
        )
    order = np.random.default_rng(seed).permutation(k)
    sizes = capacities(n, k)
    x_nd = points.x_nd[:n]
    before, inertia, clock = None, [], Clock(say)
    for i in range(sweeps):
        distance_kn = np.asarray(_distances(x_nd, centres_kd[order]))
        index_n = order[sweep(distance_kn, sizes)].astype(np.int32)
        centres_kd, total = _means(points, index_n, centres_kd)
        inertia.append(float(total))
        moved = 1.0 if before is None else float((index_n != before).mean())
        before = index_n
        clock.tick(i + 1, sweeps, f"{moved:.1%} of the points moved")
        if moved < least_moved:
            break
    return BalancedFit(centres_kd, index_n, inertia, 0)


@jax.jit
def _distances(x_nd, centres_kd):
    # A turn compares points, so their norms count.
    product_kn = jnp.einsum("kd,nd->kn", centres_kd, x_nd, precision="highest")
    return (centres_kd**2).sum(-1)[:, None] - 2 * product_kn + (x_nd**2).sum(-1)


def _means(points: Points, index_n, centres_kd):
    """Means of given clusters `[K, D]` (an empty one keeps its centre), and their inertia."""
    k = len(centres_kd)
    index_n = points.padded(index_n, k)
    chunk = default_chunk(k)
    sums = cluster_sums(points.x_nd, points.valid, index_n, mesh=points.mesh, chunk=chunk, k=k)
    centres_kd, _, _ = means(centres_kd, sums)
    rest_n = ((points.x_nd - centres_kd[jnp.minimum(index_n, k - 1)]) ** 2).sum(-1)
    return centres_kd, jnp.where(points.known, rest_n, 0).sum()


# ---------------------------------------------------------------------------------------- prices


def market_kmeans(
    points: Points,
    centres_kd,
    *,
    iterations: int,
    slack: float = 0.0,
    chunk: int = 0,
    precision: str = "highest",
    say: Callable[[str], None] = lambda line: None,
) -> BalancedFit:
    """Lloyd iterations in which every centre has a price that keeps its cluster at N / K points.

    Args:
      slack: with 0 sizes differ by at most one; else no cluster holds more than
        `(1 + slack) N / K` points.
    """
    k, fair = len(centres_kd), points.valid / len(centres_kd)
    chunk = chunk or default_chunk(k)
    price_k, inertia, clock = jnp.zeros(k), [], Clock(say)
    for i in range(iterations):
        last = i + 1 == iterations
        for _ in range(LAST_ROUNDS if last else ROUNDS):
            out = assign(points, centres_kd, price_k, chunk=chunk, precision=precision, sums=True)
            excess = jnp.maximum(out.sums_kd[:, -2] - math.ceil(fair), 0).sum()
            if last and excess <= LAST_EXCESS * points.valid:
                break
            price_k = _new_prices(price_k, out, points.valid, fair)
        mean_kd, count_k, total = means(centres_kd, out.sums_kd)
        inertia.append(float(total))
        if not last:
            centres_kd = mean_kd
        clock.tick(i + 1, iterations, f"largest cluster {float(count_k.max()) / fair:.2f} x fair")
    out = assign(points, centres_kd, price_k, chunk=chunk)
    index_n, moved = place_excess(points, centres_kd, out, slack, chunk=chunk)
    centres_kd, total = _means(points, index_n, centres_kd)
    return BalancedFit(centres_kd, index_n, [*inertia, float(total)], moved)


@jax.jit
def _new_prices(price_k, out, valid, fair):
    """Raises the prices of centres with too many points, lowers those of centres with too few.

    A centre with E points too many gets dearer by the E-th smallest margin of its points: that
    sends just these E elsewhere, if no other price changes. A centre with too few gets cheaper in
    proportion; what the lack of a point is worth is the mean margin.
    """
    k, n = len(price_k), len(out.index_n)
    known_n = jnp.arange(n) < valid
    index_n = jnp.where(known_n, out.index_n, k)
    size_k = jnp.bincount(index_n, length=k)
    order_n = jnp.lexsort((out.margin_n, index_n))
    over_k = size_k - jnp.ceil(fair).astype(jnp.int32)
    place_k = jnp.cumsum(size_k) - size_k + jnp.maximum(over_k, 1) - 1
    enough_k = out.margin_n[order_n[jnp.minimum(place_k, n - 1)]]
    typical = jnp.where(known_n, out.margin_n, 0).sum() / valid
    lack_k = 1 - size_k / jnp.floor(fair)
    change_k = jnp.where(over_k > 0, RAISE * enough_k, 0)
    # Asked for, as the margins of a single centre are infinite.
    change_k -= jnp.where(lack_k > 0, LOWER * typical * lack_k, 0)
    price_k = price_k + change_k
    return price_k - price_k.mean()


def place_excess(points: Points, centres_kd, out, slack: float, *, chunk=0):
    """Moves the points that are too many for their centre to the nearest ones with room.

    A full centre keeps the points that would lose most elsewhere (largest margins). The others
    choose again among the centres with room, round by round; a centre that fills up takes the
    nearest of those that chose it.

    Returns:
      Index int32 `[N]` and the number of points moved.
    """
    k, n = len(centres_kd), points.valid
    index_n = np.array(out.index_n[:n])
    margin_n = np.asarray(out.margin_n[:n])
    limit_k = capacities(n, k, slack)
    by_size = np.argsort(-np.bincount(index_n, minlength=k), kind="stable")
    limit_k[by_size] = np.sort(limit_k)[::-1]  # the larger limits to the larger clusters
    room_k = limit_k.copy()
    homeless = np.arange(n)
    first = True
    moved = 0
    while len(homeless):
        if first:
            wish, cost = index_n, -margin_n
        else:
            closed_k = jnp.where(jnp.asarray(room_k) > 0, 0.0, jnp.inf)
            wish, cost = _nearest_open(points, centres_kd, closed_k, homeless, chunk)
        order = np.lexsort((cost, wish))
        start = np.searchsorted(wish[order], np.arange(k))
        taken = order[np.arange(len(order)) - start[wish[order]] < room_k[wish[order]]]
        index_n[homeless[taken]] = wish[taken]
        room_k -= np.bincount(wish[taken], minlength=k)
        homeless = np.delete(homeless, taken)
        moved = len(homeless) if first else moved
        first = False
    return index_n.astype(np.int32), moved


def _nearest_open(points: Points, centres_kd, closed_k, rows, chunk):
    """Nearest centre with room and squared distance of some points."""
    size = 1 << max(len(rows) - 1, 0).bit_length()  # few shapes, few compilations
    x_bd = points.rows(np.resize(rows, size))
    out = assign(Points.place(x_bd, points.mesh), centres_kd, closed_k, chunk=chunk)
    return np.asarray(out.index_n[: len(rows)]), np.asarray(out.distance_n[: len(rows)])
