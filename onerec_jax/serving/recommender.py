"""A finished run as a recommender: `Recommender.load(run_folder).recommend(["u3"], n=10)`.

Three steps, each a method, for the server times them apart: `gather` (histories to a batch and a
filter), `search` (beams, compiled for every shape of these) and `lists` (beams to items). A query
belongs to the recommender that made it, so that rows never meet another catalogue.

Axes: B users, W beams.
"""

import copy
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax.data.actions import log_from_actions
from onerec_jax.data.batches import BatchBuilder, log_from_histories
from onerec_jax.data.features import ActionLog, uncompressed
from onerec_jax.distributed import fetch
from onerec_jax.errors import InputError
from onerec_jax.generation.beam import Beams
from onerec_jax.generation.filters import SMALLEST, Filter
from onerec_jax.generation.generator import compute_copy, expand_leaves
from onerec_jax.inputs import Batch
from onerec_jax.run import Run
from onerec_jax.serving.catalogue import CATALOGUE, Catalogue, open_for_serving
from onerec_jax.serving.questions import check_options
from onerec_jax.sharding import make_mesh, put_batch, replicated

PART = 64
"""Users of a batch of `recommend`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Recommended:
    """One item of a list."""

    row: int
    item_id: int | str
    title: str
    semantic_id: tuple[int, ...]
    logp: float
    """log P(semantic ID | user); items of one ID share it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Query:
    """One checked request: item and user rows of its recommender's catalogue."""

    recommender: "Recommender"
    user: int
    """User row; -1 for a history of the caller's own."""
    history: np.ndarray
    """Item rows, oldest first, int32."""
    log: ActionLog | None
    """The caller's own history."""
    request_time_s: int
    n: int
    beam_width: int
    exclude: np.ndarray
    """Item rows, each once: what the caller names, then what was seen, the latest first."""
    allowed: np.ndarray | None
    """Item rows; None: all."""


class Recommender:
    """One model over one catalogue."""

    def __init__(
        self, run: Run, variables, texts=None, *, mesh=None, like: "Recommender | None" = None
    ):
        """Puts a model in place; nothing is compiled before it is used.

        Args:
          variables: of `run`; see `load`.
          texts: what the files said that describe the run.
          mesh: devices that share the users of a batch; None: the first device.
          like: a recommender whose tables and compiled programs are taken over, as far as `run` is
            the same and its mesh, always.
        """
        self.run = run
        self.step, self.texts = run.best_step, texts
        self.mesh = mesh or (like.mesh if like else make_mesh(data=1))
        if like and like.texts == texts:
            self.catalogue, self.builder, self.generator = (
                like.catalogue, like.builder, like.generator,
            )  # fmt: skip
        else:
            self.catalogue, self.builder = Catalogue(run), run.builder
            if like and (like.run.model_config, like.run.spec) == (run.model_config, run.spec):
                self.generator = copy.copy(like.generator)
                self.generator.use(run.ids, run.tie_order)
            else:
                self.generator = run.generator(self.mesh, beam_width=1, batch_size=1)
        variables = compute_copy(self.generator.model, variables)
        self.variables = jax.device_put(variables, replicated(self.mesh))

    @classmethod
    def load(cls, folder, *, mesh=None, like: "Recommender | None" = None) -> "Recommender":
        """The best checkpoint of a run folder.

        Args:
          like: the recommender that served the folder before; what has not changed is kept.

        Raises:
          InputError: no run there, no checkpoint yet, or one that cannot be read or is not finite.
        """
        texts = _texts(folder)
        if like is not None and like.texts == texts:
            run = like.run.again()
        else:
            run = open_for_serving(folder)
        step = run.best_step  # refuses a run without checkpoints before their folder is opened
        if like is not None and like.texts == texts and like.step == step:
            return like
        try:
            variables = run.load_best()
        finally:
            run.checkpoints.close()
        finite = jax.tree.map(lambda x: jnp.isfinite(x).all(), variables)
        for path, good in jax.tree_util.tree_flatten_with_path(jax.device_get(finite))[0]:
            if not good:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise InputError(
                    f"checkpoint step {step} of {folder} is damaged ({name} is not "
                    "finite): restore it or train again"
                )
        return cls(run, variables, texts, mesh=mesh, like=like)

    # ------------------------------------------------------------------------------- questions

    def query(
        self,
        history,
        *,
        n: int = 10,
        beam_width: int = 64,
        exclude: Sequence = (),
        exclude_authors: Sequence = (),
        allowed: Sequence | None = None,
        include_seen: bool = False,
        request_time_s: int | None = None,
        position: int | None = None,
    ) -> Query:
        """Checks one request.

        Args:
          history: a user id of the data set, whose whole log is the history; or a list, oldest
            first, of item ids or of actions: dicts with `item_id` and any of ACTION_COLUMNS that
            the data set has. Actions count as done just now if they have no `time_s`, and as
            positive if they have no feedback; an empty list is a newcomer.
          n: length of the list.
          beam_width: W, at least n; n beams fill a list of n items, more find better ones.
          exclude, exclude_authors: ids never to recommend.
          allowed: item ids to choose from; None: all.
          include_seen: recommend items of the history too.
          request_time_s: Unix time of the request, from which ages count; None: the time of the
            last action.
          position: how many actions of a user of the data set are the history; None: all. Asked for
            the past, `request_time_s` is the time of the action that came next.

        Raises:
          InputError: unknown ids, wrong types or values; `UnknownId` for the former.
        """
        check_options(
            n=n,
            beam_width=beam_width,
            request_time_s=request_time_s,
            exclude=exclude,
            exclude_authors=exclude_authors,
            allowed=allowed,
        )
        user, log = -1, None
        if isinstance(history, str | int | np.integer):
            user = self.catalogue.users.row(history)
            life, times = self.catalogue.history(user), self.builder.log.time_s
            rows = life[:position]
            at = self.run.dataset.offsets[user] + min(len(rows), len(life) - 1)
            last = 0 if times is None or not len(life) else times[at]
        elif isinstance(history, Sequence | np.ndarray):
            rows, log = self._given(history)
            last = 0 if log.time_s is None or not len(rows) else log.time_s[len(rows) - 1]
        else:
            raise InputError(
                "a history is a user id or a list of items or actions, not "
                f"{type(history).__name__}"
            )
        items = self.catalogue.items
        left_out = [items.rows(exclude), self.catalogue.of_authors(exclude_authors)]
        if not include_seen:
            left_out.append(rows[::-1])
        left_out = np.concatenate(left_out)
        _, first = np.unique(left_out, return_index=True)
        return Query(
            recommender=self,
            user=user,
            history=rows,
            log=log,
            request_time_s=int(last if request_time_s is None else request_time_s),
            n=min(int(n), len(items)),
            # As many as the list is long, and no more IDs than exist.
            beam_width=min(max(int(beam_width), int(n)), len(self.run.ids.leaf_sids)),
            exclude=left_out[np.sort(first)],
            allowed=None if allowed is None else np.unique(items.rows(allowed)),
        )

    def _given(self, history) -> tuple[np.ndarray, ActionLog]:
        """Item rows and log of a caller's own history."""
        if not any(isinstance(action, Mapping) for action in history):
            rows = self.catalogue.items.rows(history)
            return rows, log_from_histories([rows], self.run.spec)
        actions = [x if isinstance(x, Mapping) else {"item_id": x} for x in history]
        rows = self.catalogue.items.rows([action.get("item_id") for action in actions])
        return rows, log_from_actions(rows, actions, self.run.dataset, self.run.spec)

    def recommend(
        self, histories: Sequence, n: int = 10, beam_width: int = 64, **options
    ) -> list[list[Recommended]]:
        """At most `n` items for every history, the most probable first.

        Args:
          histories, n, beam_width, options: see `query`.

        Raises:
          InputError: names the history that is wrong.
        """
        if isinstance(histories, str) or not isinstance(histories, Sequence | np.ndarray):
            raise InputError("histories is a list: a user id or a history for each list wanted")
        queries = []
        for place, history in enumerate(histories):
            try:
                queries.append(self.query(history, n=n, beam_width=beam_width, **options))
            except InputError as error:
                raise type(error)(f"history {place}: {error}") from error
        parts = [queries[start : start + PART] for start in range(0, len(queries), PART)]
        return [
            [self.recommended(row, logp) for row, logp in zip(*listed, strict=True)]
            for part, found in self.searched(parts)
            for listed in self.lists(part, found)
        ]

    def recommended(self, row: int, logp: float) -> Recommended:
        """An item row in words."""
        item = self.catalogue.describe(row)
        return Recommended(
            int(row), item["item_id"], item["title"], tuple(item["semantic_id"]), float(logp)
        )

    # ----------------------------------------------------------------------------------- steps

    def gather(
        self, queries: Sequence[Query], users: int | None = None, filter_size: int | None = None
    ) -> tuple[Batch, Filter | None]:
        """What the search needs to know of some queries, NumPy arrays `[B, …]`.

        Args:
          users: B, at least the number of queries, rounded up to a multiple of the devices; the
            first query is repeated to fill up. None: the next power of two.
          filter_size: items that the search can be told to avoid; what a query excludes beyond is
            only left out of the list, which may then come short. None: as many as it takes, and no
            filter where no query needs one.
        """
        count, devices = len(queries), self.mesh.devices.size
        users = 1 << (count - 1).bit_length() if users is None else users
        users = -(-users // devices) * devices
        # Users of the data set first, gathered at once, then the callers' own histories.
        order = sorted(range(count), key=lambda place: queries[place].log is not None)
        asked = [(q.user, len(q.history), q.request_time_s) for q in queries if q.log is None]
        parts = [self.builder(*np.array(asked, np.int64).T)] if asked else []
        for query in (query for query in queries if query.log is not None):
            lives = uncompressed(query.log) if self.run.spec.clustered else None
            builder = BatchBuilder(query.log, self.builder.items, self.builder.cfg, lives)
            position, time = len(query.history), query.request_time_s
            parts.append(builder(np.zeros(1, int), np.array([position]), np.array([time])))
        place = np.argsort(order)
        place = np.concatenate([place, np.full(users - count, place[0])])
        batch = jax.tree.map(lambda *x: np.concatenate(x)[place], *parts)
        wanted = [(query.exclude[:filter_size], query.allowed) for query in queries]
        if filter_size is None and all(not len(out) and some is None for out, some in wanted):
            return batch, None
        excluded, allowed = zip(*wanted, *[((), None)] * (users - count), strict=True)
        return batch, self.generator.filters(excluded, allowed, size=filter_size or SMALLEST)

    def search(self, batch: Batch, filter: Filter | None, beam_width: int) -> Beams:
        """Starts the search for B users; `fetch` of the result waits for it."""
        return self.generator.search(
            self.variables,
            put_batch(batch, self.mesh),
            trie=self.generator.trie,
            filter=None if filter is None else put_batch(filter, self.mesh),
            width=beam_width,
        )

    def legality(self, query: Query, beam_width: int) -> tuple[int, int]:
        """IDs that exist among those that one query gives without the trie, and all of these."""
        batch = put_batch(self.gather([query])[0], self.mesh)
        beams = fetch(self.generator.search(self.variables, batch, width=beam_width))
        alive = np.isfinite(beams.logp[0])
        return int((self.run.ids.find(beams.sid[0])[alive] >= 0).sum()), int(alive.sum())

    def lists(self, queries: Sequence[Query], beams: Beams) -> list[tuple[np.ndarray, np.ndarray]]:
        """Item rows int32 `[n]` and log-probabilities float32 `[n]` of every query.

        A list is shorter than the query's n where the beams hold fewer of the wanted items.

        Args:
          beams: NumPy arrays; users beyond the queries are padding.
        """
        found, offsets, items = [], self.generator.offsets, self.generator.items
        for query, leaf, logp in zip(queries, beams.leaf, beams.logp, strict=False):
            leaf, logp = leaf[leaf >= 0], logp[leaf >= 0]
            count = offsets[leaf + 1] - offsets[leaf]
            (rows,) = expand_leaves(leaf[None], offsets, items, int(count.sum()))
            kept = ~np.isin(rows, query.exclude)
            if query.allowed is not None:
                kept &= np.isin(rows, query.allowed)
            kept = np.flatnonzero(kept)[: query.n]
            found.append((rows[kept], np.repeat(logp, count)[kept]))
        return found

    def searched(
        self,
        parts: Iterable[Sequence[Query]],
        users: int | None = None,
        filter_size: int | None = None,
    ):
        """Yields every part of queries with its beams, one width a part; see `gather`.

        The next part is gathered while the device searches for the one before.
        """
        before = None
        for part in parts:
            found = self.search(*self.gather(part, users, filter_size), part[0].beam_width)
            if before is not None:
                yield before[0], fetch(before[1])
            before = part, found
        if before is not None:
            yield before[0], fetch(before[1])


def _texts(folder) -> list[bytes | None]:
    """The files of a run folder that say what it was trained on and what it serves."""
    paths = [pathlib.Path(folder, name) for name in ("config.json", "features.json", CATALOGUE)]
    return [path.read_bytes() if path.is_file() else None for path in paths]
