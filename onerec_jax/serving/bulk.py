"""Recommendations for many users, to a Parquet file; a killed run goes on where it was.

Parts of some thousand users are written beside the file, each by an atomic rename, with a note of
what they were made of. The last step joins them and removes them.
"""

import dataclasses
import json
import pathlib
import shutil
import time

import numpy as np
import polars as pl
import rich.console

from onerec_jax.data.progress import Progress
from onerec_jax.data.schema import one_line
from onerec_jax.errors import InputError, shown
from onerec_jax.files import file_hash, read_json, write_text
from onerec_jax.serving.questions import UnknownId
from onerec_jax.serving.recommender import Recommender

BATCHES = 16
"""Batches of users in a part."""


@dataclasses.dataclass(frozen=True)
class BulkConfig:
    """What every user gets."""

    n: int = 10
    beam_width: int = 64
    include_seen: bool = False
    batch_size: int = 256
    filter_size: int = 1024
    """Items that the search leaves out; seen ones beyond are dropped from the list."""


def read_users(
    path: pathlib.Path | str, recommender: Recommender, *, skip_unknown: bool = False
) -> tuple[np.ndarray, int]:
    """Rows of the users that a file names, int64, in its order; "all": of all users.

    Args:
      skip_unknown: leave out ids that the data set lacks.

    Returns:
      The rows, and how many ids were left out.

    Raises:
      InputError: no such file, no user_id, no user, or ids that the data set lacks.
    """
    users = recommender.catalogue.users
    if str(path) == "all":
        return np.arange(len(users)), 0
    try:
        if path.suffix in (".parquet", ".csv"):
            read = pl.read_parquet if path.suffix == ".parquet" else pl.read_csv
            ids = read(path, columns=["user_id"])["user_id"].to_list()
        else:
            ids = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, pl.exceptions.PolarsError) as error:
        raise InputError(
            f"--users {path}: cannot be read ({one_line(error)}): give a .txt file of ids, or "
            ".parquet or .csv with a column user_id"
        ) from error
    if not ids:
        raise InputError(f"--users {path}: names no user")
    rows, unknown = [], []
    for place, value in enumerate(ids, start=1):
        try:
            rows.append(users.row(value.strip() if isinstance(value, str) else value))
        except UnknownId:
            unknown.append(f"'{shown(value)}' in row {place}")
        except InputError as error:
            raise InputError(f"--users {path}, row {place}: {error}") from error
    if unknown and not (skip_unknown and rows):
        some = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
        raise InputError(
            f"--users {path}: {len(unknown):,} of {len(ids):,} ids are of no user of the data set "
            f"({some}): correct them" + (" or give --skip-unknown" if rows else "")
        )
    return np.array(rows, np.int64), len(unknown)


def recommend_to_file(
    recommender: Recommender,
    users: pathlib.Path,
    out: pathlib.Path,
    config: BulkConfig,
    *,
    skip_unknown: bool = False,
) -> dict:
    """Writes `n` items of every user: user_id, place (from 1), item_id, logp, semantic_id.

    Returns:
      Users made now, seconds they took, users made before, ids skipped.

    Raises:
      InputError: `users` cannot be read, `out` exists, or parts beside it are of other settings.
    """
    if out.exists():
        raise InputError(f"--out {out} exists: remove it or give another file")
    rows, skipped = read_users(users, recommender, skip_unknown=skip_unknown)
    folder = out.with_name(f".{out.name}.parts")
    made_of = {
        "settings": dataclasses.asdict(config),
        "users": "all" if str(users) == "all" else file_hash(users),
        "run": str(recommender.run.folder.resolve()),
        "step": recommender.step,
        "data": recommender.run.dataset.fingerprint,
        "semantic_ids": recommender.run.ids.fingerprint,
    }
    note = folder / "made_of.json"
    if note.exists() and read_json(note) != made_of:
        raise InputError(
            f"{folder} holds parts of --out {out} that were made with other settings: remove it or "
            "give another file"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(note, json.dumps(made_of))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error

    size = config.batch_size * BATCHES
    paths = [folder / f"{start // size:06}.parquet" for start in range(0, len(rows), size)]
    todo = [place for place, path in enumerate(paths) if not path.exists()]
    console, begin, made = rich.console.Console(), time.perf_counter(), 0
    kept = len(rows) - sum(len(rows[p * size : (p + 1) * size]) for p in todo)
    with Progress(console) as progress:
        for place in todo:
            part = rows[place * size : (place + 1) * size]
            table = _lists(recommender, part, config)
            tmp = paths[place].with_suffix(".tmp")
            table.write_parquet(tmp)
            tmp.replace(paths[place])
            made += len(part)
            progress("recommending", kept + made, len(rows), made)
    seconds = time.perf_counter() - begin
    joined = folder / "all.tmp"
    pl.scan_parquet(paths).sink_parquet(joined)
    joined.replace(out)
    shutil.rmtree(folder)
    before = f", {kept:,} were there" if kept else ""
    unknown = f", {skipped:,} unknown ids skipped" if skipped else ""
    print(
        f"{made:,} users in {seconds:.1f} s, {made / seconds:,.0f} users/s{before}{unknown}; {out}"
    )
    return {"users": made, "seconds": seconds, "kept": kept, "skipped": skipped}


def _lists(recommender: Recommender, rows: np.ndarray, config: BulkConfig) -> pl.DataFrame:
    """The table of some users; the last batch is padded, so that one shape is compiled."""
    catalogue = recommender.catalogue
    options = {"n": config.n, "beam_width": config.beam_width, "include_seen": config.include_seen}
    parts = (
        [recommender.query(catalogue.users[row], **options) for row in batch]
        for batch in np.split(rows, range(config.batch_size, len(rows), config.batch_size))
    )
    user, place, item, logp = [], [], [], []
    for queries, beams in recommender.searched(parts, config.batch_size, config.filter_size):
        for query, (found, scores) in zip(queries, recommender.lists(queries, beams), strict=True):
            user.append(np.full(len(found), query.user))
            place.append(np.arange(1, len(found) + 1))
            item.append(found)
            logp.append(scores)
    item = np.concatenate(item)
    dataset, ids = recommender.run.dataset, recommender.run.ids
    return pl.DataFrame(
        {
            "user_id": dataset.users["user_id"][np.concatenate(user)],
            "place": np.concatenate(place).astype(np.int32),
            "item_id": dataset.items["item_id"][item],
            "logp": np.concatenate(logp),
            "semantic_id": pl.Series(ids.sids[item], dtype=pl.Array(pl.Int32, ids.levels)),
        }
    )
