"""The format reward: who is chosen, who counts; legality by level."""

import helpers
import jax
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.rewards.format import format_advantages, legal_prefixes

B, G, K = 200, 12, 5
LEGAL = np.random.default_rng(0).random((B, G)) < 0.6


def test_k_random_of_g():
    advantage, counts = jax.jit(format_advantages, static_argnums=2)(jax.random.key(0), LEGAL, K)
    np.testing.assert_array_equal(advantage, counts.astype(np.float32))
    assert not (counts & ~LEGAL).any()  # illegal ones are discarded
    everything = np.ones((B, G), bool)
    _, chosen = format_advantages(jax.random.key(0), everything, K)
    np.testing.assert_array_equal(chosen.sum(1), K)
    np.testing.assert_array_equal(counts, chosen & LEGAL)  # the choice is blind to legality
    # Each item as often as any other: 200 users, standard deviation 7.
    np.testing.assert_allclose(chosen.sum(0), B * K / G, atol=30)
    _, other = format_advantages(jax.random.key(1), everything, K)
    assert (chosen != other).any()


def test_top_k():
    logp = np.random.default_rng(1).standard_normal((B, G)).astype(np.float32)
    advantage, counts = format_advantages(None, LEGAL, K, choose="top", logp_bg=logp)
    for b in range(B):
        best = sorted(range(G), key=lambda g: -logp[b, g])[:K]
        assert set(np.flatnonzero(counts[b])) == {g for g in best if LEGAL[b, g]}
    assert set(np.unique(advantage)) == {0, 1}


@pytest.mark.parametrize("k", [0, G + 1])
def test_k_out_of_range(k):
    with pytest.raises(InputError, match=f"chooses {k} of groups of {G}"):
        format_advantages(jax.random.key(0), LEGAL, k)


def test_legality_by_level_against_a_loop():
    ids = helpers.random_ids(30)
    rng = np.random.default_rng(2)
    sids = np.concatenate([ids.sids[:5], rng.integers(0, 5, (60, 3))]).reshape(5, 13, 3)
    legal = legal_prefixes(sids, ids)
    for place in np.ndindex(5, 13):
        for level in range(3):
            code = tuple(sids[place][: level + 1])
            known = any(tuple(sid[: level + 1]) == code for sid in ids.sids)
            assert legal[place][level] == known
    assert legal[0, :5].all()
    assert 0 < legal[..., 2].mean() < legal[..., 1].mean() <= 1
    np.testing.assert_array_equal(legal[..., 2], ids.find(sids) >= 0)
