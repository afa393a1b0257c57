"""Checks of a question that a run and its export share; needs NumPy and nothing of the model."""

from collections.abc import Sequence

import numpy as np

from onerec_jax.errors import InputError, shown


class UnknownId(InputError):
    """An id that the catalogue does not hold."""


def is_list(ids) -> bool:
    """Whether these are many ids, and not one that is text."""
    return isinstance(ids, Sequence | np.ndarray) and not isinstance(ids, str | bytes)


def check_options(*, n, beam_width, request_time_s, **lists) -> None:
    """Refuses what cannot be asked.

    Args:
      n, beam_width: positive integers.
      request_time_s: Unix time in whole seconds, or None.
      lists: lists of ids by name, or None.

    Raises:
      InputError: names the one that is wrong.
    """
    for name, value in (("n", n), ("beam_width", beam_width)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise InputError(f"{name} is {shown(value)}: give a positive integer")
    if request_time_s is not None:
        whole = isinstance(request_time_s, int | np.integer) and not isinstance(
            request_time_s, bool
        )
        if not whole or not 0 <= request_time_s < 2**53:
            raise InputError(
                f"request_time_s is {shown(request_time_s)}: give a Unix time in whole seconds"
            )
    for name, ids in lists.items():
        if ids is not None and not is_list(ids):
            raise InputError(f"{name} is {shown(ids)}: give a list of ids")


class Ids:
    """Rows of ids, integers or texts; a number and its text are the same id."""

    def __init__(self, values, what: str):
        """`values` is int64 `[n]`, rising, or a list of texts; `what` names one of them."""
        self.what, self._values = what, values
        self._integers = isinstance(values, np.ndarray)
        if not self._integers:
            self._row = {value: row for row, value in enumerate(values)}

    def __len__(self):
        return len(self._values)

    def __getitem__(self, row: int) -> int | str:
        """The id of a row."""
        value = self._values[int(row)]
        return int(value) if self._integers else value

    def row(self, wanted: int | str) -> int:
        """Row of an id.

        Raises:
          UnknownId: no such id. InputError: neither an integer nor a string.
        """
        row = self._find(wanted)
        if row < 0:
            # Repr: an id from outside may hold line breaks, or what cannot be printed.
            raise UnknownId(f"the data set has no {self.what} {str(wanted)[:80]!a}")
        return row

    def rows(self, wanted) -> np.ndarray:
        """Rows of several ids, int32."""
        wanted = list(wanted)
        if self._integers and all(type(value) is int and abs(value) < 2**63 for value in wanted):
            values = np.array(wanted, np.int64)
            rows = np.minimum(np.searchsorted(self._values, values), len(self._values) - 1)
            if np.array_equal(self._values[rows], values):
                return rows.astype(np.int32)
        return np.array([self.row(value) for value in wanted], np.int32)

    def _find(self, wanted) -> int:
        if isinstance(wanted, bool) or not isinstance(wanted, int | str | np.integer):
            raise InputError(
                f"an id of {self.what}s is an integer or a string, not {type(wanted).__name__}"
            )
        if not self._integers:
            return self._row.get(str(wanted), -1)
        try:
            number = int(wanted)
        except ValueError:
            return -1
        if str(number) != str(wanted).strip() or not -(2**63) <= number < 2**63:
            return -1
        row = int(np.searchsorted(self._values, number))
        return row if row < len(self._values) and self._values[row] == number else -1
