"""Sessions of a log, and which of them are worth learning from (RSFT).

OneRec Technical Report (arXiv 2506.13695), post-training: of the exposure sessions, the bottom half
by play duration is left out of supervised fine-tuning.

Axes: N actions.
"""

import numpy as np

from onerec_jax.data.schema import Dataset
from onerec_jax.data.splits import Split, train_mask

GAP_S = 1800
"""Seconds without an action after which a new session begins, where the log names none."""


def session_of_action(dataset: Dataset, gap_s: int = GAP_S) -> np.ndarray:
    """Number of each action's session, int64 `[N]`, ascending; no session is of two users.

    The column `session`; without it, a user's actions with less than `gap_s` from one to the next;
    without times, each action is a session.
    """
    user = dataset.interactions["user_row"].to_numpy()
    begins = np.ones(len(user), bool)
    session, time_s = dataset.column("session"), dataset.column("time_s")
    if session is not None:
        begins[1:] = np.diff(session) != 0
    elif time_s is not None:
        begins[1:] = np.diff(time_s) >= gap_s
    begins[1:] |= np.diff(user) != 0
    return np.cumsum(begins) - 1


def well_played(dataset: Dataset, split: Split, drop: float) -> np.ndarray | None:
    """Actions of the sessions that were watched longest, bool `[N]`.

    Sessions of the training part are ranked by their seconds of play, summed over their training
    actions; the lowest share `drop` goes, of equals the earlier in the log.

    Args:
      drop: share of the sessions, from 0 to below 1.

    Returns:
      None where nothing can be told, for the log holds no play times.
    """
    playtime = dataset.column("playtime_s")
    if playtime is None:
        return None
    session, training = session_of_action(dataset), train_mask(dataset, split)
    seconds = np.bincount(session, np.where(training, np.nan_to_num(playtime), 0))
    there = np.flatnonzero(np.bincount(session, training))
    order = there[np.argsort(seconds[there], kind="stable")]
    kept = np.ones(len(seconds), bool)
    kept[order[: int(drop * len(order))]] = False
    return kept[session] & training
