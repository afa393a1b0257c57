"""Beam search over lists: against brute force over all lists, and against plain Python."""

import functools
import itertools
import types

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.generation.beam import beam_search, refuse_nan
from onerec_jax.generation.filters import FilterBuilder
from onerec_jax.generation.session_beam import complete, session_beam_search
from onerec_jax.generation.topk import unpack
from onerec_jax.generation.trie import build_trie
from onerec_jax.losses.ntp import list_log_probs
from onerec_jax.models.onerec import OneRec

# -------------------------------------------------------------------- the model, all lists at once

V, L, M, USERS = 3, 2, 3, 2
CFG = helpers.tiny_config(session_items=M, num_experts=0, decoder_layers=1, pathways=("short",))
SPEC = helpers.bare_spec(codebook_size=V, levels=L)
MODEL = OneRec(CFG, SPEC)
BATCH = helpers.random_batch(CFG, SPEC, USERS)
LEAVES = np.array([(0, 0), (0, 2), (1, 1), (2, 0), (2, 1), (2, 2)], np.int32)


@functools.cache
def variables():
    return helpers.random_variables(MODEL, BATCH)


@functools.cache
def search(items=M, width=130):
    run = functools.partial(session_beam_search, MODEL, width=width, items=items)
    trie = build_trie(LEAVES, V)
    return jax.device_get(helpers.quick_jit(run)(variables(), BATCH, trie=trie))


def test_wide_beams_are_brute_force():
    """Beams for every prefix of a list: nothing can be lost on the way. 120 lists of three of six
    IDs."""
    lists = np.array(list(itertools.permutations(range(len(LEAVES)), M)))
    target = np.tile(LEAVES[lists].reshape(1, -1, L), (USERS, 1, 1))
    logits = helpers.quick_jit(MODEL.apply)(variables(), BATCH.replace(target=target))
    logp = np.asarray(list_log_probs(logits, target, M))
    found, alive = search(), len(lists)
    chex.assert_shape(found.sid, (USERS, 130, M, L))
    number = {tuple(codes): i for i, codes in enumerate(LEAVES[lists].reshape(alive, -1).tolist())}
    codes = found.sid[:, :alive].reshape(USERS, alive, -1).tolist()
    order = np.array([[number[tuple(x)] for x in user] for user in codes])
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(alive), (USERS, 1)))
    expected = np.take_along_axis(logp, order, axis=1)
    np.testing.assert_allclose(found.logp[:, :alive], expected, rtol=1e-4, atol=1e-4)
    assert (np.diff(found.logp[:, :alive]) <= 0).all()
    np.testing.assert_array_equal(found.leaf[:, :alive], lists[order])
    np.testing.assert_array_equal(found.logp[:, alive:], -np.inf)  # dead beams
    np.testing.assert_array_equal(found.sid[:, alive:], -1)
    np.testing.assert_array_equal(found.leaf[:, alive:], -1)


def test_the_first_item_is_that_of_a_single_search():
    found = search(items=1, width=5)
    trie = build_trie(LEAVES, V)
    one = helpers.quick_jit(functools.partial(beam_search, MODEL, width=5))
    one = jax.device_get(one(variables(), BATCH, trie=trie))
    np.testing.assert_array_equal(found.sid[:, :, 0], one.sid)
    np.testing.assert_array_equal(found.leaf[:, :, 0], one.leaf)
    np.testing.assert_allclose(found.logp, one.logp, rtol=1e-6)


def test_bad_arguments():
    for items in (0, M + 1):
        with pytest.raises(InputError, match=f"lists of {items} items: the model generates 1 to 3"):
            session_beam_search(MODEL, variables(), BATCH, width=2, items=items)
    broken = search(items=1, width=5).replace(logp=np.full((2, 5), np.nan))
    with pytest.raises(InputError, match="2 of 2 users are NaN"):
        refuse_nan(broken)


# ------------------------------------------------------------------ a toy model, beams of any width


class ToyLists(helpers.ToyModel):
    """Codes change a state, as in `ToyModel`; BOS of each place in the list does too."""

    def __init__(self, levels, codebook_size, items):
        super().__init__(levels, codebook_size)
        self.cfg = types.SimpleNamespace(session_items=items)
        self.bos = np.random.default_rng(7).standard_normal((items, 6)).astype(np.float32)

    def decode_step(self, code, cross, cache, level, item):
        state = cache.state
        if level or item:
            state = jnp.tanh(state + jnp.asarray(self.codes)[level - 1, code])
        if not level:
            state = jnp.tanh(state + self.bos[item])
        return state @ self.heads[level], helpers.ToyCache(state)

    def next_codes(self, user, codes):
        """log P of every code behind the codes of a list so far, float64 `[V]`."""
        levels, state = self.spec.levels, np.float64(user)
        for place, code in enumerate([*codes, 0]):
            item, level = divmod(place, levels)
            if not level:
                state = np.tanh(state + self.bos[item])
            if place < len(codes):
                state = np.tanh(state + self.codes[level, code])
        logits = state @ np.float64(self.heads[len(codes) % levels])
        return logits - np.log(np.exp(logits).sum())

    def plain_lists(self, user, width, legal):
        """`[(codes of the list, score), …]` of one user, best first; `legal`: a set of IDs."""
        levels, beams = self.spec.levels, [((), 0.0)]
        for place in range(self.cfg.session_items * levels):
            found = []
            for codes, score in beams:
                begin = place - place % levels
                listed = {codes[i : i + levels] for i in range(0, begin, levels)}
                left = {sid[: place - begin + 1] for sid in legal - listed}
                for code, p in enumerate(self.next_codes(user, codes)):
                    if (*codes[begin:], code) in left:
                        found.append(((*codes, code), score + float(p)))
            beams = sorted(found, key=lambda beam: -beam[1])[:width]
        return beams


def check(model, users, found, width, legal):
    """Beams of each user are those of the search in plain Python."""
    levels = model.spec.levels
    for number, (user, allowed) in enumerate(zip(users, legal, strict=True)):
        expected = model.plain_lists(user, width, allowed)
        alive = len(expected)
        scores = [score for _, score in expected]
        assert np.diff(np.sort(scores)).min(initial=1) > 1e-6  # no matter of rounding
        codes = found.sid[number].reshape(width, -1)
        assert list(map(tuple, codes[:alive].tolist())) == [codes for codes, _ in expected]
        np.testing.assert_allclose(found.logp[number, :alive], scores, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found.logp[number, alive:], -np.inf)
        np.testing.assert_array_equal(found.leaf[number, alive:], -1)
        for listed in found.sid[number, :alive].reshape(alive, -1, levels).tolist():
            assert len(set(map(tuple, listed))) == len(listed)
    return alive


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("levels", "codes", "items", "count", "widths"),
    [
        (3, 4, 3, 20, (3, 30)),
        (2, 3, 5, 5, (130,)),  # every list holds all IDs
        (1, 4, 3, 4, (30,)),
        (2, 64, 2, 300, (20,)),  # rows cut into chunks
    ],
)
def test_every_width_is_plain_search(levels, codes, items, count, widths, masked):
    model = ToyLists(levels, codes, items)
    users = model.users(2)
    ids = np.array(list(itertools.product(range(codes), repeat=levels)), np.int32)
    if masked:
        chosen = np.random.default_rng(3).choice(len(ids), count, replace=False)
        ids = ids[np.sort(chosen)]
    trie = build_trie(ids, codes) if masked else None
    legal = set(map(tuple, ids.tolist()))
    for width in widths:
        run = helpers.quick_jit(functools.partial(session_beam_search, model, width=width))
        found = jax.device_get(run(None, users, trie=trie))
        check(model, users, found, width, [legal] * 2)
        if masked:
            place = {sid: leaf for leaf, sid in enumerate(map(tuple, ids.tolist()))}
            alive = np.isfinite(found.logp)
            sids = found.sid[alive].reshape(-1, levels).tolist()
            leaves = [place[tuple(sid)] for sid in sids]
            np.testing.assert_array_equal(found.leaf[alive].reshape(-1), leaves)


def test_filters_hold_for_every_item():
    """One user has seen much of one branch, the other may choose among four IDs: where a list has
    the rest of a branch, no beam goes there."""
    model = ToyLists(3, 3, 3)
    users = model.users(2)
    ids = np.array([s for s in itertools.product(range(3), repeat=3) if sum(s) != 3], np.int32)
    trie = build_trie(ids, 3)
    filters = FilterBuilder(trie, np.arange(len(ids)))
    zero = [leaf for leaf, sid in enumerate(ids) if sid[0] == 0]
    excluded, allowed = [zero[:-2], [zero[0]]], [None, [*zero[:3], 9, 15]]
    run = helpers.quick_jit(functools.partial(session_beam_search, model, width=40))
    found = jax.device_get(run(None, users, trie=trie, filter=filters(excluded, allowed)))
    every = [tuple(sid) for sid in ids.tolist()]
    legal = [set(every) - {every[i] for i in excluded[0]}]
    legal.append({every[i] for i in allowed[1]} - {every[zero[0]]})
    alive = check(model, users, found, 40, legal)
    assert alive == 24  # lists of three of four


def test_more_items_than_ids():
    model = ToyLists(2, 3, 3)
    run = functools.partial(session_beam_search, model, width=4)
    run = helpers.quick_jit(run)
    found = jax.device_get(run(None, model.users(1), trie=build_trie(LEAVES[:2], 3)))
    assert np.isneginf(found.logp).all()
    assert (found.sid == -1).all()


def test_complete_against_a_loop():
    """Random lists over a small trie: a code is done if no ID below it is left."""
    rng = np.random.default_rng(0)
    ids = np.array([s for s in itertools.product(range(4), repeat=3) if sum(s) % 3], np.int32)
    ids = ids[rng.random(len(ids)) < 0.5]
    trie = build_trie(ids, 4)
    lists = np.array([rng.permutation(len(ids))[:6] for _ in range(60)])[None]
    prefixes = [np.unique(ids[:, : level + 1], axis=0).tolist() for level in range(3)]
    path = np.stack(
        [
            np.array([prefixes[level].index(sid[: level + 1].tolist()) for sid in ids])[lists]
            for level in range(3)
        ],
        axis=-1,
    )
    done = 0
    for level in range(3):
        sid = ids[rng.integers(0, len(ids), (1, 60))][..., :level]
        words = complete(jnp.asarray(ids[lists]), jnp.asarray(path), sid, level, 4, trie)
        found = np.asarray(unpack(words, 4))
        for beam in range(60):
            left = [ids[i] for i in range(len(ids)) if i not in lists[0, beam]]
            left = {tuple(x[: level + 1]) for x in left}
            known = {tuple(x[: level + 1]) for x in ids[lists[0, beam]]}
            for code in range(4):
                prefix = (*sid[0, beam], code)
                expected = prefix in known and prefix not in left
                assert found[0, beam, code] == expected
                done += expected and level < 2
    assert done > 5


def test_passes_of_the_decoder():
    """Users are encoded once; the first position has one row."""
    calls = []

    class Recorded(ToyLists):
        def apply(self, variables, *args, method):
            calls.append((method, args[0].shape))
            return super().apply(variables, *args, method=method)

    model = Recorded(3, 4, 2)
    jax.eval_shape(functools.partial(session_beam_search, model, width=10), None, model.users(2))
    assert [method for method, _ in calls] == ["start"] + ["decode_step"] * 6
    assert [shape[1] for _, shape in calls[1:]] == [1, 4, 10, 10, 10, 10]
