"""Beam search against brute force over all V^3 semantic IDs."""

import functools
import itertools

import chex
import helpers
import jax
import numpy as np
import pytest

from onerec_jax.generation.beam import beam_search
from onerec_jax.generation.trie import build_trie
from onerec_jax.models.onerec import OneRec

V, USERS, ITEMS = 4, 2, 30
CFG = helpers.tiny_config(num_experts=4, decoder_layers=1)
SPEC = helpers.bare_spec(codebook_size=V, num_items=ITEMS)
MODEL = OneRec(CFG, SPEC)
BATCH = helpers.random_batch(CFG, SPEC, USERS)
IDS = helpers.random_ids(ITEMS, codebook_size=V)
TRIE = build_trie(IDS.leaf_sids)
ALL = np.array(list(itertools.product(range(V), repeat=3)), np.int32)


@functools.cache
def variables():
    return helpers.random_variables(MODEL, BATCH)


@functools.cache
def logp_of_all():
    """log P of every ID for every user, `[B, V^3]`, by one teacher-forced pass each."""
    forward = helpers.quick_jit(MODEL.apply)
    copies = jax.tree.map(lambda x: np.repeat(x, len(ALL), axis=0), BATCH)
    copies = copies.replace(target=np.tile(ALL, (USERS, 1))[:, None])
    logits = np.asarray(forward(variables(), copies), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logp, copies.target[..., None], axis=-1)[..., 0]
    return picked.sum(-1).reshape(USERS, -1)


@functools.cache
def search(width, masked):
    run = helpers.quick_jit(functools.partial(beam_search, MODEL, width=width))
    return jax.device_get(run(variables(), BATCH, trie=TRIE if masked else None))


def brute_force(width, masked):
    """IDs and scores of an exhaustive search, `[B, n, 3]` and `[B, n]`, best first."""
    legal = IDS.find(ALL) >= 0 if masked else np.ones(len(ALL), bool)
    logp = np.where(legal, logp_of_all(), -np.inf)
    order = np.argsort(-logp, axis=1, kind="stable")[:, : min(width, legal.sum())]
    return ALL[order], np.take_along_axis(logp, order, axis=1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [16, 70])
def test_a_wide_beam_is_brute_force(width, masked):
    """V^2 beams keep every prefix of the last level, so nothing can be lost on the way.

    Width 70 is more than the codes (4), than the IDs that exist, and than all 64.
    """
    found, (sid, logp) = search(width, masked), brute_force(width, masked)
    alive = logp.shape[1]
    chex.assert_shape([found.logp, found.leaf], (USERS, width))
    chex.assert_shape(found.sid, (USERS, width, 3))
    assert np.diff(np.sort(logp, axis=1)).min() > 1e-5  # order is no matter of rounding
    np.testing.assert_array_equal(found.sid[:, :alive], sid)
    np.testing.assert_allclose(found.logp[:, :alive], logp, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.logp[:, alive:], -np.inf)  # dead beams
    np.testing.assert_array_equal(found.sid[:, alive:], -1)
    np.testing.assert_array_equal(found.leaf[:, alive:], -1)
    leaf = IDS.find(sid) if masked else np.full(sid.shape[:2], -1)
    np.testing.assert_array_equal(found.leaf[:, :alive], leaf)


def greedy_levels(width, masked):
    """Beam search in plain Python over the table of all scores: keep `width` prefixes a level."""
    logp = logp_of_all()
    legal = {tuple(sid) for sid in (IDS.leaf_sids if masked else ALL).tolist()}
    result = []
    for user in range(USERS):
        mass = dict(zip(map(tuple, ALL.tolist()), np.exp(logp[user]), strict=True))
        beams = [()]
        for level in range(3):
            beams = [
                (*beam, code)
                for beam in beams
                for code in range(V)
                if any(sid[: level + 1] == (*beam, code) for sid in legal)
            ]
            # P(prefix) is the sum over everything below, existing or not.
            total = {
                beam: sum(p for sid, p in mass.items() if sid[: level + 1] == beam)
                for beam in beams
            }
            beams = sorted(beams, key=lambda beam, total=total: -total[beam])[:width]
        result.append(beams)
    return result


@pytest.mark.parametrize("masked", [False, True])
def test_a_narrow_beam_keeps_the_best_prefixes(masked):
    """Width 3 prunes on every level; scores stay those of the unconstrained model."""
    found, expected = search(3, masked), greedy_levels(3, masked)
    assert [[tuple(sid) for sid in user] for user in found.sid.tolist()] == expected
    place = {tuple(sid): i for i, sid in enumerate(ALL.tolist())}
    logp = [
        [logp_of_all()[user][place[sid]] for sid in beams] for user, beams in enumerate(expected)
    ]
    np.testing.assert_allclose(found.logp, logp, rtol=1e-4, atol=1e-4)


def test_no_beam_beats_the_exact_answer_and_beams_are_distinct():
    """A narrow beam may miss the best ID, so more width is not always monotone; but it is bounded:

    the i-th beam of any width scores at most the i-th ID of the exhaustive search.
    """
    exact = search(70, True)
    narrow = search(3, True)
    assert (narrow.logp <= exact.logp[:, :3] + 1e-4).all()
    assert (np.diff(exact.logp[:, : len(IDS.leaf_sids)]) <= 0).all()
    for found in (narrow, exact):
        for user in found.sid:
            alive = [tuple(sid) for sid in user.tolist() if sid[0] >= 0]
            assert len(set(alive)) == len(alive)


def test_the_target_is_not_read_and_users_are_independent():
    other = helpers.random_batch(CFG, SPEC, USERS, seed=8)
    mixed = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), BATCH, other)
    run = helpers.quick_jit(functools.partial(beam_search, MODEL, width=3))
    found = jax.device_get(run(variables(), mixed.replace(target=1 - BATCH.target % 2), trie=TRIE))
    chex.assert_trees_all_equal(found.sid[0], search(3, True).sid[0])
    chex.assert_trees_all_close(found.logp[0], search(3, True).logp[0], atol=1e-6)
    assert (found.logp[1] != search(3, True).logp[1]).any()


def test_one_trace_per_shape():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(variables, batch, trie):
        return beam_search(MODEL, variables, batch, width=2, trie=trie)

    for seed in (0, 1, 2):
        run.trace(variables(), helpers.random_batch(CFG, SPEC, USERS, seed=seed), TRIE)
    bigger = helpers.random_batch(CFG, SPEC, USERS + 1)
    with pytest.raises(AssertionError):
        run.trace(variables(), bigger, TRIE)


def test_equal_scores_keep_the_order_of_parents_then_codes():
    """All weights zero: every code is equally likely on every level."""
    zeros = jax.tree.map(np.zeros_like, variables())
    run = helpers.quick_jit(functools.partial(beam_search, MODEL, width=6))
    found = jax.device_get(run(zeros, BATCH, trie=TRIE))
    np.testing.assert_allclose(found.logp, 3 * np.log(1 / V), rtol=1e-5)
    np.testing.assert_array_equal(found.sid, np.tile(IDS.leaf_sids[:6], (USERS, 1, 1)))
    np.testing.assert_array_equal(found.leaf, np.tile(np.arange(6), (USERS, 1)))
