"""Whole lists for users or histories, by a run that was trained on session lists (OneRec V0)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from onerec_jax.distributed import fetch
from onerec_jax.errors import InputError
from onerec_jax.generation.session_generator import items_of_leaves
from onerec_jax.serving.recommender import PART, Recommended, Recommender
from onerec_jax.sharding import put_batch


@dataclasses.dataclass(frozen=True, eq=False)
class RecommendedList:
    """The most probable list of one user."""

    items: list[Recommended]
    """In the order of the list. Their `logp` is that of the list."""
    logp: float
    """log P(list | user)."""


def recommend_lists(
    recommender: Recommender, histories: Sequence, *, beam_width: int = 128, **options
) -> list[RecommendedList]:
    """The most probable list for every history; an empty one where too few items may be given.

    Args:
      beam_width: lists that the search holds.
      options: as `Recommender.query`, but for `n`: lists are as long as the model's.

    Raises:
      InputError: the run was not trained on lists, or as `Recommender.query`.
    """
    run = recommender.run
    items = run.model_config.session_items
    if items == 1:
        raise InputError(
            f"{run.folder} generates single items: train one with --targets sessions for lists"
        )
    made = recommender.generator
    queries = [recommender.query(history, n=items, **options) for history in histories]
    found = []
    for start in range(0, len(queries), PART):
        part = queries[start : start + PART]
        batch, filter = recommender.gather(part)
        beams = fetch(
            made.search_lists(
                recommender.variables,
                put_batch(batch, recommender.mesh),
                width=beam_width,
                trie=made.trie,
                filter=None if filter is None else put_batch(filter, recommender.mesh),
            )
        )
        for query, leaf, logp in zip(part, beams.leaf, beams.logp, strict=False):
            out = query.exclude
            if query.allowed is not None:
                others = np.setdiff1d(np.arange(len(made.ids.sids)), query.allowed)
                out = np.concatenate([out, others])
            (rows,) = items_of_leaves(leaf[None, :1], made.offsets, made.items, [out])[0]
            score = float(logp[0])
            found.append(
                RecommendedList(
                    [recommender.recommended(row, score) for row in rows if row >= 0], score
                )
            )
    return found
