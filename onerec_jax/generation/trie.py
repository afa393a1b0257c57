"""The trie of semantic IDs that exist, as flat arrays for the device.

Nodes of a level are numbered in lexicographic order, so the children of a node are a contiguous
run of the next level, and a leaf's number is the place of its ID in the sorted list of distinct
IDs. Memory is 12 bytes a node (start, count, code), whatever the codebook size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Trie:
    """Children of every node, level by level. Level 0 is the root."""

    start: tuple[jax.Array, ...]  # int32 [nodes of level l], first child
    count: tuple[jax.Array, ...]  # int32 [nodes of level l], number of children
    code: tuple[jax.Array, ...]  # int32 [nodes of level l + 1], code that leads to a node
    fan_out: tuple[int, ...] = struct.field(pytree_node=False)  # most children on each level

    @property
    def levels(self) -> int:
        return len(self.fan_out)

    def children(self, node, level: int):
        """All children of the given nodes, padded to the level's fan-out.

        Args:
          node: int32 `[...]`, nodes of `level`.

        Returns:
          child int32 `[..., C]` (nodes of `level + 1`), code int32 `[..., C]`, exists bool
          `[..., C]`. Padding repeats an existing node.
        """
        step = jnp.arange(self.fan_out[level])
        start, count = self.start[level][node], self.count[level][node]
        exists = step < count[..., None]
        child = start[..., None] + jnp.where(exists, step, 0)
        return child, self.code[level][child], exists


def build_trie(leaf_sids: np.ndarray) -> Trie:
    """Builds the trie of distinct, lexicographically sorted IDs, int32 `[leaves, levels]`."""
    leaf_sids = np.asarray(leaf_sids)
    leaves, levels = leaf_sids.shape
    starts, counts, codes, fan_out = [], [], [], []
    parent = np.zeros(leaves, np.int64)  # node of each leaf's prefix on the current level
    for level in range(levels):
        new = np.ones(leaves, bool)  # does this leaf open a new node of the next level?
        new[1:] = np.any(leaf_sids[1:, : level + 1] != leaf_sids[:-1, : level + 1], axis=1)
        node = np.cumsum(new) - 1
        count = np.bincount(parent[new])
        starts.append((np.cumsum(count) - count).astype(np.int32))
        counts.append(count.astype(np.int32))
        codes.append(leaf_sids[new, level].astype(np.int32))
        fan_out.append(int(count.max()))
        parent = node
    device = [tuple(jnp.asarray(x) for x in arrays) for arrays in (starts, counts, codes)]
    return Trie(*device, fan_out=tuple(fan_out))
