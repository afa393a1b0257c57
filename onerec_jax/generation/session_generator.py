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
