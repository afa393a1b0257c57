"""The closed loop: a policy shows, the world answers, the log grows, clocks and sessions move on.

All users that are due make one request at a time, together. Time runs in days: nobody goes on to
the next day before everybody is done with this one, so that a policy that reads the whole log
reads no more than a day ahead of a user's clock.

Axes: U users, I items, N log rows, B users of a request, S slots of a slate.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import polars as pl

from onerec_jax.data.schema import Dataset
from onerec_jax.data.world.constants import DAY_S, START_S
from onerec_jax.data.world.response import Feedback, World, satisfaction

COLUMNS = {
    "item": np.int32,
    "time_s": np.int64,
    "playtime_s": np.float32,
    **dict.fromkeys(("click", "like", "follow", "comment", "forward", "hate"), np.int8),
    "long_view": np.int8,
    "session": np.int32,
    "slot": np.int32,
    "is_rand": np.int8,
}
"""Columns of a log, as in the interactions table; `item` is the item's row."""


class Log:
    """Exposures of all users, each with room for so many, in the order of their time.

    Attributes:
      length: int64 `[U]`, exposures of each user so far.
      room: int64 `[U]`, exposures at which a user's log is full.
      counts: int64 `[I]`, exposures of each item so far.
      start: int64 `[U]`, where the room of each user begins, all rooms one behind the other.
      capacity: exposures that all rooms hold.
    """

    def __init__(self, room: np.ndarray, num_items: int):
        """An empty log.

        Args:
          room: int `[U]`, most exposures of each user.
          num_items: I.
        """
        self.room = np.asarray(room, np.int64)
        self.length = np.zeros(len(self.room), np.int64)
        self.counts = np.zeros(num_items, np.int64)
        self.start = np.cumsum(self.room) - self.room
        self.capacity = int(self.room.sum())
        self._columns = {name: np.zeros(self.capacity, dtype) for name, dtype in COLUMNS.items()}

    @classmethod
    def from_dataset(cls, dataset: Dataset, more: np.ndarray | int) -> "Log":
        """The log of a data set that a world made, with room for `more` exposures a user.

        Raises:
          ValueError: the data set lacks a column that worlds write.
        """
        length = np.diff(dataset.offsets)
        log = cls(length + more, dataset.num_items)
        user = np.repeat(np.arange(len(length)), length)
        place = np.arange(len(user)) - dataset.offsets[user] + log.start[user]
        for name, column in log._columns.items():
            values = dataset.column("item_row" if name == "item" else name)
            if values is None:
                raise ValueError(f"{dataset.name}: has no column {name}, so no world made it")
            column[place] = values
        log.length[:] = length
        log.counts[:] = np.bincount(dataset.item_rows, minlength=dataset.num_items)
        return log

    def append(self, user: np.ndarray, **columns: np.ndarray) -> None:
        """One more exposure of each of the given users, all different; all COLUMNS, `[B]`."""
        place = self.start[user] + self.length[user]
        for name, values in columns.items():
            self._columns[name][place] = values
        self.length[user] += 1
        np.add.at(self.counts, columns["item"], 1)

    def history(self, user: int) -> dict[str, np.ndarray]:
        """All COLUMNS of one user, oldest first; views that must not be written to."""
        rows = slice(self.start[user], self.start[user] + self.length[user])
        return {name: column[rows] for name, column in self._columns.items()}

    def last(self, users: np.ndarray, n: int, column: str = "item") -> np.ndarray:
        """The latest n values of a column of each user, `[B, n]`, newest first, -1 for none."""
        back = np.arange(1, n + 1)
        place = (self.start + self.length)[users][:, None] - back
        valid = back <= self.length[users][:, None]
        return np.where(valid, self._columns[column][np.where(valid, place, 0)], -1)

    def table(self, since: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """`user`, `position` and all COLUMNS, `[N]`, sorted by user and time.

        Args:
          since: int `[U]`, positions to begin with; None: all exposures.
        """
        since = np.zeros_like(self.length) if since is None else since
        count = self.length - since
        user = np.repeat(np.arange(len(count), dtype=np.int32), count)
        position = np.arange(len(user)) + (since + count - np.cumsum(count))[user]
        place = self.start[user] + position
        columns = {name: values[place] for name, values in self._columns.items()}
        return {"user": user, "position": position, **columns}

    def frame(self) -> pl.DataFrame:
        """The interactions table: `user_id`, `item_id` (rows as ids) and the rest of COLUMNS."""
        table = self.table()
        del table["position"]
        return pl.DataFrame({"user_id": table.pop("user"), "item_id": table.pop("item"), **table})


class Request(NamedTuple):
    """What a policy is told of each request besides the user and the log."""

    time_s: np.ndarray  # int64 [B], Unix time
    session: np.ndarray  # int32 [B], session of the user from 0
    slot: np.ndarray  # int32 [B], place in the session of the slate's first item
    day: int  # of the loop, from 0; the same for all users of the request


Policy = Callable[[np.ndarray, Log, Request], np.ndarray | tuple[np.ndarray, np.ndarray]]
"""(users int `[B]`, log, request) -> item rows int `[B, S]`, best first; or these and int
`[B, S]`, 1 where an item was picked at random from all items (column `is_rand`)."""


class Loop:
    """A policy and a world, turning."""

    def __init__(self, world: World, policy: Policy, *, log: Log | None = None):
        """Starts the clocks.

        Args:
          policy: asked for a slate at a time; what it shows is shown, in its order, until the
            user leaves or the log of the user is full.
          log: where to go on; sessions and clocks follow its last exposures. None: an empty log
            with the world's quota as room.
        """
        self.world, self.policy = world, policy
        self.log = Log(world.quota, world.config.items) if log is None else log
        everyone = np.arange(len(self.log.length))
        self.session = self.log.last(everyone, 1, "session")[:, 0].astype(np.int32) + 1
        last = self.log.last(everyone, 1, "time_s")[:, 0]
        # The session before may have been cut short by the log's end: reckon with an ordinary one.
        usual = world.constants.satisfaction_base
        self.clock_s = np.maximum(last, START_S) + world.gap_s(everyone, self.session, usual)
        self._slot = np.zeros(len(everyone), np.int32)
        self._satisfaction = np.zeros(len(everyone))

    def run(self, until_s: float = math.inf) -> Log:
        """Turns until every clock has reached `until_s` (Unix time) or every log is full.

        Raises:
          ValueError: a slate of the wrong shape or with rows that are no items.
        """
        log = self.log
        while (open_users := log.length < log.room).any():
            first = self.clock_s[open_users].min()
            if first >= until_s:
                break
            day = int((first - START_S) // DAY_S)
            end = min(START_S + (day + 1) * DAY_S, until_s)
            while True:
                due = np.flatnonzero((log.length < log.room) & (self.clock_s < end))
                if not due.size:
                    break
                self._turn(due, day)
        return log

    def _turn(self, user: np.ndarray, day: int) -> None:
        """One request of each user, and what comes of it."""
        request = Request(self.clock_s[user], self.session[user], self._slot[user], day)
        slate = self.policy(user, self.log, request)
        items, random = slate if isinstance(slate, tuple) else (slate, np.zeros_like(slate))
        if items.ndim != 2 or len(items) != len(user) or items.shape[1] == 0:
            raise ValueError(f"a policy gave a slate of {items.shape} for {len(user)} users")
        watching, gone = np.arange(len(user)), []
        for s in range(items.shape[1]):
            who, item = user[watching], items[watching, s]
            session, slot, time_s = self.session[who], self._slot[who], self.clock_s[who]
            feedback = self.world.respond(who, item, session, slot, time_s)
            self._record(who, item, random[watching, s], feedback)
            self._slot[who] += 1
            self._satisfaction[who] += satisfaction(feedback)
            self.clock_s[who] += np.ceil(feedback.watch_s).astype(np.int64) + 1
            left = feedback.leave > 0
            gone.append(who[left])
            watching = watching[~left & (self.log.length[who] < self.log.room[who])]
            if not watching.size:
                break
        self._end_session(np.concatenate(gone))

    def _record(self, user, item, is_rand, feedback: Feedback) -> None:
        fields = feedback._asdict()
        columns = {name: fields[name] for name in COLUMNS if name in fields}
        self.log.append(
            user,
            item=item,
            time_s=self.clock_s[user],
            playtime_s=feedback.watch_s,
            session=self.session[user],
            slot=self._slot[user],
            is_rand=is_rand,
            **columns,
        )

    def _end_session(self, user: np.ndarray) -> None:
        mean = self._satisfaction[user] / self._slot[user]
        self.clock_s[user] += self.world.gap_s(user, self.session[user], mean)
        self.session[user] += 1
        self._slot[user], self._satisfaction[user] = 0, 0
