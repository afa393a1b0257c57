"""A history that comes with a request: actions as dicts, encoded as those of the data set are."""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from onerec_jax.data.action_values import RATING, SECONDS, TIME, check_actions
from onerec_jax.data.features import ActionLog, action_log, positive_actions
from onerec_jax.data.schema import FEEDBACK, Dataset
from onerec_jax.inputs import FeatureSpec

ACTION_COLUMNS = (TIME, RATING, *SECONDS, *FEEDBACK)
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
      InputError: see `check_actions`.
    """
    known = [name for name in ACTION_COLUMNS if name in dataset.interactions.columns]
    check_actions(actions, known)
    values = {name: [action.get(name) for action in actions] for name in known}
    times = values.pop("time_s", [])
    timed = [value is not None for value in times]
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
