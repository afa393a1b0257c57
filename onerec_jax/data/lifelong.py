"""A life of actions in at most 2000 clusters: OneRec (arXiv 2506.13695), section 2.2.1.

Snapshots of a life are taken where a chunk of it (a day, or n actions) has closed, and a target
sees only the last snapshot before it: no cluster holds an action that comes after what is to be
predicted. A snapshot is one hierarchical clustering of the closed actions. A life of no more
actions than clusters needs none.

Clusters of clusters would spare that work but not keep its quality: actions of one day are farther
apart than those of one cluster of a whole life. With each day's actions in pairs first, all lie up
to 1.6 times as far from their representatives, where 1.05 was allowed (benchmarks/lifelong.py).
Snapshots at every growth by 10% cost eleven clusterings of the whole life, however long it is.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import NamedTuple

import numpy as np

from onerec_jax.data.hierarchy import hierarchical_clusters
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.files import atomic_folder, read_json

FORMAT = "onerec_jax lifelong snapshots, version 1"
MANIFEST = "lifelong.json"
DAY_S = 86_400
AGAIN = "make them with `python -m experiments.compress`"

CLUSTER_FIELDS = {
    "representative": np.int32,
    "count": np.int32,
    "time_s": np.int64,
    "playtime_s": np.float32,
    "duration_s": np.float32,
}
OFFSET_FIELDS = {"user_offsets": np.int64, "covered": np.int32, "cluster_offsets": np.int64}


@dataclasses.dataclass(frozen=True)
class LifelongConfig:
    """How lives are compressed."""

    max_clusters: int = 2000
    """Clusters of a snapshot at most; a life of no more closed actions is kept as it is."""
    max_actions: int = 100_000
    """Actions before the snapshot that it is made of; older ones are left out."""
    chunk_actions: int = 0
    """Actions of a chunk; 0: a chunk is a day (UTC), closed by the first action of a later day."""
    growth: float = 0.1
    """A clustered snapshot is stored once the closed actions have grown by this share since the
    last stored one."""
    seed: int = 0
    """Of the clustering."""

    def __post_init__(self):
        require_at_least(
            self, "compression.", max_clusters=1, max_actions=1, chunk_actions=0, growth=0, seed=0
        )
        if self.max_actions < self.max_clusters:
            raise InputError(
                f"--compression.max-actions {self.max_actions} is less than "
                f"--compression.max-clusters {self.max_clusters}: give at least as many"
            )


class Actions(NamedTuple):
    """Actions in the order of time; a column that the source lacks is None."""

    item: np.ndarray  # int32 [n], row of the item
    time_s: np.ndarray | None = None  # int64 [n], Unix time, not falling
    playtime_s: np.ndarray | None = None  # float32 [n], NaN: unknown
    duration_s: np.ndarray | None = None  # float32 [n], NaN: unknown

    def part(self, start: int, stop: int) -> "Actions":
        """The actions start to stop - 1."""
        return Actions(*(None if column is None else column[start:stop] for column in self))

    def then(self, later: "Actions") -> "Actions":
        """These actions and the later ones."""
        pairs = zip(self, later, strict=True)
        return Actions(*(None if a is None else np.concatenate([a, b]) for a, b in pairs))


class Snapshot(NamedTuple):
    """One snapshot of one life; fields as in `Snapshots`, no clusters if the life needs none."""

    covered: int
    representative: np.ndarray
    count: np.ndarray
    time_s: np.ndarray | None
    playtime_s: np.ndarray | None
    duration_s: np.ndarray | None


# --------------------------------------------------------------------------------- when and what


def chunk_ends(time_s, length: int, config: LifelongConfig) -> np.ndarray:
    """Numbers of actions of a life that lie in closed chunks, one a chunk; int64, rising.

    Args:
      time_s: int64 `[length]`, or None if the source has no time.

    Raises:
      InputError: days are asked for where there is no time, or time falls.
    """
    if config.chunk_actions:
        return np.arange(config.chunk_actions, length + 1, config.chunk_actions)
    require_time(time_s, config)
    day = time_s // DAY_S
    step = np.diff(day)
    if (step < 0).any():
        raise InputError(
            f"action {np.argmax(step < 0) + 1} of a life is of an earlier day than the one before "
            "it: sort the actions by time"
        )
    return np.flatnonzero(step) + 1


def require_time(time_s, config: LifelongConfig) -> None:
    """Refuses days where the source has no time."""
    if time_s is None and not config.chunk_actions:
        raise InputError(
            "the data set has no time_s to tell days by: give --compression.chunk-actions, the "
            "number of actions of a chunk"
        )


def stored_ends(ends, config: LifelongConfig, last: int = 0) -> list[int]:
    """Those of the chunk ends at which a snapshot is stored; all, where nothing is clustered.

    Args:
      ends: int64 `[n]`, of chunks, rising, from `last` on.
      last: end of the last snapshot stored so far.
    """
    lossless = np.searchsorted(ends, config.max_clusters, "right")
    stored = ends[:lossless].tolist()
    last = max([last, *stored[-1:]])
    for end in ends[lossless:].tolist():
        if end - last >= config.growth * last:
            stored.append(last := end)
    return stored


def take_snapshot(closed: Actions, vectors, config: LifelongConfig) -> Snapshot:
    """The snapshot of a life all of whose chunks are closed.

    Args:
      closed: the life from its first action on.
      vectors: float32 `[items, D]`, content of every item, finite.
    """
    covered = len(closed.item)
    if covered <= config.max_clusters:
        label = representative = np.zeros(0, np.int64)
    else:
        closed = closed.part(covered - min(covered, config.max_actions), covered)
        label, representative = clusters_of(closed.item, vectors, config)
    columns = [
        None if column is None else mean_by_label(column[: len(label)], label).astype(dtype)
        for column, dtype in zip(closed[1:], list(CLUSTER_FIELDS.values())[2:], strict=True)
    ]
    place = representative + covered - len(closed.item)
    return Snapshot(covered, place.astype(np.int32), np.bincount(label).astype(np.int32), *columns)


def clusters_of(item, vectors, config: LifelongConfig) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of actions, numbered by their latest member, newest first.

    Returns:
      label int64 `[n]`, and int64 `[clusters]`, the action nearest to the centre of its cluster,
      of equally near ones the latest.
    """
    row, place, times = np.unique(item, return_inverse=True, return_counts=True)
    x = vectors[row]
    label_r = hierarchical_clusters(x, config.max_clusters, weight=times, seed=config.seed)
    # In float64 two members of one cluster are equally far from their mean, as they should be.
    x = x.astype(np.float64)
    by_label = np.argsort(label_r, kind="stable")
    begin = np.searchsorted(label_r[by_label], np.arange(label_r.max() + 1))
    total = np.add.reduceat((x * times[:, None])[by_label], begin, axis=0)
    mean = total / np.add.reduceat(times[by_label], begin)[:, None]
    distance = ((x - mean[label_r]) ** 2).sum(1)[place]

    label, position = label_r[place], np.arange(len(item))
    latest = np.zeros(len(begin), np.int64)
    latest[label] = position  # of equal indices the last one counts
    rank = np.empty(len(begin), np.int64)
    rank[np.argsort(-latest)] = np.arange(len(begin))
    label = rank[label]
    best = np.lexsort((-position, distance, label))
    return label, best[np.searchsorted(label[best], np.arange(len(begin)))]


def mean_by_label(values, label) -> np.ndarray:
    """Mean of the known values of each label, float64; integers are rounded, NaN: none is known."""
    if values.dtype.kind in "iu":
        return np.rint(np.bincount(label, values) / np.bincount(label))
    known = ~np.isnan(values)
    clusters = label.max() + 1 if len(label) else 0
    count = np.bincount(label, known, clusters)
    total = np.bincount(label, np.where(known, values, 0).astype(np.float64), clusters)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


class Life:
    """One life that grows, action by action or many at once: its snapshots are the same.

    Args:
      vectors: float32 `[items, D]`, content of every item, finite.
    """

    def __init__(self, vectors, config: LifelongConfig):
        self.vectors, self.config = vectors, config
        self.actions: Actions | None = None
        self.closed = self.last_stored = 0

    def append(self, later: Actions) -> list[Snapshot]:
        """Adds actions; gives the snapshots that are to be stored since.

        Raises:
          InputError: days are asked for where there is no time, or time falls.
        """
        actions = later if self.actions is None else self.actions.then(later)
        ends = chunk_ends(actions.time_s, len(actions.item), self.config)
        new = ends[ends > self.closed]
        stored = stored_ends(new, self.config, self.last_stored)
        self.actions = actions
        self.closed = max([self.closed, *new])
        self.last_stored = max([self.last_stored, *stored])
        return [take_snapshot(actions.part(0, end), self.vectors, self.config) for end in stored]


# ------------------------------------------------------------------------------------ all of them


def find_snapshot(keys_s: np.ndarray, user, position) -> np.ndarray:
    """`Snapshots.find` by keys user << 32 | covered, int64 `[S]`, ascending."""
    if not len(keys_s):
        return np.full(np.shape(user), -1, np.int64)
    user = np.asarray(user, np.int64)
    found = np.searchsorted(keys_s, user << 32 | np.asarray(position, np.int64), "right") - 1
    return np.where((found >= 0) & (keys_s[found] >> 32 == user), found, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshots:
    """Snapshots of all users, by user and then by `covered`.

    The clusters of snapshot s are cluster_offsets[s] to cluster_offsets[s + 1] - 1, by their latest
    member, newest first. There are none where `covered` is at most max_clusters: every action is a
    cluster of its own then, and the reader takes the first `covered` actions of the log themselves.
    Categorical features of a cluster are those of its representative, continuous ones the means
    over its members.
    """

    user_offsets: np.ndarray  # int64 [U + 1], snapshots of each user
    covered: np.ndarray  # int32 [S], actions of the user in closed chunks
    cluster_offsets: np.ndarray  # int64 [S + 1]
    representative: np.ndarray  # int32 [C], position within the user's life
    count: np.ndarray  # int32 [C], members
    time_s: np.ndarray | None  # int64 [C], mean, rounded; None: the source has no such column
    playtime_s: np.ndarray | None  # float32 [C], mean of the known ones, NaN: none is known
    duration_s: np.ndarray | None  # float32 [C], likewise
    manifest: dict
    """Format, settings, fingerprints of the data set and of the vectors, counts."""

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """Int64 `[S]`, ascending: user << 32 | covered."""
        user = np.repeat(np.arange(len(self.user_offsets) - 1), np.diff(self.user_offsets))
        return user << 32 | self.covered

    def find(self, user, position) -> np.ndarray:
        """The last snapshot that a target may see: of its user, with covered <= position.

        Args:
          user: int `[B]`, row of the user.
          position: int `[B]`, of the target within the user's life, at least 0.

        Returns:
          int64 `[B]`, -1 where there is none.
        """
        return find_snapshot(self.keys, user, position)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name, those that the source lacks left out."""
        named = {name: getattr(self, name) for name in (*OFFSET_FIELDS, *CLUSTER_FIELDS)}
        return {name: array for name, array in named.items() if array is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def save(self, folder) -> None:
        """Writes one .npy an array and a manifest; the folder appears whole or not at all."""
        with atomic_folder(folder) as tmp:
            for name, array in self.arrays.items():
                np.save(tmp / f"{name}.npy", array)
            write_manifest(tmp, self.manifest, self.arrays)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the settings, the data set, the vectors or the counts."""
        counts = {**self.manifest.get("counts", {}), "core_seconds": None}
        text = json.dumps(self.manifest | {"counts": counts}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, folder, dataset=None, vectors: str | None = None) -> "Snapshots":
        """Opens a folder; the arrays stay on disk as memory maps.

        Args:
          dataset: `Dataset` that the snapshots must have been made from; None: any.
          vectors: `tokenizer.vectors.fingerprint` of the vectors likewise.

        Raises:
          InputError: missing, incomplete, of another format, data set or vectors.
        """
        folder = pathlib.Path(folder)
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{folder}: holds no lifelong snapshots: {AGAIN}")
        manifest = read_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise InputError(
                f"{folder}: is of the format '{manifest.get('format')}', not '{FORMAT}': {AGAIN}"
            )
        if dataset is not None and manifest["dataset"] != dataset.fingerprint:
            raise InputError(f"{folder}: was made from another data set: {AGAIN}")
        if vectors is not None and manifest["vectors"] != vectors:
            raise InputError(f"{folder}: was made from other item vectors: {AGAIN}")
        arrays = dict.fromkeys(CLUSTER_FIELDS)
        for name, length in manifest.pop("lengths").items():
            try:
                arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
            except (OSError, ValueError, EOFError) as error:
                raise InputError(f"{folder / name}.npy is damaged ({error}): {AGAIN}") from error
            if arrays[name].shape != (length,):
                raise InputError(
                    f"{folder / name}.npy: holds {arrays[name].shape} values, not {length}, as "
                    f"{MANIFEST} says: {AGAIN}"
                )
        return cls(**arrays, manifest=manifest)


def write_manifest(folder, manifest: dict, arrays: dict[str, np.ndarray]) -> None:
    """Writes the manifest, with the lengths of the arrays, into an existing folder."""
    lengths = {name: len(array) for name, array in arrays.items()}
    text = json.dumps(manifest | {"format": FORMAT, "lengths": lengths}, indent=1)
    (folder / MANIFEST).write_text(text + "\n")
