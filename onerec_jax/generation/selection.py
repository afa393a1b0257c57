"""From beams to a list by a second opinion: generate W IDs, score all of their items, keep n.

The report adds a reward model behind the beams and finds most of the online gain there (OneRec
Technical Report, Table 12). Any callable will do; two that need no model are here.

Axes: B users, W beams, m candidates, n places of a list, D width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from onerec_jax.errors import InputError
from onerec_jax.generation.generator import drop_seen, expand_leaves


class Scorer(Protocol):
    """Scores of candidates, higher is better."""

    def __call__(self, users: Sequence[Any], items: np.ndarray) -> np.ndarray:
        """Args:
          users: B of what this scorer knows users by: rows, histories, features.
          items: item rows int32 `[B, m]`; -1 = none, whose score is not read.

        Returns:
          Float `[B, m]`.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Popularity:
    """The number of times that an item was acted on, the same for every user."""

    count: np.ndarray  # int [items]

    def __call__(self, users, items):
        return self.count[items]


@dataclasses.dataclass(frozen=True, eq=False)
class VectorSimilarity:
    """Cosine of an item's vector and the mean direction of a user's history (item rows)."""

    vectors: np.ndarray  # float [items, D]

    def __call__(self, users, items):
        norm = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        unit = self.vectors / np.maximum(norm, 1e-12)
        taste = [unit[np.asarray(history, int)].sum(0) for history in users]
        taste = np.array(taste) / np.maximum(np.linalg.norm(taste, axis=1, keepdims=True), 1e-12)
        return np.einsum("bmd,bd->bm", unit[items], taste)


def candidates(leaf_bw, offsets, items) -> np.ndarray:
    """All items of all beams, in the order of beams and then of serving: int32 `[B, m]`, -1 = none.

    Args:
      As `expand_leaves`.
    """
    leaf = np.maximum(leaf_bw, 0)
    count = np.where(leaf_bw >= 0, offsets[leaf + 1] - offsets[leaf], 0)
    return expand_leaves(leaf_bw, offsets, items, int(count.sum(1).max(initial=1)))


def select(lists, users, score: Scorer, n: int, *, seen=None) -> np.ndarray:
    """The n candidates of each user that `score` likes best; equal scores keep their order.

    Args:
      lists: candidates int32 `[B, m]`, -1 = none.
      users: B of what `score` knows users by.
      seen: item rows to leave out, one array a user; None keeps all.

    Returns:
      Item rows int32 `[B, n]`, -1 where there are fewer.

    Raises:
      InputError: a candidate's score is NaN.
    """
    if seen is not None:
        lists = drop_seen(lists, seen, lists.shape[1])
    lists = np.pad(lists, ((0, 0), (0, max(n - lists.shape[1], 0))), constant_values=-1)
    scores = np.where(lists >= 0, score(users, lists), -np.inf)
    if np.isnan(scores).any():
        raise InputError(f"{type(score).__name__} gives NaN: an order needs numbers")
    order = np.lexsort((-scores, lists < 0), axis=1)[:, :n]  # none comes last, whatever the scores
    return np.take_along_axis(lists, order, axis=1)


def spread(lists, sids, n: int, at_most: int) -> np.ndarray:
    """The first n candidates of which no more than `at_most` share the first code of their IDs.

    A rule of diversity for lists whose items were chosen one by one: the first code is the coarsest
    cluster of content. Where the rule leaves fewer than n, those that it passed over fill up.

    Args:
      lists: candidates int `[B, m]`, best first, -1 = none.
      sids: int `[items, levels]`.
      at_most: 1 or more.

    Returns:
      Item rows int32 `[B, n]`, those that follow the rule first, each group in its order; -1 where
      there are fewer.
    """
    code = np.where(lists >= 0, sids[np.maximum(lists, 0), 0], -1)
    order = np.argsort(code, axis=1, kind="stable")
    ordered = np.take_along_axis(code, order, axis=1)
    place = np.arange(lists.shape[1])
    begins = np.ones(ordered.shape, bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    turn = np.empty_like(order)  # how many of its code come before each
    first = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    np.put_along_axis(turn, order, place - first, axis=1)
    group = np.where(lists < 0, 2, turn >= at_most)
    chosen = np.take_along_axis(lists, np.argsort(group, axis=1, kind="stable"), axis=1)[:, :n]
    short = n - chosen.shape[1]
    return np.pad(chosen, ((0, 0), (0, short)), constant_values=-1).astype(np.int32)


def diversity(lists, sids) -> np.ndarray:
    """How many different prefixes of semantic IDs each list holds.

    Args:
      lists: item rows int `[B, n]`, -1 = none.
      sids: int `[items, levels]`.

    Returns:
      Int `[B, levels]`: distinct codes of the first level, pairs of the first two, and so on.
    """
    found = np.zeros((len(lists), sids.shape[1]), int)
    for user, items in enumerate(lists):
        listed = sids[items[items >= 0]]
        for level in range(sids.shape[1]):
            found[user, level] = len(np.unique(listed[:, : level + 1], axis=0))
    return found
