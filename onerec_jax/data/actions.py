"""A history that comes with a request: actions as dicts, encoded as those of the data set are."""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from onerec_jax.data.features import ActionLog, action_log, positive_actions
from onerec_jax.data.schema import FEEDBACK, Dataset
from onerec_jax.errors import InputError
from onerec_jax.inputs import FeatureSpec

ACTION_COLUMNS = ("time_s", "rating", "playtime_s", "duration_s", *FEEDBACK)
"""What may be said of an action beside its item, where the data set has such a column."""


def log_from_actions(
    rows: np.ndarray, actions: Sequence[Mapping], dataset: Dataset, spec: FeatureSpec
) -> ActionLog:
    """An `ActionLog` of one unknown user.

    What an action does not say is unknown, with two exceptions: without times all actions count as
    done just now, and one without any feedback counts as positive (as in `log_from_histories`).

    Args:
      rows: int32 `[n]`, item row of each action, oldest first.
      actions: `[n]`, values by name of ACTION_COLUMNS; `item_id` is not read.
      dataset: whose columns may be given.

    Raises:
      InputError: names the action and the value that is wrong.
    """
    known = [name for name in ACTION_COLUMNS if name in dataset.interactions.columns]
    for place, action in enumerate(actions):
        for name, value in action.items():
            if name != "item_id" and value is not None:
                _check(f"action {place} of the history: {name}", name, value, known)
    values = {name: [action.get(name) for action in actions] for name in known}
    times = values.pop("time_s", [])
    timed = [value is not None for value in times]
    if any(timed) and not all(timed):
        raise InputError(f"action {timed.index(False)} of the history has no time_s, others have")
    if any(timed) and np.any(np.diff(np.array(times, np.int64)) < 0):
        raise InputError("the history is not in order of time_s: give the oldest action first")
    # A last row that belongs to nobody, as in `log_from_histories`.
    row = np.concatenate([rows, [0]]).astype(np.int32)
    n = len(row)
    frame = pl.DataFrame(
        {"user_row": [0] * (n - 1) + [1], "item_row": np.arange(n)}
        | {name: pl.Series([*column, None], dtype=pl.Float32) for name, column in values.items()},
        schema_overrides={"user_row": pl.Int32, "item_row": pl.Int32},
    ).with_columns(pl.Series("time_s", [*(times if any(timed) else [0] * (n - 1)), 0], pl.Int64))
    nobody = pl.DataFrame(
        {feature.name: [None, None] for feature in spec.static} or {"user_id": [0, 1]},
        schema={feature.name: dataset.users[feature.name].dtype for feature in spec.static} or None,
    )
    history = Dataset("request", dataset.items[row], nobody, frame, dataset.meta)
    log = action_log(history, spec)
    silent = np.ones(n, bool)
    for column in values.values():
        silent &= [*(value is None for value in column), True]
    positive = positive_actions(history, spec.positive) | silent
    positive[-1] = False
    return ActionLog(
        offsets=log.offsets[:2],
        item=row,
        positive_rows=np.flatnonzero(positive),
        time_s=log.time_s,
        playtime=log.playtime,
        label=log.label,
        static=log.static[:1],
    )


def _check(what: str, name: str, value, known: Sequence[str]) -> None:
    if name not in known:
        raise InputError(f"{what}: the model knows {', '.join(known) or 'nothing'} of an action")
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if name == "time_s":
        good, wanted = number and 0 <= value < 2**53 and value == int(value), "whole Unix seconds"
    elif name in FEEDBACK:
        good, wanted = number and value in (0, 1), "0 or 1"
    elif name == "rating":
        good, wanted = number and np.isfinite(value), "a number"
    else:
        good, wanted = number and 0 <= value < 2**31, "seconds from 0 on"
    if not good:
        raise InputError(f"{what} is {str(value)[:40]!a}: give {wanted}")
