"""Filters against searches of the catalogue that they leave."""

import functools

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.generation.beam import beam_search
from onerec_jax.generation.filters import SMALLEST, FilterBuilder, ItemsOf
from onerec_jax.generation.trie import build_trie

CODES, ITEMS = 40, 700
MODEL = helpers.ToyModel(3, CODES)


@functools.cache
def catalogue():
    """Items of which many share an ID or a prefix, their trie, and the builder."""
    rng = np.random.default_rng(3)
    sids = np.minimum(rng.geometric(0.15, (ITEMS, 3)) - 1, CODES - 1).astype(np.int32)
    leaf_sids, leaf = np.unique(sids, axis=0, return_inverse=True)
    trie = build_trie(leaf_sids, CODES)
    assert len(leaf_sids) < 0.9 * ITEMS
    return sids, trie, FilterBuilder(trie, leaf.reshape(-1))


def search(width, users, filter):
    run = helpers.quick_jit(functools.partial(beam_search, MODEL, width=width))
    return jax.device_get(run(None, users, trie=catalogue()[1], filter=filter))


def legal_ids(excluded, allowed):
    sids = catalogue()[0]
    items = set(range(ITEMS) if allowed is None else allowed) - set(excluded)
    return {tuple(sids[item].tolist()) for item in items}


def requests():
    """Excluded and allowed rows of users of every kind, and what they leave."""
    sids = catalogue()[0]
    rng = np.random.default_rng(0)
    below = np.flatnonzero(sids[:, 0] == 0)  # the most popular branch as a whole
    pairs = np.flatnonzero((sids[:, 0] < 3) & (sids[:, 1] == 1))
    excluded = [
        np.zeros(0, int),
        rng.choice(ITEMS, 300, replace=False),
        np.concatenate([below, pairs]),
        np.arange(ITEMS),  # nothing is left
        rng.choice(ITEMS, 50),  # with repetitions
        np.zeros(0, int),
        np.arange(ITEMS - 1),
    ]
    some = rng.choice(ITEMS, 90, replace=False)
    allowed = [None, None, None, None, some, np.zeros(0, int), np.arange(ITEMS)]
    return excluded, allowed


@pytest.mark.parametrize("width", [5, 600])
def test_beams_are_those_of_the_filtered_catalogue(width):
    users = MODEL.users(7)
    excluded, allowed = requests()
    filter = catalogue()[2](excluded, allowed)
    found = search(width, users, filter)
    legal = [legal_ids(*pair) for pair in zip(excluded, allowed, strict=True)]
    for user, expected in enumerate(MODEL.plain_search(users, width, legal)):
        alive = len(expected)
        assert list(map(tuple, found.sid[user, :alive].tolist())) == [s for s, _ in expected]
        np.testing.assert_allclose(
            found.logp[user, :alive], [score for _, score in expected], rtol=1e-5, atol=1e-5
        )
        np.testing.assert_array_equal(found.leaf[user, alive:], -1)
    assert [len(ids) for ids in legal][3] == 0
    assert [len(ids) for ids in legal][6] == 1


def test_a_trie_of_the_filtered_catalogue_gives_the_same():
    """An ID that other items share lives on."""
    users, (excluded, _) = MODEL.users(1), requests()
    found = search(20, users, catalogue()[2](excluded[1:2]))
    left = np.array(sorted(legal_ids(excluded[1], None)), np.int32)
    run = helpers.quick_jit(functools.partial(beam_search, MODEL, width=20))
    other = jax.device_get(run(None, users, trie=build_trie(left, CODES)))
    np.testing.assert_array_equal(found.sid, other.sid)
    np.testing.assert_array_equal(found.logp, other.logp)


def test_filters_come_in_few_shapes_and_one_that_masks_nothing_changes_nothing():
    build, users = catalogue()[2], MODEL.users(2)
    sizes = {build([np.arange(n)] * 2).code.shape for n in range(0, ITEMS, 9)}
    assert sizes == {(2, 3, SMALLEST), (2, 3, 4 * SMALLEST), (2, 3, 16 * SMALLEST)}
    nothing = build([[], []])
    chex.assert_trees_all_equal(search(9, users, nothing), search(9, users, None))
    assert not nothing.keep.any()


def test_items_of_blocked_authors():
    items_of = ItemsOf(np.array([4, 0, 4, 2, 0, 1]))
    assert items_of([4, 1]).tolist() == [0, 2, 5]
    assert items_of([3]).tolist() == []  # an author of nothing
    assert items_of([]).tolist() == []


def test_a_filter_without_a_trie_is_refused():
    filter = catalogue()[2]([[]])
    with pytest.raises(InputError, match="trie="):
        beam_search(MODEL, None, jnp.asarray(MODEL.users(1)), width=2, filter=filter)
