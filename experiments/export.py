"""A run as files that serve without the code: `python -m experiments.export RUN --out FOLDER`.

from onerec_jax.serving.exported import Exported
Exported.load("FOLDER").recommend([["318", "296"]], n=10)
"""

import dataclasses
import pathlib
from typing import Annotated

import numpy as np
import tyro

from onerec_jax import cli
from onerec_jax.serving.export import ExportConfig, export_run
from onerec_jax.serving.exported import Exported
from onerec_jax.serving.recommender import Recommender


@dataclasses.dataclass(frozen=True)
class Config:
    """Export the best checkpoint of a run and compare it with what it came from."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """Run folder."""
    out: pathlib.Path
    """Folder to write."""
    export: Annotated[ExportConfig, tyro.conf.OmitArgPrefixes] = ExportConfig()


def compare(recommender: Recommender, exported: Exported, config: ExportConfig) -> float:
    """Largest difference of a log-probability on this machine, over the histories of some users."""
    width = min(config.widths)
    users = np.linspace(0, len(recommender.catalogue.users) - 1, 8).astype(int)
    ids = recommender.catalogue.items
    histories = [[ids[row] for row in recommender.catalogue.history(user)] for user in users]
    ours = recommender.recommend(histories, n=width, beam_width=width)
    theirs = exported.recommend(histories, n=width, beam_width=width)
    largest = 0.0
    for listed, others in zip(ours, theirs, strict=True):
        logp = {item.item_id: item.logp for item in listed}
        shared = [item for item in others if item["item_id"] in logp]
        largest = max([largest] + [abs(x["logp"] - logp[x["item_id"]]) for x in shared])
    return largest


def main(config: Config) -> None:
    """Load, export, compare."""
    recommender = Recommender.load(config.run)
    export_run(recommender, config.out, config.export)
    size = sum(path.stat().st_size for path in config.out.iterdir()) / 2**20
    print(f"written to {config.out}: {size:,.1f} MiB, for {', '.join(config.export.platforms)}")
    difference = compare(recommender, Exported.load(config.out), config.export)
    print(f"read back: log P of the lists of 8 users differ by at most {difference:.1e}")


if __name__ == "__main__":
    cli.run(main, Config, prog="python -m experiments.export")
