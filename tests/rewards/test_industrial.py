"""The industrial reward by hand, and lists of flagged items that fit nothing."""

import dataclasses

import helpers
import numpy as np
import polars as pl
import pytest

from onerec_jax.errors import InputError
from onerec_jax.rewards.advantage import group_advantages
from onerec_jax.rewards.industrial import (
    IndustrialConfig,
    flagged_items,
    flagged_share,
    industrial_rewards,
    target_below,
)

CFG = IndustrialConfig(target_share=0.25, factor=0.5)
REWARD = np.array([[0.2, 0.4, 0.6, 0.8]], np.float32)
FLAGGED = np.array([[False, True, False, True]])


def test_only_above_the_target_share():
    for share, expected in (
        (0.2, [0.2, 0.4, 0.6, 0.8]),
        (0.25, [0.2, 0.4, 0.6, 0.8]),
        (0.26, [0.2, 0.2, 0.6, 0.4]),
    ):
        np.testing.assert_allclose(industrial_rewards(REWARD, FLAGGED, share, CFG), [expected])


def test_before_normalisation():
    """The best item, flagged, falls below one that is not; mean and deviation are of the new."""
    advantage, _ = group_advantages(industrial_rewards(REWARD, FLAGGED, 0.5, CFG))
    expected = np.array([0.2, 0.2, 0.6, 0.4])
    expected = (expected - expected.mean()) / expected.std()
    np.testing.assert_allclose(advantage, [expected], rtol=1e-5)


def test_share():
    valid = np.array([[True, True, True, False]])
    assert float(flagged_share(FLAGGED, valid)) == pytest.approx(1 / 3)
    assert flagged_share(FLAGGED, np.zeros_like(valid)) == 0


def dataset(**columns):
    data = helpers.full_dataset(items=4)
    return dataclasses.replace(data, items=data.items.with_columns(**columns))


def test_from_a_column_or_a_list():
    data = dataset(viral_farm=pl.Series([0, 1, None, 1], dtype=pl.Int8))
    np.testing.assert_array_equal(flagged_items(data), [False, True, False, True])
    np.testing.assert_array_equal(flagged_items(data, [2]), [False, False, True, False])


@pytest.mark.parametrize(
    ("flagged", "message"),
    [
        ("viral_farm", "column viral_farm flags no item"),
        ("spam", "no column spam"),
        ([], "list of flagged items flags no item"),
        ([2, 77, 78], "2 flagged ids are of no item .77, for one"),
    ],
)
def test_bad_lists(flagged, message):
    data = dataset(viral_farm=pl.Series([0, 0, 0, 0], dtype=pl.Int8))
    with pytest.raises(InputError, match=message):
        flagged_items(data, flagged)


@pytest.mark.parametrize("name", ["target_share", "factor"])
@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_bounds(name, value):
    with pytest.raises(InputError, match="--industrial." + name.replace("_", "-")):
        IndustrialConfig(**{name: value})


def test_target_below_a_share():
    assert target_below(0.2, 0.1) == pytest.approx(0.18)
    IndustrialConfig(target_share=target_below(1.0, 0.1))
    for share, cut in ((0.0, 0.1), (float("nan"), 0.1), (0.2, 0.0), (0.2, 1.0)):
        with pytest.raises(InputError):
            target_below(share, cut)
