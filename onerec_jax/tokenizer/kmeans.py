"""K-means on a device mesh: start, Lloyd iterations, mini-batches.

An iteration reads the points once, as `tokenizer.nearest` does it. The host turns the sums of the
clusters into new centres, which makes progress, Ctrl-C and re-seeding plain Python.

Axes: N points, D width, K centres.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax.tokenizer.nearest import Points, assign

START_SAMPLE = 256
"""Points a centre that the start may look at."""
PROPOSALS = 128
"""Points that k-means++ draws at once."""


# ----------------------------------------------------------------------------------------- start


@functools.partial(jax.jit, static_argnames=("k", "trials", "proposals"))
def plus_plus(key, x_nd, k: int, trials: int = 0, proposals: int = PROPOSALS):
    """Greedy k-means++ start (Arthur and Vassilvitskii 2007), `[K, D]`: far points are likelier.

    Every centre is the best of `trials` points drawn by their squared distance: the one that leaves
    the least distance in all. Drawing them one centre at a time would read all points K times.
    Here many are proposed from the same distances, and each is accepted with the share of its
    squared distance that the centres chosen since have left. That is rejection sampling: what is
    accepted has the distribution wanted, and one matrix product serves many centres. A centre whose
    proposals are partly rejected has fewer trials; with one trial it is k-means++ exactly.

    Args:
      trials: points a centre; 0 = 2 + ln K, as their paper advises; 1 is plain k-means++.
      proposals: points drawn at once.
    """
    n, d = x_nd.shape
    trials = trials or 2 + int(np.log(k))
    groups = max(proposals // trials, 1)
    norm_n = (x_nd**2).sum(-1)

    def squared(y_md):
        product_nm = jnp.einsum("nd,md->nm", x_nd, y_md, precision="highest")
        return jnp.maximum(norm_n[:, None] - 2 * product_nm + (y_md**2).sum(-1), 0)

    def propose(carry):
        key, centres_kd, found, distance_n = carry
        key, draw, coin = jax.random.split(key, 3)
        total = distance_n.sum()
        # Once every point is a centre nothing is left to weigh by: any point will do. So it is
        # with distances that float32 cannot hold: the loop must end.
        weighed = (total > 0) & jnp.isfinite(total)
        weight_n = jnp.where(weighed, distance_n, 1.0)
        rows_m = jax.random.choice(draw, n, (groups * trials,), p=weight_n / weight_n.sum())
        y_md = x_nd[rows_m]
        closer_nm = squared(y_md)
        stale_m = distance_n[rows_m]
        luck_m = jax.random.uniform(coin, (groups * trials,))

        def choose(g, carry):
            centres_kd, found, distance_n = carry
            these_t = g * trials + jnp.arange(trials)
            accept_t = luck_m[these_t] * stale_m[these_t] < distance_n[rows_m[these_t]]
            accept_t = accept_t | ~weighed
            closer_nt = jax.lax.dynamic_slice_in_dim(closer_nm, g * trials, trials, axis=1)
            left_t = jnp.minimum(distance_n[:, None], closer_nt).sum(0)
            best = jnp.argmin(jnp.where(accept_t, left_t, jnp.inf))
            place = jnp.where(accept_t.any(), found, k)
            centres_kd = centres_kd.at[place].set(y_md[these_t[best]], mode="drop")
            nearer_n = jnp.minimum(distance_n, closer_nt[:, best])
            distance_n = jnp.where(place < k, nearer_n, distance_n)
            return centres_kd, jnp.minimum(found + accept_t.any(), k), distance_n

        start = (centres_kd, found, distance_n)
        return key, *jax.lax.fori_loop(0, groups, choose, start)

    key, first = jax.random.split(key)
    start_d = x_nd[jax.random.randint(first, (), 0, n)]
    centres_kd = jnp.zeros((k, d), x_nd.dtype).at[0].set(start_d)
    carry = (key, centres_kd, jnp.int32(1), squared(start_d[None])[:, 0])
    return jax.lax.while_loop(lambda carry: carry[2] < k, propose, carry)[1]


def start_centres(key, points: Points, k: int, init: str) -> jax.Array:
    """K first centres from at most `START_SAMPLE` points a centre.

    Args:
      init: "k-means++" or "random" (distinct points).
    """
    seed = int(jax.random.randint(key, (), 0, np.iinfo(np.int32).max))
    rng = np.random.default_rng(seed)
    sample = k if init == "random" else min(points.valid, k * START_SAMPLE)
    rows = np.sort(rng.choice(points.valid, min(sample, points.valid), replace=False))
    x = points.x_nd[: points.valid] if len(rows) == len(points.x_nd) else points.rows(rows)
    return x if init == "random" else plus_plus(key, x, k)


# ----------------------------------------------------------------------------------------- lloyd


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a clustering ended with."""

    centres_kd: jax.Array
    inertia: list[float]
    """Sum of squared distances before each update."""
    reseeded: int
    """Empty clusters that were given a new centre."""


def lloyd(
    points: Points,
    centres_kd,
    *,
    iterations: int,
    chunk: int = 0,
    precision: str = "highest",
    say: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Rounds of assign and average; stops early only where nothing moves any more.

    An empty cluster moves to a badly served point: of E empty clusters, to the E points farthest
    from their centres.
    """
    inertia, reseeded, clock = [], 0, Clock(say)
    for i in range(iterations):
        out = assign(points, centres_kd, chunk=chunk, precision=precision, sums=True)
        new_kd, count_k, total = means(centres_kd, out.sums_kd)
        inertia.append(float(total))
        empty = np.flatnonzero(np.asarray(count_k) == 0)
        if len(empty):
            new_kd = reseed(points, new_kd, out.distance_n, empty)
            reseeded += len(empty)
        settled = not len(empty) and bool((new_kd == centres_kd).all())
        centres_kd = new_kd
        clock.tick(i + 1, iterations, f"inertia {inertia[-1] / points.valid:.6g} a point")
        if settled:
            break
    return Fit(centres_kd, inertia, reseeded)


@jax.jit
def means(centres_kd, sums):
    """Means of the clusters (an empty one keeps its centre), sizes `[K]` and the inertia."""
    total_kd, count_k = sums[:, :-2], sums[:, -2]
    mean_kd = total_kd / jnp.maximum(count_k, 1)[:, None]
    return jnp.where(count_k[:, None] > 0, mean_kd, centres_kd), count_k, sums[0, -1]


def reseed(points: Points, centres_kd, distance_n, empty) -> jax.Array:
    """Moves the `empty` centres to the points with the largest distances."""
    k = min(len(centres_kd), points.valid)
    worst = np.asarray(_worst(distance_n, points.valid, k))
    worst = worst[np.arange(len(empty)) % k]
    return centres_kd.at[empty].set(points.rows(worst))


@functools.partial(jax.jit, static_argnames="k")
def _worst(distance_n, valid, k):
    known_n = jnp.arange(len(distance_n)) < valid
    return jax.lax.top_k(jnp.where(known_n, distance_n, -1), k)[1]


# ------------------------------------------------------------------------------------ mini-batch


def mini_batch_lloyd(
    blocks: Callable[[np.random.Generator], object],
    centres_kd,
    *,
    epochs: int,
    rng: np.random.Generator,
    chunk: int = 0,
    precision: str = "highest",
    say: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Mini-batch k-means (Sculley 2010): a centre is the mean of all points it was ever given.

    For catalogues that do not fit into memory: only one batch is on the device at a time.

    Args:
      blocks: generator -> iterable of `Points`, the points in random batches.
      epochs: passes over all points.
    """
    seen_k, inertia, reseeded, clock = jnp.zeros(len(centres_kd)), [], 0, Clock(say)
    for epoch in range(epochs):
        counts, totals = np.zeros(len(centres_kd)), []
        for points in blocks(rng):
            out = assign(points, centres_kd, chunk=chunk, precision=precision, sums=True)
            centres_kd, seen_k = _drift(centres_kd, seen_k, out.sums_kd)
            counts += np.asarray(out.sums_kd[:, -2])
            totals.append(float(out.sums_kd[0, -1]))
        inertia.append(float(np.sum(totals)))
        clock.tick(epoch + 1, epochs, f"inertia {inertia[-1]:.6g}")
        empty = np.flatnonzero(counts == 0)
        if len(empty) and epoch + 1 < epochs:
            centres_kd = reseed(points, centres_kd, out.distance_n, empty)
            seen_k = seen_k.at[empty].set(0)
            reseeded += len(empty)
    return Fit(centres_kd, inertia, reseeded)


@jax.jit
def _drift(centres_kd, seen_k, sums):
    """Moves every centre to the mean of all its points, those of this batch included."""
    total_kd, count_k = sums[:, :-2], sums[:, -2]
    now_k = seen_k + count_k
    step_kd = (total_kd - count_k[:, None] * centres_kd) / jnp.maximum(now_k, 1)[:, None]
    return centres_kd + step_kd, now_k


class Clock:
    """Progress lines of long loops, at most one in five seconds."""

    def __init__(self, say, every=5.0):
        self.say, self.every = say, every
        self.begin = self.last = time.perf_counter()

    def tick(self, done: int, of: int, words: str) -> None:
        now = time.perf_counter()
        if now - self.last >= self.every:
            self.last = now
            left = (now - self.begin) / done * (of - done)
            self.say(f"  iteration {done}/{of}, {words}, {left:.0f} s left")
