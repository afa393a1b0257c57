"""Which nodes of a trie die, or live, if items are left out: the host's half of filters.

NumPy alone, for an exported model is served without the code that made it.
"""

import numpy as np

SMALLEST = 64
"""Listed nodes of the smallest bucket; each is four times the one before, to compile few shapes."""


class FilterNodes:
    """Lists of nodes for one trie."""

    def __init__(self, start, code, leaf_of_item: np.ndarray):
        """`start`, `code`: of the `Trie`; `leaf_of_item` int32 `[items]`, from `SemanticIds`."""
        self.leaf_of_item = leaf_of_item
        self.start = [np.asarray(x) for x in start]
        self.code = [np.asarray(x) for x in code]
        self.items_of_leaf = np.bincount(leaf_of_item)

    def __call__(self, excluded=None, allowed=None, *, size: int = SMALLEST):
        """The fields of the `Filter` of B users.

        Args:
          excluded: item rows to leave out, one array a user; None: nothing.
          allowed: item rows to choose from, one array a user, or None for a user who may have all;
            None: all users may. A user's `excluded` are taken off them.
          size: least X.
        """
        users = len(allowed if excluded is None else excluded)
        excluded = [()] * users if excluded is None else excluded
        allowed = [None] * users if allowed is None else allowed
        listed = [
            self._dead(out) if subset is None else self._alive(subset, out)
            for out, subset in zip(excluded, allowed, strict=True)
        ]
        longest = max((len(parent) for levels in listed for parent, _ in levels), default=0)
        while size < longest:
            size *= 4
        parent = np.full((users, len(self.start), size), -1, np.int32)
        code = np.zeros_like(parent)
        for user, levels in enumerate(listed):
            for level, (parents, codes) in enumerate(levels):
                parent[user, level, : len(parents)] = parents
                code[user, level, : len(codes)] = codes
        return parent, code, np.array([subset is not None for subset in allowed])

    def _alive(self, allowed, excluded):
        items = np.setdiff1d(allowed, excluded).astype(np.int64)
        node = np.unique(self.leaf_of_item[items])
        levels = []
        for level in reversed(range(len(self.start))):
            parent = self._parents(node, level)
            levels.append((parent, self.code[level][node]))
            node = np.unique(parent)
        return levels[::-1]

    def _dead(self, excluded):
        items = np.unique(excluded).astype(np.int64)
        node, count = np.unique(self.leaf_of_item[items], return_counts=True)
        node = node[count == self.items_of_leaf[node]]
        levels = []
        for level in reversed(range(len(self.start))):
            parent = self._parents(node, level)
            levels.append((parent, self.code[level][node]))
            above, count = np.unique(parent, return_counts=True)
            start = self.start[level]
            node = above[count == start[above + 1] - start[above]]
        return levels[::-1]

    def _parents(self, node, level):
        return np.searchsorted(self.start[level], node, side="right") - 1
