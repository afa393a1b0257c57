"""Ranking by generation: beams to items, and what a test needs to know of them.

Axes: B users of a batch, U users in all, W beams, n places of a list.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np

from onerec_jax.data.batches import BatchBuilder, padded_batches
from onerec_jax.data.examples import Examples
from onerec_jax.distributed import fetch, local_share
from onerec_jax.evaluation.ranking import rank_of_target_in_list
from onerec_jax.generation.beam import Beams, beam_search, refuse_nan
from onerec_jax.generation.filters import Filter, FilterBuilder
from onerec_jax.generation.session_beam import SessionBeams, session_beam_search
from onerec_jax.generation.trie import Trie, build_trie
from onerec_jax.losses.ntp import ntp_loss
from onerec_jax.models.onerec import OneRec, resolve_dtype
from onerec_jax.sharding import on_mesh, put_batch
from onerec_jax.tokenizer.semantic_ids import SemanticIds


def expand_leaves(leaf_bw, offsets, items, n) -> np.ndarray:
    """Item lists of beams: each ID gives all its items, in serving order, before the next ID.

    Args:
      leaf_bw: int `[B, W]`, best first, -1 for dead beams.
      offsets, items: from `SemanticIds.items_by_leaf`.
      n: length of the lists.

    Returns:
      Item rows int32 `[B, n]`, -1 where the beams gave fewer items.
    """
    users, width = leaf_bw.shape
    alive = leaf_bw >= 0
    leaf = np.where(alive, leaf_bw, 0)
    # No ID can fill more than n places, so longer collision lists need not be unrolled.
    count = np.where(alive, np.minimum(offsets[leaf + 1] - offsets[leaf], n), 0)
    start = np.cumsum(count, axis=1) - count
    flat_count = count.reshape(-1)
    beam = np.repeat(np.arange(users * width), flat_count)
    within = np.arange(len(beam)) - np.repeat(np.cumsum(flat_count) - flat_count, flat_count)
    place = start.reshape(-1)[beam] + within
    fits = place < n
    lists = np.full((users, n), -1, np.int32)
    lists[beam[fits] // width, place[fits]] = items[offsets[leaf.reshape(-1)[beam]] + within][fits]
    return lists


def drop_seen(lists, seen, n) -> np.ndarray:
    """Removes each user's seen items and closes the gaps: `[B, m] -> [B, n]`, -1 at the end."""
    out = np.full((len(lists), n), -1, np.int32)
    for row, (items, known) in enumerate(zip(lists, seen, strict=True)):
        kept = items[(items >= 0) & ~np.isin(items, known)][:n]
        out[row, : len(kept)] = kept
    return out


def compute_copy(model: OneRec, variables):
    """The same variables with weights in the type that products read; results stay bit for bit.

    Searching with master weights, every level of every search first casts all of them: on a GPU
    that is three times the bytes of reading the copy. Router and norms stay in float32.
    """
    dtype = resolve_dtype(model.cfg.compute_dtype)

    def cast(path, leaf):
        wide = {"router", "scale"} & {key.key for key in path[-1:]}
        return leaf if wide else leaf.astype(dtype)

    return {**variables, "params": jax.tree_util.tree_map_with_path(cast, variables["params"])}


@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
    """What the model generated for U users and where their targets stand in it."""

    lists: np.ndarray  # int32 [U, n], item rows, -1 = none
    item_ranks: np.ndarray  # int32 [U], rank of the target item, NOT_RANKED if absent
    id_ranks: np.ndarray  # int32 [U], rank of the target's ID among the beams


@functools.lru_cache(maxsize=8)
def programs(model: OneRec, mesh):
    """Compiled search, search of lists, and loss: the same ones for all generators of a model.

    Validation, test and what is shown after it are generators of their own; so are the policy
    before and after post-training. None of them compiles what another has compiled.
    """
    search = jax.jit(on_mesh(functools.partial(beam_search, model), mesh), static_argnames="width")
    search_lists = jax.jit(
        on_mesh(functools.partial(session_beam_search, model), mesh),
        static_argnames=("width", "items"),
    )

    def loss(variables, batch):
        # Of M targets all are counted: one, or the items of a list.
        return ntp_loss(model.apply(variables, batch), batch.target).mean(1)

    return search, search_lists, jax.jit(on_mesh(loss, mesh))


class Generator:
    """Compiled generation and loss of one model over one table of semantic IDs at a time."""

    def __init__(
        self,
        model: OneRec,
        ids: SemanticIds,
        tie_order: np.ndarray,
        mesh,
        *,
        beam_width: int,
        batch_size: int,
    ):
        """`model.train` must be False; `tie_order` ranks items of equal score."""
        assert not model.train, "generation runs dropless and without dropout"
        self.mesh, self.model, self.beam_width = mesh, model, beam_width
        self.batch_size = self._divisible(batch_size)
        self.use(ids, tie_order)
        self._search, self._search_lists, self._loss = programs(model, mesh)

    def _divisible(self, users: int) -> int:
        devices = self.mesh.devices.size
        return -(-users // devices) * devices

    def use(self, ids: SemanticIds, tie_order: np.ndarray) -> None:
        """Takes another catalogue from now on; see `onerec_jax.generation.trie` for when that
        compiles anew."""
        self.ids = ids
        self.trie: Trie = build_trie(ids.leaf_sids, ids.codebook_size)
        self.filters = FilterBuilder(self.trie, ids.leaf_of_item)
        self.offsets, self.items = ids.items_by_leaf(tie_order)

    def search(
        self,
        variables,
        batch,
        *,
        trie: Trie | None = None,
        filter: Filter | None = None,
        width: int | None = None,
    ) -> Beams:
        """`beam_search`, compiled once for each number of users, width and size of the filter.

        Args:
          variables: as trained, or from `compute_copy`.
          trie: `self.trie`, or None to search all codes.
          filter: from `self.filters`.
          width: `beam_width` if None.
        """
        return self._search(
            variables, batch, width=width or self.beam_width, trie=trie, filter=filter
        )

    def search_lists(
        self,
        variables,
        batch,
        *,
        width: int,
        items: int | None = None,
        trie: Trie | None = None,
        filter: Filter | None = None,
    ) -> SessionBeams:
        """`session_beam_search` of a model of lists; arguments as `search`, `items` of a list."""
        return self._search_lists(
            variables, batch, width=width, items=items, trie=trie, filter=filter
        )

    def warm_up(self, variables, batch, *, users, widths=None, filters=()) -> None:
        """Compiles, and runs once, the searches that a service will need, before it takes requests.

        Args:
          batch: NumPy `Batch` of one user or more, whose slots are those of the service's batches.
          users: numbers of users of a batch, each rounded up to a multiple of the devices.
          widths: of beams; `beam_width` if None.
          filters: sizes X of filters that may come, beside none at all.
        """
        for count in map(self._divisible, users):
            rows = np.arange(count) % len(batch.static)
            tiled = jax.tree.map(lambda x, rows=rows: x[rows], batch)
            placed = put_batch(local_share(tiled), self.mesh)
            nothing = [None, *(self.filters([()] * count, size=size) for size in filters)]
            for width, filter in itertools.product(widths or [self.beam_width], nothing):
                found = self.search(variables, placed, trie=self.trie, filter=filter, width=width)
                jax.block_until_ready(found)

    def _batches(self, builder: BatchBuilder, examples: Examples):
        for batch, real in padded_batches(builder, examples, self.batch_size):
            yield put_batch(local_share(batch), self.mesh), real

    def beams(self, variables, builder, examples, *, masked=True):
        """Yields `Beams` of NumPy arrays over all examples; `masked`: only IDs that exist."""
        trie = self.trie if masked else None
        for batch, real in self._batches(builder, examples):
            found = fetch(self.search(variables, batch, trie=trie))
            refuse_nan(found)
            yield jax.tree.map(lambda x, real=real: x[:real], found)

    def rank(self, variables, builder, examples, *, n=10, seen=None) -> Generated:
        """Ranks the target of every example (of a list the first item) among all items.

        Args:
          seen: item rows to leave out, one array an example; None keeps every item.
        """
        log = builder.log
        first = log.offsets[examples.user] + examples.position
        targets = log.item[first if examples.rows is None else examples.rows[:, 0]]
        leaves = [beams.leaf for beams in self.beams(variables, builder, examples)]
        leaf = np.concatenate(leaves)
        if seen is None:
            lists = expand_leaves(leaf, self.offsets, self.items, n)
        else:
            longest = n + max(len(items) for items in seen)
            lists = drop_seen(expand_leaves(leaf, self.offsets, self.items, longest), seen, n)
        return Generated(
            lists,
            rank_of_target_in_list(lists, targets),
            rank_of_target_in_list(leaf, self.ids.leaf_of_item[targets]),
        )

    def loss(self, variables, builder, examples) -> np.ndarray:
        """NTP loss of every example's target, or mean of a list's items, float32 `[U, levels]`."""
        parts = [
            fetch(self._loss(variables, batch))[:real]
            for batch, real in self._batches(builder, examples)
        ]
        return np.concatenate(parts)

    def legality(self, variables, builder, examples) -> float:
        """Share of IDs that exist among all that the model generates without the trie."""
        legal, alive = self._legal(variables, builder, examples)
        return int(legal.sum()) / int(alive.sum())

    def legal_share(self, variables, builder, examples) -> np.ndarray:
        """The same share of each user's own beams, float64 `[U]`."""
        legal, alive = self._legal(variables, builder, examples)
        return legal / alive

    def _legal(self, variables, builder, examples) -> tuple[np.ndarray, np.ndarray]:
        """Beams of each user without the trie that exist, and all that live, int64 `[U]` each."""
        counts = []
        for beams in self.beams(variables, builder, examples, masked=False):
            alive = np.isfinite(beams.logp)
            counts.append(np.stack([(self.ids.find(beams.sid) >= 0) & alive, alive]).sum(-1))
        return tuple(np.concatenate(counts, axis=1))
