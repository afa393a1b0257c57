"""Speed and memory of reading a large log: `taskset -c 0,1 python -m benchmarks.prepare`.

Writes a made log in KuaiRand's format, with features of users and videos, to a temporary folder,
prepares it in a process of its own and reports rows a second and that process's peak memory.
"""

import dataclasses
import json
import os
import pathlib
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time

import numpy as np
import polars as pl

from onerec_jax import cli
from onerec_jax.errors import require_at_least
from onerec_jax.files import write_text

BLOCK = 1_000_000
START_MS = 1_649_347_200_000
MONTH_MS = 31 * 86_400_000


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Time experiments.prepare on a made KuaiRand log, and its peak memory."""

    rows: int = 20_000_000
    """Rows of the made log (KuaiRand-27K has 322 million)."""
    users: int = 27_000
    """Users, who take turns at random."""
    items: int = 2_000_000
    """Videos, drawn with a density that falls as the square root of the rank."""
    split: str = "leave-one-out"
    seed: int = 0
    scratch: pathlib.Path | None = None
    """Folder for the temporary files, about 150 bytes a row; default: the system's."""
    out: pathlib.Path = pathlib.Path("runs/benchmarks/prepare.json")
    """JSON to write."""

    def __post_init__(self):
        require_at_least(self, "", rows=1, users=1, items=1, seed=0)


def write_log(folder: pathlib.Path, config: BenchmarkConfig) -> None:
    """The made log, in two files and in no order, and features of all users and videos."""
    rng = np.random.default_rng(config.seed)
    halves = (config.rows // 2, config.rows - config.rows // 2)
    for part, rows in enumerate(halves, start=1):
        name = f"log_standard_4_08_to_4_21_27k_part{part}.csv"
        with open(folder / name, "wb") as file:
            for start in range(0, rows, BLOCK):
                made = made_rows(rng, min(BLOCK, rows - start), config)
                made.write_csv(file, include_header=start == 0)
    users = np.arange(config.users)
    pl.DataFrame(
        {"user_id": users, "user_active_degree": "full_active", "onehot_feat0": users % 2}
    ).write_csv(folder / "user_features_27k.csv")
    videos = np.arange(config.items)
    pl.DataFrame(
        {
            "video_id": videos,
            "author_id": videos // 4,
            "video_type": "NORMAL",
            "upload_dt": "2022-04-10",
            "upload_type": "LongImport",
            "visible_status": 0.0,
            "video_duration": 1000.0 * (1 + videos % 120),
            "server_width": 720.0,
            "server_height": 1280.0,
            "music_id": videos + 4_000_000_000,
            "music_type": 9.0,
            "tag": pl.Series(videos % 60).cast(pl.String)
            + ","
            + pl.Series(videos % 7).cast(pl.String),
        }
    ).write_csv(folder / "video_features_basic_27k.csv")


def made_rows(rng: np.random.Generator, rows: int, config: BenchmarkConfig) -> pl.DataFrame:
    """Rows with the 19 columns of the published log."""
    video = (config.items * rng.random(rows) ** 2).astype(np.int64)
    time_ms = START_MS + rng.integers(0, MONTH_MS, rows)
    when = pl.Series(time_ms).cast(pl.Datetime("ms"))
    rare = {
        f"is_{name}": (rng.random(rows) < 0.01).astype(np.int8)
        for name in ("like", "follow", "comment", "forward", "hate")
    }
    play_ms = rng.exponential(15_000, rows).astype(np.int64)
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, config.users, rows),
            "video_id": video,
            "date": when.dt.strftime("%Y%m%d"),
            "hourmin": when.dt.hour().cast(pl.Int32) * 100,
            "time_ms": time_ms,
            "is_click": (play_ms > 7000).astype(np.int8),
            **rare,
            "long_view": (play_ms > 18_000).astype(np.int8),
            "play_time_ms": play_ms,
            "duration_ms": 1000 * (1 + video % 120),
            "profile_stay_time": np.zeros(rows, np.int8),
            "comment_stay_time": np.zeros(rows, np.int8),
            "is_profile_enter": np.zeros(rows, np.int8),
            "is_rand": np.zeros(rows, np.int8),
            "tab": rng.integers(0, 15, rows),
        }
    )


def main(config: BenchmarkConfig) -> None:
    """Make, prepare, print and write."""
    with tempfile.TemporaryDirectory(dir=config.scratch) as scratch:
        folder, out = pathlib.Path(scratch, "files"), pathlib.Path(scratch, "out")
        folder.mkdir()
        start = time.perf_counter()
        write_log(folder, config)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"made {size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s", flush=True)

        flags = ["--source", "kuairand", "--path", folder, "--out", out, "--split", config.split]
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "experiments.prepare", *map(str, flags)], check=True)
        seconds = time.perf_counter() - start
        # The largest of all ended child processes, and there is only this one.
        kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        kib = kib if sys.platform != "darwin" else kib / 1024
        written = sum(file.stat().st_size for file in out.iterdir())
    result = {
        "seconds": round(seconds, 1),
        "rows_per_second": round(config.rows / seconds),
        "peak_mib": round(kib / 1024),
        "read_gb": round(size / 1e9, 2),
        "written_gb": round(written / 1e9, 2),
    }
    print(", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in result.items()))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.prepare", *sys.argv[1:]]),
        "machine": f"{platform.processor() or platform.machine()}, {_cores()} cores",
        "settings": dataclasses.asdict(config),
        "results": result,
    }
    write_text(config.out, json.dumps(report, indent=1, default=str) + "\n")
    print(f"written to {config.out}")


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, prog="python -m benchmarks.prepare")
