"""Features of a log that grows: what models read of it, without making it anew at every request."""

import dataclasses

import numpy as np
import polars as pl

from onerec_jax.data.features import ActionLog, action_log, static_features
from onerec_jax.data.schema import Dataset
from onerec_jax.data.world.loop import Log
from onerec_jax.inputs import FeatureSpec


class GrowingActions:
    """The `ActionLog` of a log in a loop: `actions(log)`; only what is new is encoded.

    Users keep the room that the log has for them, so `offsets` bound rooms, and rows past a user's
    last exposure say nothing: ask at a position up to `log.length`, and give the request's time.
    """

    def __init__(self, dataset: Dataset, spec: FeatureSpec):
        """`dataset`: the log's beginning, whose users and items are meant."""
        self.dataset, self.spec = dataset, spec
        self._static = static_features(dataset, spec)
        self._log: Log | None = None

    def __call__(self, log: Log) -> ActionLog:
        """Arrays that the next call writes into, but for `positive_rows`."""
        if log is not self._log:
            self._log, self._length = log, np.zeros_like(log.length)
            self._offsets = np.append(log.start, log.capacity)
            self._columns: dict[str, np.ndarray] = {}
        table = log.table(self._length)
        if len(table["user"]):
            self._add(table)
            self._length = log.length.copy()
        columns = {name: self._columns.get(name) for name in ("time_s", "playtime", "label")}
        return ActionLog(
            offsets=self._offsets,
            item=self._columns["item"],
            positive_rows=np.flatnonzero(self._columns["positive"]),
            static=self._static,
            **columns,
        )

    def _add(self, table) -> None:
        """Encodes new exposures and puts them into their places."""
        row = self._offsets[table["user"]] + table["position"]
        new = action_log(exposures(table, self.dataset), self.spec)
        positive = np.zeros(len(row), bool)
        positive[new.positive_rows] = True
        found = {"item": new.item, "positive": positive}
        found |= {name: getattr(new, name) for name in ("time_s", "playtime", "label")}
        for name, values in found.items():
            if values is None:
                continue
            if name not in self._columns:
                shape = (self._offsets[-1], *values.shape[1:])
                self._columns[name] = np.zeros(shape, values.dtype)
            self._columns[name][row] = values


def exposures(table, dataset: Dataset) -> Dataset:
    """Rows of `Log.table` as the interactions of a data set with the same items, and no users."""
    frame = pl.DataFrame(
        {"user_row": table["user"], "item_row": table["item"]}
        | {name: values for name, values in table.items() if name not in ("user", "item")}
    )
    return dataclasses.replace(dataset, users=dataset.users.head(0), interactions=frame)
