"""Residual k-means: level after level, the nearest centre and what it leaves over.

OneRec Technical Report (arXiv 2506.13695), section 2.1.2. Plain Lloyd iterations from k-means++;
distances go through the device in chunks of points.

Axes: N points, D width, K centres.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 16_384
"""Points whose distances to all centres are held at once."""


def nearest(x_nd, centres_kd):
    """Index of the nearest centre, int32 `[N]`, and the squared distance to it, `[N]`."""
    norm_k = (centres_kd**2).sum(-1)

    def chunk(x_d):
        # |x|^2 is the same for all centres; full float32, for tf32 moves assignments.
        product_k = jnp.einsum("d,kd->k", x_d, centres_kd, precision="highest")
        distance_k = norm_k - 2 * product_k
        index = jnp.argmin(distance_k).astype(jnp.int32)
        return index, jnp.maximum(distance_k[index] + (x_d**2).sum(), 0)

    return jax.lax.map(chunk, x_nd, batch_size=min(CHUNK, x_nd.shape[0]))


@functools.partial(jax.jit, static_argnames="k")
def plus_plus(key, x_nd, k):
    """k-means++ start (Arthur and Vassilvitskii 2007): far points are likelier. `[K, D]`."""
    first, key = jax.random.split(key)
    n = x_nd.shape[0]
    start = x_nd[jax.random.randint(first, (), 0, n)]
    centres = jnp.zeros((k, x_nd.shape[1]), x_nd.dtype).at[0].set(start)

    def add(i, carry):
        centres, distance_n = carry
        log_weight = jnp.log(distance_n)  # all -inf once every point is a centre: index 0 then
        point = x_nd[jax.random.categorical(jax.random.fold_in(key, i), log_weight)]
        closer = jnp.minimum(distance_n, ((x_nd - point) ** 2).sum(-1))
        return centres.at[i].set(point), closer

    distance = ((x_nd - start) ** 2).sum(-1)
    return jax.lax.fori_loop(1, k, add, (centres, distance))[0]


@functools.partial(jax.jit, static_argnames="iterations")
def lloyd(x_nd, centres_kd, *, iterations):
    """`iterations` rounds of assign and average; an empty cluster moves to a badly served point."""
    k = centres_kd.shape[0]

    def step(_, centres):
        index_n, distance_n = nearest(x_nd, centres)
        count_k = jnp.bincount(index_n, length=k)
        total_kd = jax.ops.segment_sum(x_nd, index_n, num_segments=k)
        mean_kd = total_kd / jnp.maximum(count_k, 1)[:, None]
        _, worst = jax.lax.top_k(distance_n, k)
        empty = count_k == 0
        seed_kd = x_nd[worst[jnp.cumsum(empty) - 1]]
        return jnp.where(empty[:, None], seed_kd, mean_kd)

    return jax.lax.fori_loop(0, iterations, step, centres_kd)


def fit_rq_kmeans(x_nd, *, levels, codebook_size, iterations=25, seed=0) -> np.ndarray:
    """Fits one codebook a level on the residuals of the levels before.

    Args:
      x_nd: float32 `[N, D]` with N >= codebook_size.

    Returns:
      Codebooks, float32 `[levels, K, D]`.
    """
    residual = jnp.asarray(x_nd, jnp.float32)
    codebooks = []
    for level in range(levels):
        key = jax.random.fold_in(jax.random.key(seed), level)
        centres = lloyd(residual, plus_plus(key, residual, codebook_size), iterations=iterations)
        codebooks.append(centres)
        residual = residual - centres[jax.jit(nearest)(residual, centres)[0]]
    return np.asarray(jnp.stack(codebooks))


def encode(x_nd, codebooks_lkd) -> tuple[np.ndarray, np.ndarray]:
    """Codes int32 `[N, levels]` and reconstruction float32 `[N, D]` of any points."""
    x = jnp.asarray(x_nd, jnp.float32)
    residual, codes = x, []
    for centres in jnp.asarray(codebooks_lkd):
        index, _ = jax.jit(nearest)(residual, centres)
        codes.append(np.asarray(index))
        residual = residual - centres[index]
    return np.stack(codes, axis=1), np.asarray(x - residual)


def spread_last_level(x_nd, codes_nl, codebooks_lkd, priority_n) -> np.ndarray:
    """Gives items that share an ID the nearest free codes of the last level.

    The prefix stays, so items keep their neighbourhood; only the finest distinction moves to the
    next nearest centre. Within a prefix items choose in order of `priority_n`, so the first of a
    colliding group keeps the nearest centre. A prefix with more items than codes keeps some
    collisions: all its codes are then taken, and the rest stay where they were.

    Args:
      x_nd: float32 `[N, D]`, the vectors that were coded.
      codes_nl: int32 `[N, levels]`, from `encode`.
      priority_n: `[N]`, lower chooses first; popular items should come first.

    Returns:
      Codes int32 `[N, levels]`.
    """
    codes = codes_nl.copy()
    prefixes, group_n = np.unique(codes[:, :-1], axis=0, return_inverse=True)
    order = np.lexsort((priority_n, group_n.reshape(-1)))
    bounds = np.searchsorted(group_n.reshape(-1)[order], np.arange(len(prefixes) + 1))
    last = codebooks_lkd[-1]
    for group in range(len(prefixes)):
        rows = order[bounds[group] : bounds[group + 1]]
        if len(np.unique(codes[rows, -1])) == len(rows):
            continue
        base = sum(codebooks_lkd[i][prefixes[group, i]] for i in range(len(codebooks_lkd) - 1))
        residual = x_nd[rows] - base
        distance = (last**2).sum(-1) - 2 * residual @ last.T
        free = np.ones(len(last), bool)
        for row, nearest_codes in zip(rows, np.argsort(distance, axis=1), strict=True):
            choice = nearest_codes[free[nearest_codes]]
            if not len(choice):
                break
            codes[row, -1] = choice[0]
            free[choice[0]] = False
    return codes
