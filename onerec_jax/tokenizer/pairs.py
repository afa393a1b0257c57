"""Pairs of items that the same people like: what item vectors are aligned with.

OneRec Technical Report (arXiv 2506.13695), section 2.1.1, names two kinds. User-to-item: a target
that a user liked, with the collaboratively most similar of what the user liked before it.
Item-to-item: neighbours under Swing (arXiv 2010.05525), which trusts two common users of two items
the more, the less else these users share. Both come from the training part of the log only.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
import scipy.sparse as sp
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd

from onerec_jax.data.features import positive_actions
from onerec_jax.data.schema import Dataset
from onerec_jax.data.splits import Split, train_mask
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.inputs import PositiveRule
from onerec_jax.tokenizer.item_pairs import ItemPairs

BLOCK = 8_000_000
"""Most entries of a sparse product made at once: up to 30 bytes each, temporaries included."""
SCORES = 16_000_000
"""Scores of item pairs that Swing holds, 12 bytes each, twice that while adding."""
TILE = 4_000_000
"""Cosines and vector entries that user-to-item holds, up to 8 bytes each, masks included."""


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """How item pairs are mined (spec: OneRec Technical Report, section 2.1.1)."""

    swing: bool = True
    """Mine item-to-item pairs by Swing."""
    user_to_item: bool = True
    """Mine user-to-item pairs."""
    user_weight: Literal["inverse-sqrt", "none"] = "inverse-sqrt"
    """Weight of a user in Swing: 1 / sqrt(items of the user), or 1 for everybody."""
    alpha: float = 1.0
    """Swing's smoothing, added to the overlap of two users; larger ones punish overlap less."""
    max_user_items: int = 200
    """Items of a user that Swing sees, the latest kept."""
    max_item_users: int = 500
    """Users of an item that Swing sees. Every item draws in the same random order of users, so
    that popular items keep users in common."""
    min_support: int = 2
    """Common users that two items need; with fewer than two Swing is 0."""
    top_k: int = 20
    """Swing neighbours kept of each item."""
    latest: int = 50
    """Positive actions before a target among which user-to-item looks for the most similar."""
    vector_dim: int = 64
    """Width of the collaborative vectors that say which is most similar."""
    seed: int = 0

    def __post_init__(self):
        require_at_least(self, "tokenizer.pairs.", alpha=0, max_user_items=2, max_item_users=2)
        require_at_least(
            self, "tokenizer.pairs.", min_support=2, top_k=1, latest=1, vector_dim=1, seed=0
        )
        if self.user_weight not in ("inverse-sqrt", "none"):
            raise InputError(
                f"--tokenizer.pairs.user-weight {self.user_weight}: choose inverse-sqrt or none"
            )
        if not (self.swing or self.user_to_item):
            raise InputError(
                "--tokenizer.pairs.no-swing and --tokenizer.pairs.no-user-to-item leave nothing: "
                "drop one"
            )


def mine_pairs(
    dataset: Dataset,
    split: Split,
    cfg: PairConfig,
    positive: PositiveRule = PositiveRule(),  # noqa: B008 (frozen)
    say: Callable[[str], None] = print,
) -> ItemPairs:
    """Pairs of both kinds from the positive actions of the training part.

    Args:
      positive: which actions count, as for the positive-feedback pathway.
      say: prints one line of progress, every few seconds.

    Returns:
      Swing pairs by item and falling score, then user-to-item pairs by target and other item.

    Raises:
      InputError: no pair was found.
    """
    keep = train_mask(dataset, split) & positive_actions(dataset, positive)
    user_row = dataset.interactions["user_row"].to_numpy()[keep]
    item_row = dataset.item_rows[keep]
    parts = []
    if cfg.swing:
        parts.append(swing(user_row, item_row, dataset.num_items, cfg, say))
    if cfg.user_to_item:
        parts.append(user_to_item(user_row, item_row, dataset.num_items, cfg, say=say))
    pairs = ItemPairs(
        *(
            np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(ItemPairs)
        )
    )
    if not len(pairs):
        raise InputError(
            f"{dataset.name}: no item pairs in {len(item_row):,} positive training actions; "
            "give a longer log, lower --tokenizer.pairs.min-support or widen the rule of what is "
            "positive"
        )
    return pairs


def swing(
    user_row, item_row, num_items: int, cfg: PairConfig, say: Callable[[str], None] = print
) -> ItemPairs:
    """Nearest neighbours of every item by Swing (arXiv 2010.05525).

    swing(i, j) = sum over users u != v of both items of w_u w_v / (alpha + |I_u & I_v|), where I_u
    are the items of u. The caps thin the log first, those on users before those on items; the
    formula then holds exactly for what is left, weights included.

    Never an items-by-items or users-by-users matrix: memory follows BLOCK and SCORES, and a log
    with more item pairs than SCORES is gone through again for every further range of items.

    Args:
      user_row, item_row: int [N], one action each, a user's in the order of time. Repeated actions
        of a user on an item count once, as the latest.
      num_items: I, items of the catalogue.
      say: prints one line of progress, every few seconds.

    Returns:
      By item and falling score, at most `cfg.top_k` an item; equal scores by lower row.
    """
    log = _thinned(np.asarray(user_row, np.int64), np.asarray(item_row, np.int64), num_items, cfg)
    users = log.T.tocsr()
    weight = np.ones(log.shape[0])
    if cfg.user_weight == "inverse-sqrt":
        weight = 1 / np.sqrt(np.maximum(np.diff(log.indptr), 1))
    say = _every_few_seconds(say)
    parts, low = [], 0
    while low < num_items:
        scores = _swing_scores(log, users, weight, low, cfg.alpha, say)
        parts.append(_best(scores, users, low, cfg))
        low += scores.shape[0]
    first, second, score = (np.concatenate(part) for part in zip(*parts, strict=True))
    kind = np.zeros(len(first), np.uint8)
    return ItemPairs(first.astype(np.int32), second.astype(np.int32), score, kind)


def user_to_item(
    user_row,
    item_row,
    num_items: int,
    cfg: PairConfig,
    vectors=None,
    say: Callable[[str], None] = print,
) -> ItemPairs:
    """Every target with the most similar of the user's latest positive items before it.

    The paper takes similarity from the item embeddings of a U2I retrieval model in production; we
    fit `collaborative_vectors` on the same actions. A cosine of 0 or less makes no pair, nor does
    the target itself, seen before.

    Args:
      user_row, item_row: int [N], one positive action each, a user's in the order of time.
      num_items: I, items of the catalogue.
      vectors: float [I, D] of another model to measure similarity by, any length.
      say: prints one line of progress, every few seconds.

    Returns:
      Distinct pairs (target, other) with their cosine, by target, then other item.
    """
    order = np.argsort(user_row, kind="stable")
    user, item = np.asarray(user_row)[order], np.asarray(item_row, np.int64)[order]
    if vectors is None:
        say("user-to-item: fitting collaborative vectors")
        vectors = collaborative_vectors(user, item, num_items, cfg.vector_dim, cfg.seed)
    vectors = normalize(np.asarray(vectors, np.float32))

    # Actions in groups of `latest`: the candidates of a group are itself and the group before it.
    size = cfg.latest
    lag = np.arange(size)[:, None] + size - np.arange(2 * size)
    near = (lag >= 1) & (lag <= size)
    groups = -(-len(item) // size)
    at_once = max(1, TILE // (size * (2 * size + 3 * vectors.shape[1])))
    say, found = _every_few_seconds(say), [np.zeros((3, 0))]
    for start in range(0, groups, at_once):
        say(f"user-to-item: {start / groups:.0%} of the actions")
        group = np.arange(start, min(start + at_once, groups))[:, None]
        place = group * size + np.arange(size)
        target = np.minimum(place, len(item) - 1)
        other = np.clip((group - 1) * size + np.arange(2 * size), 0, len(item) - 1)
        cosine = vectors[item[target]] @ vectors[item[other]].transpose(0, 2, 1)
        fits = user[target][:, :, None] == user[other][:, None, :]
        fits &= item[target][:, :, None] != item[other][:, None, :]
        fits &= near
        cosine[~fits] = 0
        best = cosine.argmax(-1)[..., None]
        value = np.take_along_axis(cosine, best, -1)[..., 0]
        chosen = np.take_along_axis(other[:, None, :], best, -1)[..., 0]
        good = (value > 0) & (place < len(item))
        found.append(np.stack([item[target[good]], item[chosen[good]], value[good]]))
    first, second, score = np.concatenate(found, axis=1)
    _, once = np.unique(first * num_items + second, return_index=True)
    return ItemPairs(
        first[once].astype(np.int32),
        second[once].astype(np.int32),
        score[once].astype(np.float32),
        np.full(len(once), 1, np.uint8),
    )


def collaborative_vectors(user_row, item_row, num_items: int, dim: int, seed: int) -> np.ndarray:
    """Item vectors from who acted on what: a truncated SVD of the user-by-item matrix.

    The entry of user u and item i is 1 / sqrt(items of u * users of i); an item's vector is its
    right singular vectors times the singular values, so that dot products approximate those of the
    columns. Repeated actions count once.

    Args:
      user_row, item_row: int [N].
      dim: width, fewer if the matrix is smaller.

    Returns:
      float32 [num_items, width]; zero where nobody acted on the item.
    """
    if not len(item_row):
        return np.zeros((num_items, 1), np.float32)
    _, users = np.unique(user_row, return_inverse=True)
    log = _incidence(users, np.asarray(item_row), num_items)
    by_user, by_item = log.sum(1), log.sum(0)
    row, col = log.nonzero()
    log = sp.csr_array((1 / np.sqrt(by_user[row] * by_item[col]), (row, col)), shape=log.shape)
    dim = max(1, min(dim, min(log.shape) - 1))
    _, values, axes = randomized_svd(log, dim, n_iter=5, random_state=seed)
    return (axes.T * values).astype(np.float32)


def _incidence(user, item, num_items) -> sp.csr_array:
    """int32 [users, items]: 1 where a user acted on an item, indices sorted."""
    shape = (int(user.max(initial=-1)) + 1, num_items)
    log = sp.csr_array((np.ones(len(user), np.int32), (user, item)), shape=shape)
    log.sum_duplicates()
    log.data[:] = 1
    return log


def _thinned(user, item, num_items, cfg) -> sp.csr_array:
    """The log as a matrix like `_incidence`, with at most the capped entries a row and column."""
    key = (user * num_items + item)[::-1]
    _, back = np.unique(key, return_index=True)  # the first from behind is the latest
    latest = len(user) - 1 - back
    user, item = user[latest], item[latest]
    kept = _place_within(user, -latest) < cfg.max_user_items
    user, item = user[kept], item[kept]
    draw = np.random.default_rng(cfg.seed).permutation(user.max(initial=-1) + 1)
    kept = _place_within(item, draw[user]) < cfg.max_item_users
    return _incidence(user[kept], item[kept], num_items)


def _place_within(group, rank) -> np.ndarray:
    """int64 [N]: how many of the same group have a lower rank (ranks differ within a group)."""
    order = np.lexsort((rank, group))
    ordered = group[order]
    place = np.empty(len(group), np.int64)
    place[order] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return place


def _cuts(cost, limit) -> list[int]:
    """Bounds of runs whose cost is at most `limit` together, or that are one entry long."""
    total, bounds = np.cumsum(cost), [0]
    while bounds[-1] < len(total):
        spent = total[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(max(bounds[-1] + 1, int(np.searchsorted(total, spent + limit, "right"))))
    return bounds


def _swing_scores(log, users, weight, low, alpha, say) -> sp.csr_array:
    """Swing of items `low`, low + 1, … with all items, float64 [rows, items].

    As many rows as hold about SCORES entries, at least one. The sum over pairs of users is a matrix
    product: with Z [pairs, items] the common items of each pair, it is Z^T diag(2 w_u w_v /
    (alpha + overlap)) Z. Pairs with one common item say nothing of two items and are left out.
    """
    lengths = np.diff(log.indptr)
    scores = sp.csr_array((log.shape[1] - low, log.shape[1]))
    # Partners that a user meets, once for every common item.
    meets = log @ np.diff(users.indptr).astype(np.int64)
    bounds = _cuts(meets, BLOCK)
    for start, end in zip(bounds, bounds[1:], strict=False):
        again = f", items from {low:,} on" if low else ""
        say(f"swing: {start / len(lengths):.0%} of the users{again}")
        overlap = (log[start:end] @ users).tocoo()
        u, v = overlap.coords
        telling = (overlap.data >= 2) & (v > u + start)
        u, v, common = u[telling] + start, v[telling], overlap.data[telling].astype(np.int64)
        del overlap, telling
        parts = _cuts(lengths[u] + lengths[v] + common**2, BLOCK)
        for a, b in zip(parts, parts[1:], strict=False):
            shared = log[u[a:b]].multiply(log[v[a:b]]).tocsr()
            pair = 2 * weight[u[a:b]] * weight[v[a:b]] / (alpha + common[a:b])
            weighted = shared.astype(np.float64)
            weighted.data *= np.repeat(pair, common[a:b])
            rows = slice(low, low + scores.shape[0])
            scores = scores + shared.T.tocsr()[rows] @ weighted
            if scores.nnz > SCORES:  # later ranges of items see the log again
                scores = scores[: max(1, np.searchsorted(scores.indptr, SCORES // 2, "right") - 1)]
    return scores


def _best(scores, users, low, cfg) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First, second and score of the `cfg.top_k` best of every row of `scores`."""
    parts = [(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))]
    bounds = _cuts(np.diff(scores.indptr), BLOCK)
    for start, end in zip(bounds, bounds[1:], strict=False):
        block = scores[start:end].tocoo()
        first, second = block.coords
        score = block.data.astype(np.float32)  # sums in another order tie again
        keep = first + low + start != second
        if cfg.min_support > 2:  # two common users is what any score takes
            keep &= _support(users, first + low + start, second) >= cfg.min_support
        first, second, score = first[keep], second[keep], score[keep]
        order = np.lexsort((second, -score, first))
        first, second, score = first[order], second[order], score[order]
        top = np.arange(len(first)) - np.searchsorted(first, first) < cfg.top_k
        parts.append((first[top] + low + start, second[top], score[top]))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def _support(users, first, second) -> np.ndarray:
    """int64 [P]: users that items `first` and `second` have in common."""
    support = np.zeros(len(first), np.int64)
    lengths = np.diff(users.indptr)
    bounds = _cuts(lengths[first] + lengths[second], BLOCK)
    for a, b in zip(bounds, bounds[1:], strict=False):
        support[a:b] = users[first[a:b]].multiply(users[second[a:b]]).sum(1)
    return support


def _every_few_seconds(say: Callable[[str], None], seconds: float = 5.0) -> Callable[[str], None]:
    """`say`, silent until `seconds` have gone by since the start or the last line."""
    last = time.monotonic()

    def sometimes(line):
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            say(line)

    return sometimes
