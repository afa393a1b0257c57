"""Filters of one request: items left out (seen, of blocked authors), or a subset to choose from.

A filter acts on items. A semantic ID is masked only if all of its items are, and a prefix only if
all IDs below it are; beams are then those of the catalogue without them. What is left to do behind
the beams is to leave out masked items of IDs that others share: `expand_leaves`, then `drop_seen`.

The host finds the nodes that die, or with a subset those that live, and sends them level by level
as short lists; the device looks up which beam each of them lies below and sets its bit.

Axes: B users, W beams, X listed nodes of a level, J words of a mask.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from onerec_jax.generation.filter_nodes import SMALLEST, FilterNodes
from onerec_jax.generation.trie import Trie


@struct.dataclass
class Filter:
    """Nodes of each level that users must not reach, or outside of which they must not."""

    parent: jax.Array  # int32 [B, levels, X], node of level l above a listed node; -1 = padding
    code: jax.Array  # int32 [B, levels, X], code that leads from it to the listed node
    keep: jax.Array  # bool [B], True: listed nodes are all that live; False: they are dead

    def legal(self, words_bwj, node_bw, level: int):
        """Masks of the codes that may follow: what exists, less what is filtered.

        Args:
          words_bwj: uint32, packed, from `Trie.following`.
          node_bw: int32, nodes of `level`; -1 for dead beams.
        """
        listed_bwj = jax.vmap(_mask_of_listed, (0, 0, 0, None))(
            node_bw, self.parent[:, level], self.code[:, level], words_bwj.shape[2]
        )
        return words_bwj & jnp.where(self.keep[:, None, None], listed_bwj, ~listed_bwj)


def _mask_of_listed(node_w, parent_x, code_x, words):
    """The listed nodes of a user as masks of the beams above them, packed uint32 `[W, J]`."""
    width = len(node_w)
    order_w = jnp.argsort(node_w)
    sorted_w = node_w[order_w]

    def beam_at(node):
        """The first of the beams at a node, and whether there is one."""
        place = jnp.searchsorted(sorted_w, node, method="scan_unrolled")
        place = jnp.minimum(place, width - 1)
        return order_w[place], sorted_w[place] == node

    beam_x, reached_x = beam_at(parent_x)
    word_x = jnp.where(reached_x & (parent_x >= 0), beam_x * words + code_x // 32, width * words)
    bit_x = jnp.uint32(1) << (code_x % 32).astype(jnp.uint32)
    # Listed nodes are distinct, so that sums of bits are unions.
    mask = jnp.zeros(width * words, jnp.uint32).at[word_x].add(bit_x, mode="drop")
    # Draws may stand at the same node; beams never do.
    return mask.reshape(width, words)[beam_at(node_w)[0]]


class FilterBuilder:
    """Turns item rows into filters for one trie; on the host."""

    def __init__(self, trie: Trie, leaf_of_item: np.ndarray):
        """`leaf_of_item` int32 `[items]`, from `SemanticIds`."""
        self.nodes = FilterNodes(trie.start, trie.code, leaf_of_item)

    def __call__(self, excluded=None, allowed=None, *, size: int = SMALLEST) -> Filter:
        """The filter of B users.

        Args:
          excluded: item rows to leave out, one array a user; None: nothing.
          allowed: item rows to choose from, one array a user, or None for a user who may have all;
            None: all users may. A user's `excluded` are taken off them.
          size: least X.
        """
        return Filter(*self.nodes(excluded, allowed, size=size))


class ItemsOf:
    """Item rows by owner, for authors that a user has blocked, at the price of what is found."""

    def __init__(self, owner_of_item: np.ndarray):
        """`owner_of_item` int `[items]`, not negative."""
        self.items = np.argsort(owner_of_item, kind="stable").astype(np.int32)
        self.offsets = np.append(0, np.cumsum(np.bincount(owner_of_item)))

    def __call__(self, owners) -> np.ndarray:
        """Item rows of all of the owners, int32 `[n]`."""
        parts = [self.items[self.offsets[o] : self.offsets[o + 1]] for o in owners]
        return np.concatenate(parts) if parts else self.items[:0]
