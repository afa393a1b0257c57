"""Lists of items for users: whole ones by session beams, and point-wise ones to compare them with.

Axes: B users of a batch, U users in all, W beams, m items of a list.
"""

import dataclasses

import jax
import numpy as np

from onerec_jax.data.batches import BatchBuilder, padded_batches
from onerec_jax.data.examples import Examples
from onerec_jax.distributed import fetch, local_share
from onerec_jax.generation.beam import refuse_nan
from onerec_jax.generation.generator import Generator, drop_seen
from onerec_jax.generation.selection import candidates, spread
from onerec_jax.sharding import put_batch


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratedLists:
    """The n most probable lists of U users, best first."""

    items: np.ndarray  # int32 [U, n, m], item rows; -1 in lists that do not exist
    sid: np.ndarray  # int32 [U, n, m, levels]; -1 likewise
    logp: np.ndarray  # float32 [U, n], log P(list | user); -inf likewise


def session_lists(
    generator: Generator,
    variables,
    builder: BatchBuilder,
    examples: Examples,
    *,
    width: int = 128,
    items: int | None = None,
    n: int = 1,
    masked: bool = True,
    seen=None,
) -> GeneratedLists:
    """The best lists of every example, by beam search over whole lists.

    Args:
      generator: of a model of lists.
      width: lists that the search holds; those of V0.
      items: m of a list; None: as many as the model was trained on.
      n: lists of each, at most the width.
      masked: only IDs that exist; without, `items` are those of the IDs that do, -1 for others.
      seen: item rows to leave out, one array an example; None keeps every item. Needs `masked`.
    """
    assert masked or seen is None, "filters mask nodes of the trie"
    parts, start = [], 0
    trie = generator.trie if masked else None
    for batch, real in padded_batches(builder, examples, generator.batch_size):
        out, filter = None, None
        if seen is not None:
            out = list(seen[start : start + real])
            filter = generator.filters([*out, *[()] * (generator.batch_size - real)])
            filter = put_batch(local_share(filter), generator.mesh)
        batch = put_batch(local_share(batch), generator.mesh)
        found = generator.search_lists(
            variables, batch, width=width, items=items, trie=trie, filter=filter
        )
        found = fetch(found)
        refuse_nan(found)
        found = jax.tree.map(lambda x, real=real: x[:real, :n], found)
        leaf = found.leaf if masked else generator.ids.find(found.sid)
        rows = items_of_leaves(leaf, generator.offsets, generator.items, out)
        parts.append((rows, found.sid, found.logp))
        start += real
    return GeneratedLists(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def items_of_leaves(leaf_bwm, offsets, items, seen=None) -> np.ndarray:
    """The item behind each ID of lists: of those that share it the first in serving order.

    Args:
      leaf_bwm: int `[B, W, m]`, -1 = none.
      offsets, items: from `SemanticIds.items_by_leaf`.
      seen: item rows that a user must not be given, one array a user: the next one in order is
        taken, -1 if there is none.

    Returns:
      Item rows int32 `[B, W, m]`.
    """
    leaf = np.maximum(leaf_bwm, 0)
    found = np.where(leaf_bwm >= 0, items[offsets[leaf]], -1).astype(np.int32)
    for user, known in enumerate(seen if seen is not None else ()):
        for place in np.argwhere(np.isin(found[user], known) & (leaf_bwm[user] >= 0)):
            here = leaf[user][tuple(place)]
            free = items[offsets[here] : offsets[here + 1]]
            free = free[~np.isin(free, known)]
            found[user][tuple(place)] = free[0] if len(free) else -1
    return found


def point_wise_lists(
    generator: Generator,
    variables,
    builder: BatchBuilder,
    examples: Examples,
    items: int,
    *,
    at_most: int = 0,
    seen=None,
) -> np.ndarray:
    """Lists of the items that are most probable one by one, int32 `[U, items]`, -1 = none.

    What a point-wise model answers where a model of lists answers with a list: the best items of
    its beams, or with `at_most` those of `selection.spread`.

    Args:
      generator: of a point-wise model, or of a model of lists for its first items.
      at_most: items of a list that may share the first code of their semantic IDs; 0: any number.
      seen: item rows to leave out, one array an example.
    """
    found = []
    for beams in generator.beams(variables, builder, examples):
        lists = candidates(beams.leaf, generator.offsets, generator.items)
        if seen is not None:
            first = sum(map(len, found))
            lists = drop_seen(lists, seen[first : first + len(lists)], lists.shape[1])
        if at_most:
            lists = spread(lists, generator.ids.sids, items, at_most)
        short = max(items - lists.shape[1], 0)
        found.append(np.pad(lists, ((0, 0), (0, short)), constant_values=-1)[:, :items])
    return np.concatenate(found)


def item_candidates(
    generator: Generator, variables, builder: BatchBuilder, examples: Examples, *, seen
) -> tuple[np.ndarray, np.ndarray]:
    """All unseen items of the beams of a point-wise model, and how probable it finds each.

    Items that share an ID share its probability alike.

    Args:
      seen: item rows to leave out, one array an example.

    Returns:
      Item rows int32 `[U, C]`, in the order of beams, -1 = none, and log-probabilities float32
      `[U, C]`, -inf likewise.
    """
    items, scores, start = [], [], 0
    count = np.diff(generator.offsets)
    for beams in generator.beams(variables, builder, examples):
        found = candidates(beams.leaf, generator.offsets, generator.items)
        known = seen[start : start + len(found)]
        start += len(found)
        lists = drop_seen(found, known, found.shape[1])
        for row, leaf, logp in zip(lists, beams.leaf, beams.logp, strict=True):
            of_leaf = np.full(len(count), -np.inf, np.float32)
            alive = leaf >= 0
            of_leaf[leaf[alive]] = logp[alive] - np.log(count[leaf[alive]])
            items.append(row)
            scores.append(np.where(row >= 0, of_leaf[generator.ids.leaf_of_item[row]], -np.inf))
    longest = max(map(len, items))

    def padded(rows, value):
        return np.stack([np.pad(x, (0, longest - len(x)), constant_values=value) for x in rows])

    return padded(items, -1), padded(scores, -np.inf).astype(np.float32)


def drawn_lists(
    item_uc: np.ndarray,
    logp_uc: np.ndarray,
    users: np.ndarray,
    sids: np.ndarray,
    *,
    number: int,
    items: int,
    at_most: int = 0,
    seed: int = 0,
) -> np.ndarray:
    """Lists of a point-wise model: its best items, and lists drawn by their probabilities.

    The first list holds the candidates in the order given. Each further one is drawn item by item
    without replacement, each item as probable as the model finds it among those that are left
    (Plackett-Luce, by Gumbel noise). The noise belongs to (seed, user, list, item): models that are
    compared draw with the same.

    Args:
      item_uc: candidates int `[U, C]`, best first, -1 = none.
      logp_uc: float `[U, C]`, log-probabilities up to a constant of the user.
      users: int `[U]`, user rows.
      sids: int `[I, levels]`.
      number: W.
      items: m of a list.
      at_most: items of a list that may share the first code, by `selection.spread`; 0: any number.

    Returns:
      Item rows int32 `[U, W, m]`, -1 where there are too few.
    """
    made = []
    for user, row, logp in zip(users, item_uc, logp_uc, strict=True):
        noise = np.random.default_rng((seed, int(user))).gumbel(size=(number - 1, len(sids)))
        key = np.where(row >= 0, logp + noise[:, row], -np.inf)
        order = np.argsort(-key, axis=1, kind="stable")
        lists = np.concatenate([row[None], row[order]])
        if at_most:
            lists = spread(lists, sids, items, at_most)
        short = max(items - lists.shape[1], 0)
        made.append(np.pad(lists, ((0, 0), (0, short)), constant_values=-1)[:, :items])
    return np.stack(made).astype(np.int32)
