"""Beam search against brute force over all semantic IDs, and against plain Python."""

import functools
import itertools

import chex
import helpers
import jax
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.generation.beam import beam_search, refuse_nan
from onerec_jax.generation.sampling import sample, sample_without_replacement
from onerec_jax.generation.trie import build_trie
from onerec_jax.models.onerec import OneRec

V, USERS, ITEMS = 4, 2, 30
CFG = helpers.tiny_config(num_experts=4, decoder_layers=1)
SPEC = helpers.bare_spec(codebook_size=V, num_items=ITEMS)
MODEL = OneRec(CFG, SPEC)
BATCH = helpers.random_batch(CFG, SPEC, USERS)
IDS = helpers.random_ids(ITEMS, codebook_size=V)
TRIE = build_trie(IDS.leaf_sids, V)
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
def test_a_wide_beam_is_brute_force(masked):
    """V^2 beams keep every prefix of the last level, so nothing can be lost on the way.

    Width 70 is more than the codes (4), than the IDs that exist, and than all 64.
    """
    width = 70
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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("levels", "codes", "widths"),
    [
        (3, 4, (1, 2, 3, 4, 5, 6, 20, 70)),
        (4, 5, (8, 130)),
        (2, 64, (20, 300)),
    ],
)
def test_every_width_is_plain_beam_search(levels, codes, widths, masked):
    model = helpers.ToyModel(levels, codes)
    batch = model.users(2)
    ids = helpers.random_ids(2 * codes**2, levels=levels, codebook_size=codes).leaf_sids
    legal = {tuple(sid) for sid in ids.tolist()} if masked else None
    trie = build_trie(ids, codes) if masked else None
    for width in widths:
        run = helpers.quick_jit(functools.partial(beam_search, model, width=width))
        found = jax.device_get(run(None, batch, trie=trie))
        chex.assert_shape(found.sid, (2, width, levels))
        for user, expected in enumerate(model.plain_search(batch, width, [legal] * 2)):
            alive = len(expected)
            scores = [score for _, score in expected]
            assert np.diff(np.sort(scores)).min(initial=1) > 2e-6  # no matter of rounding
            assert list(map(tuple, found.sid[user, :alive].tolist())) == [s for s, _ in expected]
            np.testing.assert_allclose(found.logp[user, :alive], scores, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(found.logp[user, alive:], -np.inf)
            if masked:
                place = {tuple(sid): leaf for leaf, sid in enumerate(ids.tolist())}
                leaves = [place[sid] for sid, _ in expected]
                np.testing.assert_array_equal(found.leaf[user, :alive], leaves)
                np.testing.assert_array_equal(found.leaf[user, alive:], -1)


@pytest.mark.parametrize("masked", [False, True])
def test_two_thousand_beams_over_large_codebooks(masked):
    """The production sizes: rows cut into chunks twice, wide nodes, and 2,048 beams."""
    model = helpers.ToyModel(3, 1024, seed=1)
    batch = model.users(1)
    rng = np.random.default_rng(0)
    sids = np.unique(rng.integers(0, 1024, (300_000, 3)), axis=0).astype(np.int32)
    trie = build_trie(sids, 1024) if masked else None
    run = jax.jit(functools.partial(beam_search, model, width=2048))
    found = jax.device_get(run(None, batch, trie=trie))
    assert (np.diff(found.logp) <= 0).all()
    assert len(np.unique(found.sid[0], axis=0)) == 2048
    exact = model.logp(batch, found.sid).sum(-1)
    np.testing.assert_allclose(found.logp, exact, rtol=1e-4, atol=1e-4)
    # The same search by sorting everything, in float64.
    prefix, logp = np.zeros((1, 0), np.int64), np.zeros(1)
    for level in range(3):
        every = np.repeat(prefix, 1024, axis=0)
        every = np.concatenate([every, np.tile(np.arange(1024), len(prefix))[:, None]], axis=1)
        scores = (logp[:, None] + model.continuations(batch, prefix[None])[0]).reshape(-1)
        if masked:
            known = np.unique(sids[:, : level + 1] @ 1024 ** np.arange(level, -1, -1))
            key = every @ 1024 ** np.arange(level, -1, -1)
            place = np.minimum(np.searchsorted(known, key), len(known) - 1)
            scores[known[place] != key] = -np.inf
        best = np.argsort(-scores, kind="stable")[:2048]
        prefix, logp = every[best], scores[best]
    np.testing.assert_allclose(found.logp[0], logp, rtol=1e-4, atol=1e-4)


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


def test_batching_changes_no_result():
    run = helpers.quick_jit(functools.partial(beam_search, MODEL, width=3))
    for user in range(USERS):
        one = jax.tree.map(lambda x, user=user: x[user, None], BATCH)
        alone = jax.device_get(run(variables(), one, trie=TRIE))
        chex.assert_trees_all_equal(alone.sid[0], search(3, True).sid[user])
        chex.assert_trees_all_close(alone.logp[0], search(3, True).logp[user], atol=1e-5)


def test_nan_parameters_are_refused():
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), variables())
    run = helpers.quick_jit(functools.partial(beam_search, MODEL, width=3))
    with pytest.raises(InputError, match="2 of 2 users are NaN"):
        refuse_nan(jax.device_get(run(broken, BATCH, trie=TRIE)))
    refuse_nan(search(3, True))


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


@pytest.mark.parametrize("search", [beam_search, sample, sample_without_replacement])
def test_users_are_encoded_once_and_the_first_level_has_one_row(search):
    calls = []

    class Recorded(helpers.ToyModel):
        def apply(self, variables, *args, method):
            calls.append((method, args[0].shape))
            return super().apply(variables, *args, method=method)

    model = Recorded(3, 4)
    users = model.users(2)
    if search is beam_search:
        jax.eval_shape(functools.partial(search, model, width=10), None, users)
    else:
        keys = jax.random.split(jax.random.key(0), 2)
        jax.eval_shape(functools.partial(search, model, count=10), None, users, keys)
    assert [method for method, _ in calls] == ["start"] + ["decode_step"] * 3
    rows = [shape[1] for _, shape in calls[1:]]
    assert rows == [1, 10 if search is sample else 4, 10]
