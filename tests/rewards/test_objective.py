"""What is rewarded, in words and in numbers."""

import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.rewards.objective import parse_objective, weighted_score

KNOWN = ("p", "ctr", "lvtr", "ltr")


def test_names_and_weights():
    assert parse_objective("p", KNOWN) == {"p": 1}
    assert parse_objective("ltr", KNOWN) == {"ltr": 1}
    assert parse_objective("ctr=1, lvtr = 2,ltr=0.5", KNOWN) == {"ctr": 1, "lvtr": 2, "ltr": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fun", "--objective fun: runs/r knows p, ctr, lvtr, ltr, not 'fun'"),
        ("ctr=1,fun=2", "not 'fun'"),
        ("", "not ''"),
        ("ctr=1,", "not ''"),
        ("ctr,ltr", "ctr has no weight: write ctr=1"),
        ("ctr=1,ctr=2", "ctr is there twice"),
        ("ctr=high", "the weight of ctr is 'high'"),
        ("ctr=", "the weight of ctr is ''"),
        ("ctr=0", "above 0"),
        ("ctr=-1", "above 0"),
        ("ctr=nan", "above 0"),
        ("ctr=inf", "above 0"),
    ],
)
def test_what_cannot_be_read(text, message):
    with pytest.raises(InputError) as error:
        parse_objective(text, KNOWN, "runs/r")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_weighted_sum():
    rng = np.random.default_rng(0)
    scores = {name: rng.random((3, 4)).astype(np.float32) for name in KNOWN}
    for values in scores.values():
        values[1, 2] = np.nan
    found = weighted_score(scores, {"ctr": 2.0, "ltr": 5.0})
    assert found.dtype == np.float32
    assert np.isnan(found[1, 2])
    assert found[0, 1] == pytest.approx(2 * scores["ctr"][0, 1] + 5 * scores["ltr"][0, 1])
    np.testing.assert_array_equal(weighted_score(scores, {"p": 1.0}), scores["p"])
