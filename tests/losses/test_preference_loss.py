"""Preference losses and their gradients against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.losses.preference import PreferenceConfig, preference_loss

LN = np.log
BETA = 0.5
# Session log-probabilities: log pi / ref is +2 of the chosen, of the rejected 2 - 2 ln 3, so that
# h = 2 ln 3, beta h = ln 3 and sigmoid(beta h) = 3/4. log pi(S_w) - log pi(S_l) = 2 ln 3 + 1.
CHOSEN, REF_CHOSEN = -3.0, -5.0
REJECTED, REF_REJECTED = -4 - 2 * LN(3), -6.0
CODES = 6


def value_and_slopes(cfg, rejected=(REJECTED,), ref_rejected=(REF_REJECTED,)):
    """Loss of one pair, its slope by log pi(S_w), and those by every log pi(S_l)."""

    def loss(chosen, rejected):
        return preference_loss(
            chosen[None],
            rejected[None],
            jnp.array([REF_CHOSEN]),
            jnp.array([ref_rejected]),
            jnp.array([True]),
            cfg,
            codes=CODES,
        )[0]

    value, slopes = jax.value_and_grad(loss, (0, 1))(jnp.array(CHOSEN), jnp.array(rejected))
    return float(value), float(slopes[0]), np.asarray(slopes[1])


# sigmoid(beta (2 ln 3 + 1)) = 3 sqrt(e) / (1 + 3 sqrt(e)), for CPO; simPO has beta / 6 and - 0.4.
CPO = 3 * np.exp(0.5) / (1 + 3 * np.exp(0.5))
SIMPO = 1 / (1 + np.exp(0.4 - 0.5 / 6 * (2 * LN(3) + 1)))
BY_HAND = {
    # beta (1 - 3/4) = 1/8 is the pull on either side.
    "dpo": (LN(4 / 3), -1 / 8),
    # h - 1 / (2 beta) = 2 ln 3 - 1
    "ipo": ((2 * LN(3) - 1) ** 2, 2 * (2 * LN(3) - 1)),
    # 0.9 ln(4/3) + 0.1 ln 4; slope beta (-0.9 / 4 + 0.1 * 3/4)
    "cdpo": (0.9 * LN(4 / 3) + 0.1 * LN(4), -0.075),
    # (0.9 ln(4/3) - 0.1 ln 4) / 0.8; slope beta (-0.9 / 4 - 0.1 * 3/4) / 0.8
    "rdpo": ((0.9 * LN(4 / 3) - 0.1 * LN(4)) / 0.8, -0.1875),
    "simpo": (-LN(SIMPO), -0.5 / 6 * (1 - SIMPO)),
    "s-dpo": (LN(4 / 3), -1 / 8),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_value_and_slopes(name):
    cfg = PreferenceConfig(name, beta=BETA, epsilon=0.1, gamma=0.4)
    value, chosen, rejected = value_and_slopes(cfg)
    expected, slope = BY_HAND[name]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(chosen, slope, rtol=1e-4)
    np.testing.assert_allclose(rejected, [-slope], rtol=1e-4)


def test_cpo_also_learns_the_chosen():
    value, chosen, rejected = value_and_slopes(PreferenceConfig("cpo", beta=BETA, nll=2.0))
    np.testing.assert_allclose(value, -LN(CPO) + 2 * 3.0, rtol=1e-6)
    np.testing.assert_allclose(chosen, -0.5 * (1 - CPO) - 2, rtol=1e-5)
    np.testing.assert_allclose(rejected, [0.5 * (1 - CPO)], rtol=1e-4)


def test_softmax_over_several_rejected():
    """beta h of ln 3 and ln 2: sigmoid(-log(1/3 + 1/2)) = 6/11."""
    cfg = PreferenceConfig("s-dpo", beta=BETA, rejected=2)
    second = -4 - 2 * LN(2)
    value, chosen, rejected = value_and_slopes(cfg, (REJECTED, second), (REF_REJECTED,) * 2)
    np.testing.assert_allclose(value, LN(11 / 6), rtol=1e-6)
    # 5/11 of the pull beta is shared out as 1/3 to 1/2: the harder one is pushed down more.
    np.testing.assert_allclose(chosen, -0.5 * 5 / 11, rtol=1e-5)
    np.testing.assert_allclose(rejected, [0.5 * 5 / 11 * 2 / 5, 0.5 * 5 / 11 * 3 / 5], rtol=1e-5)


def random_pairs(pairs, rejected):
    rng = np.random.default_rng(0)
    shapes = [(pairs,), (pairs, rejected), (pairs,), (pairs, rejected)]
    return [-20 * rng.random(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("name", [*BY_HAND, "cpo"])
def test_the_mean_is_of_pairs_that_count(name):
    """Whatever the others hold, and whichever way the loss goes."""
    cfg, valid = PreferenceConfig(name), np.array([True, False, True])
    pairs = random_pairs(3, 1)
    broken = [np.where(valid.reshape(3, *[1] * (x.ndim - 1)), x, np.nan) for x in pairs]

    def run(args, valid):
        def loss(chosen, rejected):
            return preference_loss(chosen, rejected, *args[2:], valid, cfg, codes=CODES)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(*args[:2])

    (value, stats), slopes = run(broken, valid)
    alone = [run([x[i : i + 1] for x in pairs], valid[i : i + 1]) for i in (0, 2)]
    np.testing.assert_allclose(value, np.mean([part[0][0] for part in alone]), rtol=1e-5)
    for i, name in enumerate(("chosen", "rejected")):
        np.testing.assert_array_equal(slopes[i][1], 0, err_msg=name)
        assert (slopes[i][valid] != 0).all()
    up, down = pairs[0] - pairs[2], (pairs[1] - pairs[3])[:, 0]
    np.testing.assert_allclose(stats["margin"], (up - down)[valid].mean(), rtol=1e-5)
    np.testing.assert_allclose(stats["chosen_change"], up[valid].mean(), rtol=1e-5)
    np.testing.assert_allclose(stats["rejected_change"], down[valid].mean(), rtol=1e-5)
    np.testing.assert_allclose(stats["preferred"], (up > down)[valid].mean())
    assert stats["pairs"] == 2
    (nothing, stats), slopes = run(pairs, np.zeros(3, bool))
    assert nothing == 0
    assert np.isnan(stats["margin"])
    assert not any(np.any(slope) for slope in slopes)


@pytest.mark.parametrize("name", ["dpo", "ipo", "cdpo", "rdpo", "s-dpo"])
def test_the_reference_is_frozen(name):
    chosen, rejected, *reference = random_pairs(2, 1)

    def loss(ref_chosen, ref_rejected):
        valid = jnp.ones(2, bool)
        args = chosen, rejected, ref_chosen, ref_rejected, valid
        return preference_loss(*args, PreferenceConfig(name), codes=CODES)[0]

    for slope in jax.grad(loss, (0, 1))(*reference):
        np.testing.assert_array_equal(slope, 0)


def test_flags_that_fit_nothing():
    for message, values in {
        "--beta 0": {"beta": 0.0},
        "--epsilon 0.5": {"epsilon": 0.5},
        "--rejected 3 is of --loss s-dpo": {"rejected": 3},
        "--gamma -1": {"gamma": -1.0},
    }.items():
        with pytest.raises(InputError, match=message):
            PreferenceConfig(**values)
    assert PreferenceConfig("simpo").resolved_beta == 2
    assert PreferenceConfig("simpo", beta=3.0).resolved_beta == 3
