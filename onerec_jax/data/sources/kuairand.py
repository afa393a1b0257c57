"""KuaiRand-Pure, -1K and -27K as published: short videos with many kinds of feedback.

Gao et al., "KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed Videos",
CIKM 2022. `--path` is the unpacked folder (or its `data`), any part of its files, or one log file;
each file may be packed (.csv.gz) or in parts. The log is never in memory (`data/stream.py`); the
tables of users and videos are, at some 350 bytes a video (`python -m benchmarks.prepare --rows
1000000 --items 8000000`). Features of videos and users may be missing.

Items: the columns of `video_features_basic`, with `duration_s`, `upload_date` and `tags` for
`video_duration`, `upload_dt` and `tag`. There is no text, so there is no `text`. With
`statistic_features` also the columns of `video_features_statistic` as `stat_…`: averages over the
whole month of the log, test days included. They leak the future: they are for analysis, and must
not be inputs of a model (`data/features.py` does not read them).
Users: the columns of `user_features`, as published (-124 and "UNKNOWN" are the source's words for
unknown).

What becomes of bad input; each rule has its count in dataset.json under `preparation`, taken over
all rows read, before duplicates go:

- `rows_read`: actions in the log files.
- `files_with_bom`, `files_with_crlf`, `blank_lines`, `half_lines_dropped`,
  `integers_written_otherwise`: see `data/csv_blocks.py`; accepted. Any other value in an integer
  column, and a row with too few or too many fields, is refused with file, row and column.
- `times_in_seconds`, `times_in_microseconds`: `time_ms` below 1e11 or above 1e14; converted.
- `negative_playtime`, `negative_profile_stay`, `negative_comment_stay`: missing.
- `duration_not_positive`: 0 (a fifth of some logs) or less; missing, in the log and the videos
  (`video_duration_not_positive`). `unreadable_upload_date`: missing.
- `playtime_above_duration`: kept; people watch again.
- `out_of_time_order`: actions earlier than the one of the same user read before; sorted. Files are
  read by date, random exposure last, so each user's first random exposure may be among them.
- `duplicates_dropped`: equal in every column used, after conversion; one is kept.
- `users_over_limit`, `actions_over_limit_dropped`: see `max_user_actions`.
- `videos_without_features`, `users_without_features`: kept with missing features (0 if there is no
  file of features); `users_without_actions`: users only in the features; left out.

`user_id`, `video_id` and `time_ms` must be there and filled. Other columns that a file lacks stay
missing; dataset.json lists them under `columns_missing`. `date` and `hourmin` are not read: they
contradict `time_ms` at times.
"""

import collections
import dataclasses
import pathlib
import re
from typing import Literal

import polars as pl

from onerec_jax.data.csv_blocks import BLOCK_BYTES, CsvFile
from onerec_jax.data.schema import check_target
from onerec_jax.data.sources.kuairand_features import (
    require_header,
    seconds,
    user_table,
    video_table,
)
from onerec_jax.data.stream import ROWS, Report, Rules, Spool, scratch_beside, write_streamed
from onerec_jax.errors import InputError, require_at_least

LICENCE = "CC BY-SA 4.0; cite Gao et al., KuaiRand, CIKM 2022"
KINDS = (
    "log_standard",
    "log_random",
    "user_features",
    "video_features_basic",
    "video_features_statistic",
)
COUNTS = (
    "rows_read",
    "files_with_bom",
    "files_with_crlf",
    "blank_lines",
    "half_lines_dropped",
    "integers_written_otherwise",
    "times_in_seconds",
    "times_in_microseconds",
    "negative_playtime",
    "negative_profile_stay",
    "negative_comment_stay",
    "duration_not_positive",
    "video_duration_not_positive",
    "unreadable_upload_date",
    "playtime_above_duration",
    "out_of_time_order",
    "duplicates_dropped",
    "users_over_limit",
    "actions_over_limit_dropped",
    "videos_without_features",
    "users_without_features",
    "users_without_actions",
)
REQUIRED = ("user_id", "video_id", "time_ms")
FLAGS = {
    "is_click": "click",
    "is_like": "like",
    "is_follow": "follow",
    "is_comment": "comment",
    "is_forward": "forward",
    "is_hate": "hate",
    "long_view": "long_view",
    "is_profile_enter": "profile_enter",
    "is_rand": "is_rand",
}
MILLISECONDS = {
    "play_time_ms": ("playtime_s", "negative_playtime"),
    "profile_stay_time": ("profile_stay_s", "negative_profile_stay"),
    "comment_stay_time": ("comment_stay_s", "negative_comment_stay"),
}
LOG_COLUMNS = (*REQUIRED, *FLAGS, *MILLISECONDS, "duration_ms", "tab")


@dataclasses.dataclass(frozen=True)
class KuaiRandConfig:
    """What to take of KuaiRand."""

    logs: Literal["both", "standard", "random"] = "both"
    """Which log files of a folder: what people were shown as usual, at random, or both (the column
    is_rand tells them apart)."""
    statistic_features: bool = False
    """Add the monthly averages of videos as stat_ columns: they know the future and are for
    analysis only."""
    max_user_actions: int = 100_000
    """Keep a user's latest so many actions (the longest history in the OneRec report); 0: all."""

    def __post_init__(self):
        require_at_least(self, "kuairand.", max_user_actions=0)


def prepare_kuairand(
    path: pathlib.Path,
    folder: pathlib.Path,
    config: KuaiRandConfig | None = None,
    *,
    split: str = "leave-one-out",
    min_user_actions: int = 0,
    overwrite: bool = False,
    report: Report = lambda *_: None,
    block_bytes: int = BLOCK_BYTES,
    rows_in_memory: int = ROWS,
) -> None:
    """Write the data set of the files in `path` to `folder`; see the module for the rules.

    Args:
      path: folder of the published files, its parent, or one log file.
      split, min_user_actions, overwrite: as for `experiments.prepare`.
      report: told of the progress.
      block_bytes, rows_in_memory: how much is held at a time.

    Raises:
      InputError: no log, files of several editions, a required column missing, or a bad value.
    """
    config = config or KuaiRandConfig()
    check_target(folder, overwrite)
    counts = collections.Counter(dict.fromkeys(COUNTS, 0))
    files = find_files(path, config)
    logs = [CsvFile(file, counts) for kind in KINDS[:2] for file in files[kind]]
    for log in logs:
        require_header(log, REQUIRED)
    columns = [name for name in LOG_COLUMNS if any(name in log.header for log in logs)]
    with scratch_beside(folder) as scratch:
        spool = Spool(scratch, rows_in_memory)
        total, before = sum(log.path.stat().st_size for log in logs), 0
        for log in logs:
            types = {name: pl.Int64 for name in columns if name in log.header}
            for first, frame in log.blocks(types, block_bytes):
                spool.add(_actions(log, first, frame, columns, counts))
                report("reading", before + log.bytes_read, total, spool.rows)
            before += log.path.stat().st_size
        if not spool.rows:
            raise InputError(f"{logs[0].path}: holds no interactions; give a file with rows")
        counts["rows_read"] = spool.rows
        users = user_table(files["user_features"], spool.users["user_id"], counts, block_bytes)
        write_streamed(
            folder,
            "kuairand" + "".join(f"-{edition}" for edition in _editions(logs)),
            spool,
            video_table(files, spool.items["item_id"], counts, block_bytes),
            users,
            meta={
                "source": "kuairand",
                "origin": f"KuaiRand files in {path.resolve()}",
                "files": [file.name for kind in KINDS for file in files[kind]],
                "licence": LICENCE,
                "max_user_actions": config.max_user_actions,
                "columns_missing": {
                    log.path.name: [name for name in LOG_COLUMNS if name not in log.header]
                    for log in logs
                },
            },
            counts=counts,
            split=split,
            rules=Rules("millisecond", "time_ms", config.max_user_actions, min_user_actions),
            overwrite=overwrite,
            report=report,
        )


def find_files(path: pathlib.Path, config: KuaiRandConfig) -> dict[str, list[pathlib.Path]]:
    """The files to read by kind (`KINDS`), each list in the order of reading.

    Raises:
      InputError: nothing there, no log of the kind wanted, or several editions.
    """
    files: dict[str, list[pathlib.Path]] = {kind: [] for kind in KINDS}
    if path.is_file():
        if path.name.startswith(KINDS[2:]):
            raise InputError(f"--path {path}: holds features and no log; give the folder or a log")
        files["log_standard"] = [path]
        return files
    if not path.is_dir():
        raise InputError(f"--path {path}: no such file or folder; give KuaiRand's, unpacked")
    for folder in (path / "data", path):
        for kind in KINDS:
            found = {file.name: file for file in sorted(folder.glob(f"{kind}*.csv*"))}
            # A file that lies there packed and unpacked is one file.
            files[kind] = [
                file
                for name, file in found.items()
                if name.endswith(".csv") or (name.endswith(".csv.gz") and name[:-3] not in found)
            ]
        if any(files.values()):
            break
    if config.logs != "both":
        files["log_random" if config.logs == "standard" else "log_standard"] = []
    if not config.statistic_features:
        files["video_features_statistic"] = []
    if not files["log_standard"] + files["log_random"]:
        wanted = "log_*.csv" if config.logs == "both" else f"log_{config.logs}_*.csv"
        has = ", ".join(file.name for kind in KINDS for file in files[kind]) or "no KuaiRand file"
        raise InputError(f"--path {path}: has no {wanted} (it has {has}); add the log")
    editions = sorted({e for found in files.values() for e in map(_edition, found) if e})
    if len(editions) > 1:
        raise InputError(
            f"--path {path}: mixes the editions {' and '.join(editions)}, whose ids differ; "
            "give a folder of one"
        )
    return files


def _edition(file: pathlib.Path) -> str | None:
    """pure, 1k or 27k, if the name of the file says so."""
    found = re.search(r"_(pure|1k|27k)(?=[_.])", file.name)
    return found and found[1]


def _editions(logs: list[CsvFile]) -> list[str]:
    return sorted({edition for log in logs if (edition := _edition(log.path))})


def _actions(
    log: CsvFile,
    first: int,
    frame: pl.DataFrame,
    columns: list[str],
    counts: collections.Counter,
) -> pl.DataFrame:
    """A block under our names and in our units and types; columns the file lacks are null."""
    absent = [name for name in columns if name not in frame.columns]
    frame = frame.with_columns(pl.lit(None, pl.Int64).alias(name) for name in absent)
    for name in REQUIRED:
        log.refuse(first, frame[name].is_null(), frame[name], f"is no {name}")
    time = frame["time_ms"]
    log.refuse(first, ~time.is_between(0, 10**17), time, "is no Unix time in s, ms or µs")
    in_seconds, micros = time < 10**11, time > 10**14
    counts["times_in_seconds"] += in_seconds.sum()
    counts["times_in_microseconds"] += micros.sum()
    time = time.zip_with(~micros, time // 1000).zip_with(~in_seconds, time * 1000)
    out = [
        frame["user_id"],
        frame["video_id"].alias("item_id"),
        (time // 1000).alias("time_s"),
        (time % 1000).cast(pl.Int16).alias("millisecond"),
    ]
    for name in (name for name in FLAGS if name in columns):
        bad = ~frame[name].is_between(0, 1).fill_null(True)
        log.refuse(first, bad, frame[name], "is neither 0 nor 1")
        out.append(frame[name].cast(pl.Int8).alias(FLAGS[name]))
    if "tab" in columns:
        bad = ~frame["tab"].is_between(-128, 127).fill_null(True)
        log.refuse(first, bad, frame["tab"], "is no page of the app")
        out.append(frame["tab"].cast(pl.Int8))
    for name in (name for name in MILLISECONDS if name in columns):
        ours, count = MILLISECONDS[name]
        negative = (frame[name] < 0).fill_null(False)
        counts[count] += negative.sum()
        out.append(seconds(frame[name].set(negative, None)).alias(ours))
    if "duration_ms" in columns:
        nothing = (frame["duration_ms"] <= 0).fill_null(False)
        counts["duration_not_positive"] += nothing.sum()
        duration = frame["duration_ms"].set(nothing, None)
        if "play_time_ms" in columns:
            counts["playtime_above_duration"] += (frame["play_time_ms"] > duration).sum()
        out.append(seconds(duration).alias("duration_s"))
    return pl.DataFrame(out)
