"""What may be said of an action in a request, checked without the packages that read data sets."""

from collections.abc import Mapping, Sequence

import numpy as np

from onerec_jax.errors import InputError, shown

TIME, RATING, SECONDS = "time_s", "rating", ("playtime_s", "duration_s")
"""All other columns of an action are feedback, 0 or 1."""


def check_actions(actions: Sequence, known: Sequence[str]) -> None:
    """Refuses a history of which a value cannot be.

    Args:
      actions: oldest first, dicts of values by name; `item_id` is not read, None is unknown, and
        what is no dict is an item of which nothing is said.
      known: names that the model knows.

    Raises:
      InputError: names the action and the value that is wrong; or some actions have no time, or the
        times are not in order.
    """
    times = []
    for place, action in enumerate(actions):
        said = action if isinstance(action, Mapping) else {}
        for name, value in said.items():
            if name != "item_id" and value is not None:
                _check(f"action {place} of the history: {shown(name)}", name, value, known)
        times.append(said.get(TIME))
    timed = [value is not None for value in times]
    if any(timed) and not all(timed):
        raise InputError(f"action {timed.index(False)} of the history has no time_s, others have")
    if any(timed) and np.any(np.diff(np.array(times, np.int64)) < 0):
        raise InputError("the history is not in order of time_s: give the oldest action first")


def _check(what: str, name: str, value, known: Sequence[str]) -> None:
    if name not in known:
        raise InputError(f"{what}: the model knows {', '.join(known) or 'nothing'} of an action")
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(
        value, bool
    )
    if name == TIME:
        good, wanted = number and 0 <= value < 2**53 and value == int(value), "whole Unix seconds"
    elif name == RATING:
        good, wanted = number and np.isfinite(value), "a number"
    elif name in SECONDS:
        good, wanted = number and 0 <= value < 2**31, "seconds from 0 on"
    else:
        good, wanted = number and value in (0, 1), "0 or 1"
    if not good:
        raise InputError(f"{what} is '{shown(value)}': give {wanted}")
