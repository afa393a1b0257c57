"""Sessions, and which of them supervised fine-tuning keeps."""

import numpy as np
import polars as pl
import pytest

from onerec_jax.data.schema import build_dataset
from onerec_jax.data.sessions import GAP_S, session_of_action, well_played
from onerec_jax.data.splits import make_split

LOG = {
    "user_id": [0] * 8 + [1] * 5,
    "item_id": [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0],
    "time_s": np.cumsum([10, 10, GAP_S, 10, GAP_S - 1, GAP_S, 1, 1, -GAP_S, 5, 5, GAP_S, 5])
    + 10**6,
    "session": [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3],
    "playtime_s": [1.0, 1, 1, 9, 9, 2, 50, 50, 4, 4, 1, 70, 70],
}


def dataset(*without):
    frame = pl.DataFrame({k: v for k, v in LOG.items() if k not in without})
    meta = {"origin": "a test", "licence": "none"}
    items = pl.DataFrame({"item_id": range(4), "text": ["a", "b", "c", "d"]})
    return build_dataset("toy", items, None, frame, meta=meta, split="leave-one-out")


@pytest.mark.parametrize(
    ("without", "lengths"),
    [
        ((), [3, 2, 3, 2, 3]),  # session 2 of both users is not one
        (("session",), [2, 3, 3, 3, 2]),  # by gaps
        (("session", "time_s"), [1] * 13),
    ],
)
def test_sessions(without, lengths):
    found = session_of_action(dataset(*without))
    np.testing.assert_array_equal(found, np.repeat(np.arange(len(lengths)), lengths))


def test_the_bottom_half_is_dropped():
    """Seconds of training actions by session: 3, 18, 2, 8, 1; the last two of a user are no
    training."""
    data = dataset()
    split = make_split(data)
    kept = well_played(data, split, 0.5)
    np.testing.assert_array_equal(np.flatnonzero(kept), [0, 1, 2, 3, 4, 8, 9])
    every = well_played(data, split, 0.0)
    np.testing.assert_array_equal(np.flatnonzero(~every), [6, 7, 11, 12])
    one = well_played(data, split, 0.2)
    np.testing.assert_array_equal(np.flatnonzero(every & ~one), [10])
    assert well_played(dataset("playtime_s"), split, 0.5) is None
