"""Popularity and the first-order Markov chain, and the driver that ranks any scoring function.

Sequences come as CSR: `offsets` int64 [U + 1] and `item_rows` int32 [N]; the actions of user u are
item_rows[offsets[u]:offsets[u + 1]] in order. A place in them is counted from the user's first
action. `train_end` int32 [U] is where the training part ends (exclusive); models are fitted on it
and on nothing else. `target_at` int32 [U] is the place of the action to predict, -1 for a user
without one; the history is everything before it, so the test history holds the validation item.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from scipy import sparse

from onerec_jax.evaluation.ranking import target_ranks

ScoreFn = Callable[[Sequence[np.ndarray]], np.ndarray | jax.Array]
"""Histories, int32 [length] each, oldest first and possibly empty -> float32 scores [B, I].

A row of equal scores means popularity: the tie rule of `target_ranks` orders it so.
"""


def _in_training(offsets: np.ndarray, train_end: np.ndarray) -> np.ndarray:
    """bool [N], True for the actions of the training part."""
    lengths = np.diff(offsets)
    places = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return places < np.repeat(train_end, lengths)


def item_popularity(
    offsets: np.ndarray, item_rows: np.ndarray, train_end: np.ndarray, num_items: int
) -> np.ndarray:
    """int64 [I]: actions on each item in the training part."""
    return np.bincount(item_rows[_in_training(offsets, train_end)], minlength=num_items)


def fit_popularity(
    offsets: np.ndarray, item_rows: np.ndarray, train_end: np.ndarray, num_items: int
) -> ScoreFn:
    """Scores every item by its actions in the training part, the same for every user."""
    counts = item_popularity(offsets, item_rows, train_end, num_items).astype(np.float32)
    return lambda histories: np.broadcast_to(counts, (len(histories), num_items))


def fit_markov(
    offsets: np.ndarray, item_rows: np.ndarray, train_end: np.ndarray, num_items: int
) -> ScoreFn:
    """First-order Markov chain: counts of the item that followed the history's last item.

    Counted over neighbours within each user's training part and kept sparse (at most one entry an
    action). An empty history, or a last item never followed by another, scores 0 throughout.
    """
    users = np.repeat(np.arange(len(train_end)), np.diff(offsets))
    training = _in_training(offsets, train_end)
    pair = training[1:] & (users[1:] == users[:-1])
    source, following = item_rows[:-1][pair], item_rows[1:][pair]
    ones = np.ones(len(source), np.float32)
    # One row more than items: the empty row that an empty history points at.
    counts = sparse.csr_array((ones, (source, following)), shape=(num_items + 1, num_items))

    def score(histories: Sequence[np.ndarray]) -> np.ndarray:
        last = [history[-1] if len(history) else num_items for history in histories]
        return counts[last].toarray()

    return score


def evaluate_baseline(
    score_fn: ScoreFn,
    offsets: np.ndarray,
    item_rows: np.ndarray,
    target_at: np.ndarray,
    tie_order: np.ndarray,
    *,
    exclude_seen: bool = False,
    batch_users: int = 512,
) -> np.ndarray:
    """Ranks every user's target over the whole catalogue.

    Args:
        score_fn: scores a batch of histories; it never sees the target or anything after it.
        offsets, item_rows, target_at: see the module's docstring.
        tie_order: int32 [I] from `ranking.tie_order`.
        exclude_seen: leave the items of the history out of the candidates. A target that the
            user has seen before is then NOT_RANKED.
        batch_users: users scored at once; a batch of scores takes 4 * batch_users * I bytes.

    Returns:
        int32 ranks, 0 is the top, of the users with a target (target_at >= 0), in user order.
    """
    users = np.flatnonzero(target_at >= 0)
    ranks = [np.empty(0, np.int32)]
    for start in range(0, len(users), batch_users):
        batch = users[start : start + batch_users]
        first = offsets[batch]
        at = first + target_at[batch]
        histories = [item_rows[a:b] for a, b in zip(first, at, strict=True)]
        # The last batch is filled up with empty histories, so that one shape is compiled.
        fill = batch_users - len(batch)
        histories += [item_rows[:0]] * fill
        targets = np.pad(item_rows[at], (0, fill))
        excluded = _seen(histories, len(tie_order)) if exclude_seen else None
        batch_ranks = target_ranks(score_fn(histories), targets, tie_order, excluded)
        ranks.append(np.asarray(batch_ranks)[: len(batch)])
    return np.concatenate(ranks)


def _seen(histories: Sequence[np.ndarray], num_items: int) -> np.ndarray:
    """bool [B, I], True for the items in each history."""
    seen = np.zeros((len(histories), num_items), bool)
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    seen[rows, np.concatenate(histories)] = True
    return seen
