"""Hierarchical k-means of one user's actions: OneRec (arXiv 2506.13695), section 2.2.1.

After TWIN-V2 (arXiv 2407.16357): a cluster of n members is split by k-means into floor(n^(1/3))
clusters until none has more than M members. Neither report says what is left out when there are
more clusters than the model takes (2000), so here M is the least that leaves at most so many:
nothing is left out.

The split of a node depends on its members alone and not on M, so that the tree for every M is the
top of one tree. It is grown from the root, nodes of like size together in one array, only as far
as M may still fall. Pure NumPy; the same input gives the same bits on the same machine and number
of BLAS threads.
"""

import numpy as np

ITERATIONS = 8
"""Rounds of k-means a split, fewer where nothing changes any more."""
SAMPLE = 128
"""Members a centre that k-means looks at; all members are assigned at the end."""
EXACT_WIDTH = 2048
"""Nodes of more points are not padded to share an array with others."""


def hierarchical_clusters(x, max_clusters: int, *, weight=None, seed: int = 0) -> np.ndarray:
    """Clusters of at most M members, M the least that leaves at most `max_clusters` clusters.

    Equal vectors are one point that weighs as much as all of them: it is never split, even if it
    weighs more than M. A node of total weight n and m distinct points is split into exactly
    min(m, max(2, floor(n^(1/3)))) clusters, none empty.

    Args:
      x: `[n, D]`, finite, used as float32.
      max_clusters: at least 1.
      weight: int `[n]`, at least 1: raw actions that a row stands for. M, k and the centres count
        with it. None: 1 each.
      seed: of the order of the points; the first k of a node are the first centres.

    Returns:
      int64 `[n]`, cluster of every row; every number from 0 to the greatest is used.
    """
    x = np.asarray(x, np.float32)
    if not len(x):
        return np.zeros(0, np.int64)
    first, point = np.unique(first_equal(x), return_inverse=True)
    if len(first) <= max_clusters:
        return point
    weight = np.bincount(point, weight).astype(np.int64)
    return grow_tree(x[first], max_clusters, weight, seed)[0][point]


def grow_tree(x, max_clusters: int, weight, seed: int) -> tuple[np.ndarray, int]:
    """`hierarchical_clusters` of distinct points: labels int64 `[m]` and the size threshold M."""
    order = np.random.default_rng(seed).permutation(len(x))
    x, weight_n = centred(x), weight.astype(np.float32)
    # Nodes in the order of their making: members order[start : start + points].
    start, points, mass = np.array([0]), np.array([len(x)]), np.array([weight.sum()])
    above, split = mass + 1, np.array([False])  # mass of the parent
    while True:
        children = fan_out(mass, points)
        threshold = size_threshold(mass, children, max_clusters)
        inner = (children > 1) & (mass > threshold)
        todo = np.flatnonzero(inner & ~split)
        if not len(todo):
            break
        split[todo] = True
        k = children[todo]
        new_points = split_nodes(x, weight_n, order, start[todo], points[todo], k)
        # Children of a node lie side by side where it lay.
        begin = np.cumsum(new_points) - new_points
        new_start = begin + np.repeat(start[todo] - begin[np.cumsum(k) - k], k)
        total = np.concatenate([[0], np.cumsum(weight[order])])
        start, points = np.append(start, new_start), np.append(points, new_points)
        mass = np.append(mass, total[new_start + new_points] - total[new_start])
        above = np.append(above, np.repeat(mass[todo], k))
        split = np.append(split, np.zeros(len(new_start), bool))
    leaf = np.flatnonzero((above > threshold) & ~inner)
    leaf = leaf[np.argsort(start[leaf])]
    labels = np.empty(len(x), np.int64)
    labels[order] = np.repeat(np.arange(len(leaf)), points[leaf])
    return labels, int(threshold)


def first_equal(x) -> np.ndarray:
    """First row that equals each row of float32 `[n, D]`, int64 `[n]`; 0 and -0 are equal."""
    bits = np.ascontiguousarray(x, np.float32) + np.float32(0)  # makes 0 of -0
    bits = bits.view(np.uint32)
    factor = np.random.default_rng(0).integers(0, 2**63, bits.shape[1], np.uint64) * 2 + 1
    _, first, place = np.unique(
        np.einsum("nd,d->n", bits, factor), return_index=True, return_inverse=True
    )
    if not np.array_equal(bits[first][place], bits):  # two rows with one hash
        _, first, place = np.unique(bits, axis=0, return_index=True, return_inverse=True)
    return first[place.reshape(-1)]


def centred(x) -> np.ndarray:
    """`x - mean` with a column of ones, float32 `[m, D + 1]`.

    Squared distances by way of a product lose less in float32 near the origin; the column carries
    the norms of the centres in one direction and the weights of the clusters in the other.
    """
    x = x - x.mean(0, dtype=np.float64).astype(np.float32)
    return np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)


def fan_out(mass, points) -> np.ndarray:
    """Children of nodes if they are split, int64; 1: of a single point there is no split."""
    k = np.rint(np.cbrt(mass)).astype(np.int64)
    k -= k**3 > mass
    return np.minimum(np.maximum(k, 2), points)


def size_threshold(mass, children, max_clusters: int) -> int:
    """Least M for which splitting all given nodes heavier than M leaves at most `max_clusters`."""
    heaviest = np.argsort(-mass, kind="stable")
    leaves = 1 + np.cumsum(children[heaviest] - 1)
    over = np.searchsorted(leaves, max_clusters, "right")
    return mass[heaviest[over]] if over < len(mass) else 0


def split_nodes(x, weight, order, start, points, k) -> np.ndarray:
    """k-means of several nodes; brings the members of each child together in `order`.

    A node comes out the same, to the bit, whatever nodes are split with it.

    Args:
      x: float32 `[m, D + 1]`, see `centred`.
      weight: float32 `[m]`.
      order: int64 `[m]`, changed in place.
      start, points, k: int64 `[nodes]`, the members order[start : start + points] and children.

    Returns:
      int64 `[k.sum()]`, points of all children.
    """
    width = padded_width(points)
    sizes = [None] * len(start)
    _, group = np.unique(np.stack([k, width]), axis=1, return_inverse=True)
    by_group = np.argsort(group.reshape(-1), kind="stable")
    for nodes in np.split(by_group, np.flatnonzero(np.diff(group.reshape(-1)[by_group])) + 1):
        k_here, slot = k[nodes[0]], np.arange(width[nodes[0]])
        inside = slot < points[nodes, None]
        place = start[nodes, None] + np.where(inside, slot, 0)
        rows = order[place]
        label = cluster(x, rows, np.where(inside, weight[rows], 0), inside, k_here)
        by_label = np.argsort(np.where(inside, label, k_here), axis=1, kind="stable")
        order[place[inside]] = np.take_along_axis(rows, by_label, axis=1)[inside]
        for node, counts in zip(nodes, count_labels(label, inside, k_here), strict=True):
            sizes[node] = counts
    return np.concatenate(sizes)


def padded_width(points) -> np.ndarray:
    """Array width that nodes of so many points share: four an octave, so at most 1/4 is waste."""
    step = 2 ** np.maximum(np.frexp(points)[1] - 3, 0)
    return np.where(points > EXACT_WIDTH, points, -(-points // step) * step)


def count_labels(label, inside, k: int) -> np.ndarray:
    """Members of every cluster, int64 `[B, k]`."""
    cell = label + k * np.arange(len(label))[:, None]
    return np.bincount(cell[inside], minlength=k * len(label)).reshape(-1, k)


def cluster(x, rows, weight_bs, inside, k: int) -> np.ndarray:
    """k-means of B nodes of at most S points: labels int64 `[B, S]`, no cluster empty.

    Lloyd's rounds on the first SAMPLE * k points of each node, from its first k points.

    Args:
      x: float32 `[m, D + 1]`.
      rows: int64 `[B, S]`, rows of `x`.
      weight_bs: float32 `[B, S]`, 0 on padding.
      inside: bool `[B, S]`, False on padding, which comes last.
    """
    x_bsd = x[rows]
    sample_bsd, sample_bs = x_bsd[:, : SAMPLE * k], weight_bs[:, : SAMPLE * k]
    centre_bkd = x_bsd[:, :k]
    label = nearest(sample_bsd, centre_bkd)
    for _ in range(ITERATIONS):
        member_bks = np.where(label[:, None] == np.arange(k)[:, None], sample_bs[:, None], 0)
        total_bkd = member_bks @ sample_bsd
        mass_bk1 = total_bkd[..., -1:]
        centre_bkd = np.where(mass_bk1 > 0, total_bkd / np.maximum(mass_bk1, 1), centre_bkd)
        before, label = label, nearest(sample_bsd, centre_bkd)
        if np.array_equal(before, label):
            break
    if len(inside[0]) > SAMPLE * k:
        label = nearest(x_bsd, centre_bkd)
    for b in np.flatnonzero((count_labels(label, inside, k) == 0).any(1)):
        n = inside[b].sum()
        distance = ((x_bsd[b, :n] - centre_bkd[b, label[b, :n]]) ** 2).sum(1)
        label[b, :n] = fill_empty(label[b, :n], distance, k)
    return label


def nearest(x_bsd, centre_bkd) -> np.ndarray:
    """Nearest centre by squared distance, int64 `[B, S]`."""
    score_bkd = centre_bkd.copy()
    score_bkd[..., -1] = -0.5 * (centre_bkd[..., :-1] ** 2).sum(-1)
    return (x_bsd @ score_bkd.swapaxes(1, 2)).argmax(-1)


def fill_empty(label, distance, k: int) -> np.ndarray:
    """Gives every empty cluster the farthest point of those that are not alone; `[n]`, n >= k."""
    label, counts = label.copy(), np.bincount(label, minlength=k)
    for empty in np.flatnonzero(counts == 0):
        point = np.argmax(np.where(counts[label] > 1, distance, -1))
        counts[label[point]] -= 1
        label[point], counts[empty], distance[point] = empty, 1, 0
    return label
