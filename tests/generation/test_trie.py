"""The flat trie against a dict of sets."""

import collections

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.generation.trie import Trie, build_trie


def dict_of_sets(sids):
    children = collections.defaultdict(set)
    for sid in sids.tolist():
        for level, code in enumerate(sid):
            children[tuple(sid[:level])].add(code)
    return children


children = helpers.quick_jit(Trie.children, static_argnums=2)


@pytest.mark.parametrize(("items", "levels", "size"), [(100, 4, 5), (1, 3, 9), (30, 1, 12)])
def test_children_against_a_dict_of_sets(items, levels, size):
    leaf_sids = helpers.random_ids(items, levels=levels, codebook_size=size).leaf_sids
    trie, expected = build_trie(leaf_sids), dict_of_sets(leaf_sids)
    assert trie.levels == levels
    nodes = {(): 0}  # prefix -> node of its level
    for level in range(levels):
        below = {}
        fan_out = max(len(expected[prefix]) for prefix in nodes)
        assert trie.fan_out[level] == fan_out
        numbers = np.array(list(nodes.values()), np.int32)
        child, code, exists = jax.device_get(children(trie, numbers, level))
        chex.assert_shape([child, code, exists], (len(nodes), fan_out))
        for row, prefix in enumerate(nodes):
            real = exists[row]
            assert code[row][real].tolist() == sorted(expected[prefix])  # in order of code
            for number, last in zip(child[row][real], code[row][real], strict=True):
                below[(*prefix, int(last))] = int(number)
        nodes = below
    # A leaf's number is its place in the sorted table.
    assert sorted(nodes) == [tuple(sid) for sid in leaf_sids.tolist()]
    assert [nodes[tuple(sid)] for sid in leaf_sids.tolist()] == list(range(len(leaf_sids)))


def test_padding_repeats_an_existing_node():
    trie = build_trie(np.array([[0, 1], [0, 3], [0, 4], [2, 2]], np.int32))
    child, code, exists = jax.device_get(children(trie, jnp.array([[1, 0]]), 1))
    np.testing.assert_array_equal(exists, [[[1, 0, 0], [1, 1, 1]]])
    np.testing.assert_array_equal(child, [[[3, 3, 3], [0, 1, 2]]])
    np.testing.assert_array_equal(code, [[[2, 2, 2], [1, 3, 4]]])


def test_memory_is_three_integers_a_node():
    leaf_sids = helpers.random_ids(300, codebook_size=8).leaf_sids
    trie = build_trie(leaf_sids)
    nodes = sum(len(np.unique(leaf_sids[:, :level], axis=0)) for level in (1, 2, 3))
    chex.assert_type(jax.tree.leaves(trie), jnp.int32)
    assert sum(x.size for x in jax.tree.leaves(trie)) <= 3 * nodes + 2
