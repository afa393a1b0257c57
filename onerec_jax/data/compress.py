"""The lives of all users to snapshots, in parallel processes, and further after a kill.

Users are cut into blocks of about equal work; each block becomes a part, a file in FOLDER.parts
that appears whole or not at all. At the end the parts are joined to FOLDER.
"""

import bisect
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np
import threadpoolctl

from onerec_jax.data.lifelong import (
    CLUSTER_FIELDS,
    FORMAT,
    MANIFEST,
    OFFSET_FIELDS,
    Actions,
    LifelongConfig,
    Snapshots,
    chunk_ends,
    require_time,
    stored_ends,
    take_snapshot,
    write_manifest,
)
from onerec_jax.data.schema import Dataset
from onerec_jax.errors import InputError
from onerec_jax.files import atomic_folder, read_json, write_text
from onerec_jax.tokenizer.vectors import check_vectors, fingerprint

BLOCK_WORK = 300_000
"""Actions to cluster in a block, a user's once for every snapshot: some seconds."""
SAY_EVERY_S = 5.0


@dataclasses.dataclass(frozen=True, eq=False)
class Lives:
    """The actions of all users, by user and position."""

    offsets: np.ndarray  # int64 [U + 1]: user u owns offsets[u] to offsets[u + 1] - 1
    actions: Actions  # of N actions

    @classmethod
    def of(cls, dataset: Dataset) -> "Lives":
        """The actions of a data set; durations that the log lacks come from the items table."""
        playtime, duration = dataset.column("playtime_s"), dataset.column("duration_s")
        if duration is None and "duration_s" in dataset.items.columns:
            duration = dataset.items["duration_s"].to_numpy()[dataset.item_rows]
        actions = Actions(
            dataset.item_rows,
            dataset.column("time_s"),
            None if playtime is None else playtime.astype(np.float32),
            None if duration is None else duration.astype(np.float32),
        )
        return cls(dataset.offsets, actions)

    def of_user(self, user: int) -> Actions:
        """The life of one user."""
        return self.actions.part(self.offsets[user], self.offsets[user + 1])


def compress(
    dataset: Dataset,
    vectors,
    config: LifelongConfig,
    folder,
    *,
    workers: int = 1,
    since=None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Snapshots:
    """Makes the snapshots of all users and writes them to `folder`, whole or not at all.

    A killed call goes on with the parts that it has left in `folder`.parts when it is made again.
    The result does not depend on `workers`.

    Args:
      vectors: float `[items, D]`, content of every item; used as float32.
      workers: processes; 1: this one.
      since: int `[U]`: no targets lie before these positions; snapshots for such are left out.
      overwrite: replace the snapshots in `folder` and drop parts of other settings.
      say: takes lines of progress.

    Returns:
      The snapshots, on disk.

    Raises:
      InputError: vectors that do not fit the items or are not finite, no time to tell days by, a
        folder that exists, parts of other settings, or a worker that was killed.
    """
    folder, vectors, lives = pathlib.Path(folder), np.asarray(vectors), Lives.of(dataset)
    if vectors.ndim != 2 or len(vectors) != dataset.num_items or vectors.dtype.kind not in "fiu":
        raise InputError(
            f"the vectors are {vectors.dtype} {vectors.shape}, but the data set has "
            f"{dataset.num_items} items: give one row of numbers an item"
        )
    vectors = np.ascontiguousarray(vectors, np.float32)
    check_vectors(vectors, "the vectors")
    require_time(lives.actions.time_s, config)
    if since is not None and np.shape(since) != (dataset.num_users,):
        raise InputError(f"since has shape {np.shape(since)}: give one position a user")
    check_target(folder, overwrite)

    manifest = {
        "config": dataclasses.asdict(config),
        "dataset": dataset.fingerprint,
        "vectors": fingerprint(vectors),
        "since": None if since is None else fingerprint(np.asarray(since, np.int64)),
    }
    parts = open_parts(folder, manifest, overwrite)
    job = Job(lives, vectors, config, since, parts)
    blocks = cut_blocks(lives.offsets, config)
    missing = [block for block in blocks if not job.part(block).exists()]
    if len(missing) < len(blocks):
        say(f"  {len(blocks) - len(missing)} of {len(blocks)} parts are there already")
    progress = Progress(lives.offsets, missing, say)
    for block in run_blocks(job, missing, workers):
        progress.done(block)

    manifest["counts"] = {"users": dataset.num_users, "actions": int(lives.offsets[-1])}
    join(folder, [job.part(block) for block in blocks], manifest, config)
    shutil.rmtree(parts)
    return Snapshots.load(folder)


def check_target(folder: pathlib.Path, overwrite: bool) -> None:
    """Refuses an output folder that must not be written."""
    if not folder.exists():
        return
    if not overwrite:
        raise InputError(f"--out {folder} exists: give --overwrite or another folder")
    if not (folder / MANIFEST).exists():
        raise InputError(f"--out {folder} exists and holds no snapshots: give another folder")


def open_parts(folder: pathlib.Path, manifest: dict, overwrite: bool) -> pathlib.Path:
    """The folder of the parts, new or of a killed call with the same settings."""
    parts, key = folder.with_name(f"{folder.name}.parts"), manifest | {"block_work": BLOCK_WORK}
    key = json.loads(json.dumps(key | {"format": FORMAT}))
    try:
        if parts.exists() and not (parts / "key.json").exists() and any(parts.iterdir()):
            raise InputError(f"{parts} exists and holds no parts: move it away")
        if (parts / "key.json").exists() and read_json(parts / "key.json") != key:
            if not overwrite:
                raise InputError(
                    f"{parts} holds parts made with other settings, data or vectors: give the "
                    "same again to go on, or --overwrite to drop them"
                )
            shutil.rmtree(parts)
        parts.mkdir(parents=True, exist_ok=True)
        write_text(parts / "key.json", json.dumps(key, indent=1))
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror})") from error
    return parts


# ------------------------------------------------------------------------------------------ blocks


def cut_blocks(offsets, config: LifelongConfig) -> list[tuple[int, int]]:
    """Users of every block, [first, last), about BLOCK_WORK actions to cluster in each."""
    length = np.diff(offsets)
    window = np.minimum(length, config.max_actions)
    # A geometric series: snapshots grow by the factor 1 + growth, the largest is the whole life.
    snapshots = 1 + 1 / np.maximum(config.growth, 0.01)
    work = length + np.where(length > config.max_clusters, window * snapshots, 0)
    block = (np.cumsum(work) - work) // BLOCK_WORK
    first = np.append(np.flatnonzero(np.diff(block, prepend=-1)), len(length))
    return list(zip(first[:-1].tolist(), first[1:].tolist(), strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """All that a block is made from."""

    lives: Lives
    vectors: np.ndarray  # float32 [items, D]
    config: LifelongConfig
    since: np.ndarray | None  # int [U]
    parts: pathlib.Path

    def part(self, block: tuple[int, int]) -> pathlib.Path:
        """The file of a block."""
        return self.parts / f"users-{block[0]:09d}-{block[1]:09d}.npz"

    def run(self, block: tuple[int, int]) -> None:
        """Makes the part of a block, with one BLAS thread: others would change the last bits."""
        begin = time.perf_counter()
        with threadpoolctl.threadpool_limits(1):
            stored = [self.stored(user) for user in range(*block)]
            clustered = [
                take_snapshot(self.lives.of_user(user).part(0, end), self.vectors, self.config)
                for user, ends in enumerate(stored, block[0])
                for end in ends
                if end > self.config.max_clusters
            ]
        covered = np.concatenate([np.zeros(0, np.int32), *stored]).astype(np.int32)
        clusters = np.zeros(len(covered), np.int64)
        clusters[covered > self.config.max_clusters] = [len(shot.count) for shot in clustered]
        arrays = {
            "user_offsets": np.array([len(ends) for ends in stored], np.int64),
            "covered": covered,
            "cluster_offsets": clusters,
        }
        for name, dtype in CLUSTER_FIELDS.items():
            columns = [getattr(shot, name) for shot in clustered]
            if getattr(self.lives.actions, name, columns) is not None:
                arrays[name] = np.concatenate([np.zeros(0, dtype), *columns])
        tmp = self.parts / f".{self.part(block).name}.tmp"
        with open(tmp, "wb") as file:
            np.savez(file, seconds=time.perf_counter() - begin, **arrays)
        os.replace(tmp, self.part(block))

    def stored(self, user: int) -> list[int]:
        """Ends of the snapshots that are stored of a user."""
        life = self.lives.of_user(user)
        try:
            ends = stored_ends(chunk_ends(life.time_s, len(life.item), self.config), self.config)
        except InputError as error:
            raise InputError(f"user row {user}: {error}") from error
        if self.since is None:
            return ends
        return ends[max(bisect.bisect_right(ends, self.since[user]) - 1, 0) :]


def run_blocks(job: Job, blocks: list[tuple[int, int]], workers: int) -> Iterable[tuple[int, int]]:
    """Makes parts, in this process or in several; yields each block when it is done."""
    if workers == 1 or len(blocks) <= 1:
        for block in blocks:
            job.run(block)
            yield block
        return
    with tempfile.TemporaryDirectory(prefix="shared-", dir=job.parts) as shared:
        share(job, pathlib.Path(shared))
        pool = concurrent.futures.ProcessPoolExecutor(
            min(workers, len(blocks)),
            multiprocessing.get_context("spawn"),
            open_shared,
            (shared, job.config, job.parts),
        )
        try:
            futures = {pool.submit(run_shared, block): block for block in blocks}
            for future in concurrent.futures.as_completed(futures):
                future.result()
                yield futures[future]
        except concurrent.futures.process.BrokenProcessPool as error:
            raise InputError(
                "a worker was killed, perhaps for want of memory: the same command goes on with "
                "the parts that are done; give fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def share(job: Job, folder: pathlib.Path) -> None:
    """Writes the arrays of a job as files that all workers map into their memory."""
    arrays = job.lives.actions._asdict() | {"offsets": job.lives.offsets, "vectors": job.vectors}
    for name, array in (arrays | {"since": job.since}).items():
        if array is not None:
            np.save(folder / f"{name}.npy", array)


_job: Job | None = None


def open_shared(folder: str, config: LifelongConfig, parts: pathlib.Path) -> None:
    """First thing that a worker does: opens the job, and sees to it that it ends with its maker."""
    global _job
    threading.Thread(target=end_with_parent, daemon=True).start()
    arrays = {
        path.stem: np.load(path, mmap_mode="r") for path in pathlib.Path(folder).glob("*.npy")
    }
    actions = Actions(**{name: arrays.get(name) for name in Actions._fields})
    _job = Job(
        Lives(arrays["offsets"], actions), arrays["vectors"], config, arrays.get("since"), parts
    )


def end_with_parent() -> None:
    """Waits for the end of the process that made this one; a killed one cannot say so itself."""
    multiprocessing.parent_process().join()
    os._exit(1)


def run_shared(block: tuple[int, int]) -> None:
    """Makes one part in a worker."""
    _job.run(block)


class Progress:
    """Lines such as "users 200 / 1000, 12,000 actions/s, 35 s left", one in five seconds."""

    def __init__(self, offsets, blocks, say):
        self.offsets, self.say = offsets, say
        self.users_of = sum(last - first for first, last in blocks)
        self.actions_of = int(sum(offsets[last] - offsets[first] for first, last in blocks))
        self.users = self.actions = 0
        self.begin = self.last = time.perf_counter()

    def done(self, block) -> None:
        """Counts a block."""
        self.users += block[1] - block[0]
        self.actions += int(self.offsets[block[1]] - self.offsets[block[0]])
        if time.perf_counter() - self.last < SAY_EVERY_S and self.users < self.users_of:
            return
        self.last = time.perf_counter()
        rate = self.actions / (self.last - self.begin)
        left = (self.actions_of - self.actions) / max(rate, 1e-9)
        self.say(
            f"  users {self.users:,} / {self.users_of:,}, {rate:,.0f} actions/s, {left:.0f} s left"
        )


# -------------------------------------------------------------------------------------------- join


def join(folder, parts: list[pathlib.Path], manifest: dict, config: LifelongConfig) -> None:
    """Joins parts to `folder`, one in memory at a time."""
    sizes, seconds, names = [], 0.0, []
    for path in parts:
        with np.load(path) as part:
            names, seconds = [*part.files], seconds + float(part["seconds"])
            sizes.append([len(part["user_offsets"]), len(part["covered"]), len(part["count"])])
    names.remove("seconds")
    users, snapshots, clusters = np.sum(sizes, axis=0).tolist()
    dtypes = OFFSET_FIELDS | CLUSTER_FIELDS
    length = {"user_offsets": users + 1, "covered": snapshots, "cluster_offsets": snapshots + 1}
    with atomic_folder(folder) as tmp:
        arrays, left_out, clustered = {}, 0, 0
        for name in names:
            path, shape = tmp / f"{name}.npy", (length.get(name, clusters),)
            arrays[name] = np.lib.format.open_memmap(path, "w+", dtypes[name], shape)
        at = dict.fromkeys(names, 0)
        for path in parts:
            with np.load(path) as part:
                for name in names:
                    values = part[name]
                    if name.endswith("offsets"):
                        values = arrays[name][at[name]] + np.cumsum(values)
                        arrays[name][at[name] + 1 : at[name] + 1 + len(values)] = values
                    else:
                        arrays[name][at[name] : at[name] + len(values)] = values
                    at[name] += len(values)
                ends = np.cumsum(part["user_offsets"])[part["user_offsets"] > 0]
                left_out += int(np.maximum(part["covered"][ends - 1] - config.max_actions, 0).sum())
                clustered += int(part["count"].sum(dtype=np.int64))
        for array in arrays.values():
            array.flush()
        counts = manifest["counts"] | {
            "snapshots": snapshots,
            "clusters": clusters,
            "actions_clustered": clustered,
            "actions_left_out": left_out,
            "core_seconds": round(seconds, 2),
        }
        write_manifest(tmp, manifest | {"counts": counts}, arrays)
