"""The flat trie against a dict of sets."""

import collections

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.generation.topk import unpack
from onerec_jax.generation.trie import LONGEST, NO_NODE, Trie, bucket, build_trie, pack

following = helpers.quick_jit(Trie.following, static_argnums=2)
child = helpers.quick_jit(Trie.child, static_argnums=2)


def dict_of_sets(sids):
    children = collections.defaultdict(set)
    for sid in sids.tolist():
        for level, code in enumerate(sid):
            children[tuple(sid[:level])].add(code)
    return children


def skewed_sids():
    """A root with many children; below it a node with many and nodes with few."""
    rng = np.random.default_rng(0)
    wide = np.stack([np.full(150, 7), np.arange(150), rng.integers(0, 200, 150)], axis=1)
    below = np.stack([np.full(90, 7), np.full(90, 3), np.arange(90) * 2], axis=1)
    few = rng.integers(0, 200, (400, 3))
    return np.unique(np.concatenate([wide, below, few]), axis=0).astype(np.int32)


CATALOGUES = {
    "four levels": (helpers.random_ids(100, levels=4, codebook_size=5).leaf_sids, 5),
    "full": (np.unique(np.indices((9, 9)).reshape(2, -1).T, axis=0).astype(np.int32), 9),
    "one level": (helpers.random_ids(30, levels=1, codebook_size=12).leaf_sids, 12),
    "skewed": (skewed_sids(), 200),
    "one item": (np.array([[31, 0, 63]], np.int32), 64),
}


@pytest.mark.parametrize("name", CATALOGUES)
def test_masks_and_children_against_a_dict_of_sets(name):
    leaf_sids, size = CATALOGUES[name]
    trie, expected = build_trie(leaf_sids, size), dict_of_sets(leaf_sids)
    nodes = {(): 0}  # prefix -> node of its level
    for level in range(trie.levels):
        numbers = np.array(list(nodes.values()), np.int32)
        words = following(trie, numbers, level)
        chex.assert_shape(words, (len(nodes), -(-size // 32)))
        legal = np.asarray(unpack(words, size))
        below = {}
        for row, prefix in enumerate(nodes):
            assert set(np.flatnonzero(legal[row])) == expected[prefix]
        rows, codes = np.nonzero(legal)
        found = child(trie, numbers[rows], level, words[rows], codes.astype(np.int32))
        prefixes = list(nodes)
        for row, code, number in zip(rows, codes.tolist(), found.tolist(), strict=True):
            below[(*prefixes[row], code)] = number
        nodes = below
    # A leaf's number is its place in the sorted table.
    assert [nodes[tuple(sid)] for sid in leaf_sids.tolist()] == list(range(len(leaf_sids)))


def test_wide_nodes_have_rows_and_others_lists():
    leaf_sids, size = CATALOGUES["skewed"]
    trie = build_trie(leaf_sids, size)
    counts = {prefix: len(codes) for prefix, codes in dict_of_sets(leaf_sids).items()}
    for level in range(3):
        sizes = np.array([n for prefix, n in counts.items() if len(prefix) == level])
        wide = np.asarray(trie.wide[level])
        assert (wide < NO_NODE).sum() == (sizes > LONGEST).sum()
        narrow = sizes[sizes <= LONGEST]
        most = narrow.max(initial=1)
        assert most <= trie.longest[level] < 2 * most
    assert [int((np.asarray(w) < NO_NODE).sum()) for w in trie.wide] == [1, 1, 1]


def test_bytes_an_item_are_as_stated():
    """2 bytes a child, 4 a parent, and rows, which cost at most 16 bytes a child."""
    leaf_sids, size = CATALOGUES["skewed"]
    trie = build_trie(leaf_sids, size)
    parents = sum(len(np.unique(leaf_sids[:, :level], axis=0)) for level in (0, 1, 2))
    children = sum(len(np.unique(leaf_sids[:, :level], axis=0)) for level in (1, 2, 3))
    rows = 3 * (4 * len(pack([], np.zeros(0, int), 1, size)[0]) + 4)
    found = sum(x.nbytes for x in jax.tree.leaves(trie))
    assert found <= 1.125 * (2 * children + 4 * (parents + 3) + rows)
    assert rows <= 16 * 3 * LONGEST


def test_bucket():
    assert [bucket(n) for n in (0, 1, 15, 16, 17, 31, 32, 33, 1000)] == [
        1, 1, 15, 16, 18, 32, 32, 36, 1024,
    ]  # fmt: skip
    sizes = np.arange(1, 5000)
    padded = np.array([bucket(int(n)) for n in sizes])
    assert (padded >= sizes).all()
    assert (padded <= 1.125 * sizes).all()


def test_a_changed_catalogue_is_not_compiled_anew():
    rng = np.random.default_rng(1)
    # Both nearly fill their first two levels, so that only leaves differ in number.
    old, new = (
        np.unique(rng.integers(0, 16, (n, 3)), axis=0).astype(np.int32) for n in (1990, 2000)
    )
    tries = [build_trie(sids, 16) for sids in (old, new)]
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def masks(trie, node):
        return trie.following(node, 2)

    node = jnp.arange(256)
    for trie, sids in zip(tries, (old, new), strict=True):
        legal = np.asarray(unpack(masks(trie, node), 16))
        codes = dict_of_sets(sids)
        for number in range(256):
            assert set(np.flatnonzero(legal[number])) == codes[(number // 16, number % 16)]
