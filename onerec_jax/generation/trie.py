"""The trie of semantic IDs that exist, as flat arrays for the device.

Nodes of a level are numbered in lexicographic order, so the children of a node are a contiguous run
of the next level, and a leaf's number is the place of its ID in the sorted list of distinct IDs.

What beam search asks is which codes may follow a node, as a packed mask; the mask is never larger
than the logits it is laid over, however wide a node. Two layouts answer, each where it is small:

- a *list* of child codes: 2 bytes a child and 4 a parent. A mask is made from at most `LONGEST`
  codes, and the child behind a code is found by counting the bits before it.
- a *row* of bits, ready made, for the nodes with more children than that: V / 8 bytes and 4. With
  8192 codes that is never more than 16 bytes a child.

20 million random items over 3 x 8192 codes take 8.2 bytes an item and two seconds to build: 8 MB of
rows for the 8192 nodes of the first level, lists of at most 8 codes for the 17 million of the
second.

Array sizes are rounded up to buckets and the trie is an argument of whatever is compiled, so a
changed catalogue takes the place of another without compiling anew, as long as the numbers of nodes
of each level and of wide nodes stay in their buckets (an eighth of an octave) and the longest list
of a level does not pass a power of two.

Axes: N nodes of a level, R wide ones, V codes, J = ceil(V / 32) words of a mask, B users, W beams.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

LONGEST = 64
"""Children from which on a node has a row of bits."""
NO_NODE = np.iinfo(np.int32).max


@struct.dataclass
class Trie:
    """Children of every node, level by level. Level 0 is the root."""

    start: tuple[jax.Array, ...]  # int32 [N + 1], first child of each node; then the number of all
    code: tuple[jax.Array, ...]  # uint16 or int32 [N of the next level], code that leads to a node
    wide: tuple[jax.Array, ...]  # int32 [R], nodes that have a row, ascending; NO_NODE pads
    row: tuple[jax.Array, ...]  # uint32 [R, J], packed mask of the codes that follow
    longest: tuple[int, ...] = struct.field(pytree_node=False)  # of the lists of each level

    @property
    def levels(self) -> int:
        return len(self.longest)

    def following(self, node, level: int):
        """Which codes exist below nodes of `level`: int32 `[...]` -> packed uint32 `[..., J]`."""
        node = jnp.maximum(node, 0)  # dead beams: any will do
        start, end = self.start[level][node], self.start[level][node + 1]
        place = start[..., None] + jnp.arange(self.longest[level])
        code = self.code[level].at[place].get(mode="clip").astype(jnp.int32)
        word = jnp.where(place < end[..., None], code // 32, -1)[..., None, :]
        bit = jnp.uint32(1) << (code % 32).astype(jnp.uint32)[..., None, :]
        words = jnp.arange(self.row[level].shape[1])[:, None]
        listed = jnp.where(word == words, bit, 0).sum(-1, dtype=jnp.uint32)
        wide = self.wide[level]
        place = jnp.searchsorted(wide, node, method="scan_unrolled")
        place = jnp.minimum(place, len(wide) - 1)
        has_row = wide[place] == node
        return jnp.where(has_row[..., None], self.row[level][place], listed)

    def child(self, node, level: int, words, code):
        """The node behind a code.

        Args:
          node: int32 `[...]`, of `level`.
          words: uint32 `[..., J]`, what `following` gives for it.
          code: int32 `[...]`, one of the codes that exist.

        Returns:
          Node of `level + 1`, int32 `[...]`.
        """
        bit = code[..., None] - 32 * jnp.arange(words.shape[-1])
        below = (jnp.uint32(1) << jnp.clip(bit, 0, 31).astype(jnp.uint32)) - 1
        below = jnp.where(bit >= 32, jnp.uint32(0xFFFFFFFF), below)
        rank = jax.lax.population_count(words & below).sum(-1).astype(jnp.int32)
        return self.start[level][jnp.maximum(node, 0)] + rank


def bucket(size: int) -> int:
    """The size rounded up to an eighth of an octave: 1 to 16, then 18, 20, …, 32, 36, …"""
    step = 2 ** max(int(size - 1).bit_length() - 4, 0)
    return max(-(-size // step) * step, 1)


def pack(rows, codes, size: int, codebook_size: int) -> np.ndarray:
    """Packed masks uint32 `[size, J]` with the bits `(row, code)` set."""
    masks = np.zeros((size, -(-codebook_size // 32)), np.uint32)
    np.bitwise_or.at(masks, (rows, codes // 32), np.uint32(1) << (codes % 32).astype(np.uint32))
    return masks


def build_trie(leaf_sids: np.ndarray, codebook_size: int) -> Trie:
    """Builds the trie of distinct, lexicographically sorted IDs, int32 `[leaves, levels]`."""
    leaf_sids = np.asarray(leaf_sids)
    leaves, levels = leaf_sids.shape
    dtype = np.uint16 if codebook_size <= 2**16 else np.int32
    starts, codes, wides, rows, longest = [], [], [], [], []
    new = np.zeros(leaves, bool)  # does this leaf open a new node of the current level?
    new[0] = True
    for level in range(levels):
        first = np.flatnonzero(new)  # leaf that opened each node
        new[1:] |= leaf_sids[1:, level] != leaf_sids[:-1, level]
        opens = np.flatnonzero(new)
        code = leaf_sids[opens, level]
        start = np.append(np.searchsorted(opens, first), len(opens)).astype(np.int32)
        count = np.diff(start)
        wide = np.flatnonzero(count > LONGEST).astype(np.int32)
        children = np.concatenate([np.arange(start[w], start[w + 1]) for w in wide] or [[]])
        row = np.repeat(np.arange(len(wide)), count[wide])
        most = int(count[count <= LONGEST].max(initial=1))
        padded = bucket(len(wide))
        starts.append(_padded(start, bucket(len(first)) + 1, start[-1]))
        codes.append(_padded(code.astype(dtype), bucket(len(code)), 0))
        wides.append(_padded(wide, padded, NO_NODE))
        rows.append(pack(row, code[children.astype(np.int64)], padded, codebook_size))
        longest.append(1 << (most - 1).bit_length())
    device = [tuple(jnp.asarray(x) for x in arrays) for arrays in (starts, codes, wides, rows)]
    return Trie(*device, longest=tuple(longest))


def _padded(x, size, value):
    return np.pad(x, (0, size - len(x)), constant_values=value)
