"""Intervals over users and seeds."""

import numpy as np
import pytest

from onerec_jax.evaluation.paired import paired_over_seeds


def test_a_constant_gain_has_no_width():
    b = np.random.default_rng(0).normal(size=(3, 50))
    found = paired_over_seeds(b + 0.25, b)
    assert found["difference"] == pytest.approx(0.25)
    assert found["ci95"] == pytest.approx([0.25, 0.25])
    assert found["agrees"]
    assert found["by_seed"] == pytest.approx([0.25] * 3)


def test_interval_holds_what_seeds_and_users_change():
    rng = np.random.default_rng(1)
    users = np.broadcast_to(rng.normal(size=400), (3, 400))
    seeds = np.array([[0.5], [-0.4], [0.3]])
    narrow = paired_over_seeds(users, np.zeros((3, 400)))
    wide = paired_over_seeds(users + seeds, np.zeros((3, 400)))
    assert np.diff(wide["ci95"]) > 2 * np.diff(narrow["ci95"])
    assert not wide["agrees"]
    width = 2 * 1.96 * users[0].std() / 20  # of a mean of 400 users
    assert np.diff(narrow["ci95"])[0] == pytest.approx(width, rel=0.15)


def test_users_without_a_value_are_left_out():
    a = np.resize([1.0, np.nan, 3.0], (1, 60))
    assert paired_over_seeds(a, np.zeros((1, 60)))["difference"] == 2.0
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_over_seeds(a, np.zeros((1, 2)))
