"""Does a world's log look like a real one? `python -m experiments.studies.world --data FOLDER`.

Draws popularity, watch time by duration, rates of feedback and lengths of sessions of a prepared
data set, beside a real one if given, and prints the rates.

    python -m experiments.studies.world --data runs/data/world --real runs/data/kuairand \\
        --out runs/studies/world.png
"""

import dataclasses
import pathlib

import rich.console
import rich.table

from onerec_jax import cli
from onerec_jax.data.schema import load_dataset
from onerec_jax.data.world.plots import world_plots


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Plot a data set, beside a real one if given."""

    data: pathlib.Path
    """Data set folder from experiments.prepare."""
    real: pathlib.Path | None = None
    """A second data set folder, to compare with."""
    out: pathlib.Path = pathlib.Path("runs/studies/world.png")
    """PNG to write."""


def main(config: StudyConfig) -> None:
    """Draw, and print the rates."""
    real = None if config.real is None else load_dataset(config.real)
    results = world_plots(load_dataset(config.data), config.out, real)
    table = rich.table.Table(title="means over exposures")
    table.add_column()
    for name in results:
        table.add_column(name, justify="right")
    for row in dict.fromkeys(key for values in results.values() for key in values):
        cells = [f"{v[row]:.4f}" if row in v else "" for v in results.values()]
        table.add_row(row, *cells)
    console = rich.console.Console(soft_wrap=True, markup=False, highlight=False)
    console.print(table)
    console.print(f"plots written to {config.out}")


if __name__ == "__main__":
    cli.run(main, StudyConfig, prog="python -m experiments.studies.world")
