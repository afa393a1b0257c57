"""Recall of a small cascade, the kind of system that one generative model is to replace.

Items that Swing (arXiv 2010.05525) finds near what a user liked lately, popular ones where these
are too few; a ranking model then chooses among them (`policies.CascadePolicy`).

Axes: B users, I items, n places of a list.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from onerec_jax.data.features import positive_actions
from onerec_jax.data.schema import Dataset
from onerec_jax.data.splits import Split, train_mask
from onerec_jax.inputs import PositiveRule
from onerec_jax.tokenizer.pairs import PairConfig, swing


@dataclasses.dataclass(frozen=True, eq=False)
class SwingRecall:
    """Items near those that a user liked: `recall(liked, seen, n)`."""

    neighbours: sp.csr_array
    """Float32 `[I, I]`: Swing scores of each item's nearest."""
    popular: np.ndarray
    """Int32 `[I]`, item rows, the most popular first."""

    @classmethod
    def fit(
        cls,
        dataset: Dataset,
        split: Split,
        positive: PositiveRule,
        popular: np.ndarray,
        *,
        neighbours: int,
    ) -> "SwingRecall":
        """From the positive actions of the training part.

        Args:
          neighbours: kept of each item.
        """
        keep = train_mask(dataset, split) & positive_actions(dataset, positive)
        user, size = dataset.interactions["user_row"].to_numpy()[keep], dataset.num_items
        pairs = swing(user, dataset.item_rows[keep], size, PairConfig(top_k=neighbours))
        matrix = sp.csr_array((pairs.score, (pairs.first, pairs.second)), shape=(size, size))
        return cls(matrix, popular)

    def __call__(
        self, liked: Sequence[np.ndarray], seen: Sequence[np.ndarray], n: int
    ) -> np.ndarray:
        """The n items with the highest sum of scores over what a user liked, best first.

        Equal sums by lower row; then popular items.

        Args:
          liked: item rows of each of B users; one that is named twice counts once.
          seen: item rows to leave out.

        Returns:
          Item rows int32 `[B, n]`; -1 where the catalogue has no more.
        """
        lists = np.full((len(liked), n), -1, np.int32)
        score = (self._triggers(liked) @ self.neighbours).tocsr()
        for row, known, start, end in zip(
            lists, seen, score.indptr[:-1], score.indptr[1:], strict=True
        ):
            item, value = score.indices[start:end], score.data[start:end]
            fresh = ~np.isin(item, known)
            item, value = item[fresh], value[fresh]
            found = item[np.lexsort((item, -value))[:n]]
            more = unlisted(self.popular, np.concatenate([known, found]), n - len(found))
            row[: len(found) + len(more)] = np.concatenate([found, more])
        return lists

    def flops(self, liked: Sequence[np.ndarray]) -> np.ndarray:
        """Two for each neighbour of what each user liked, int64 `[B]`; sorting is not counted."""
        return 2 * (self._triggers(liked) @ np.diff(self.neighbours.indptr)).astype(np.int64)

    def _triggers(self, liked) -> sp.csr_array:
        """Float32 `[B, I]`: 1 for what a user liked."""
        once = [np.unique(items) for items in liked]
        user = np.repeat(np.arange(len(once)), [len(items) for items in once])
        item = np.concatenate([*once, np.zeros(0, int)])
        shape = (len(once), self.neighbours.shape[0])
        return sp.csr_array((np.ones(len(item), np.float32), (user, item)), shape=shape)


def unlisted(popular: np.ndarray, taken: np.ndarray, n: int) -> np.ndarray:
    """The first n of `popular` that are not `taken`, fewer where there are no more."""
    head = popular[: n + len(taken)]
    return head[~np.isin(head, taken)][:n]
