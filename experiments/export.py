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


def compare(recommender: Recommender, exported: Exported, config: ExportConfig) -> str:
    """How the lists of some users differ on this machine between the run and its export."""
    width = min(config.widths)
    users = np.linspace(0, len(recommender.catalogue.users) - 1, 8).astype(int)
    ids = recommender.catalogue.items
    histories = [[ids[row] for row in recommender.catalogue.history(user)] for user in users]
    ours = recommender.recommend(histories, n=width, beam_width=width)
    theirs = exported.recommend(histories, n=width, beam_width=width)
    pairs = [pair for lists in zip(ours, theirs, strict=True) for pair in zip(*lists, strict=False)]
    same = [a.logp - b["logp"] for a, b in pairs if a.item_id == b["item_id"]]
    largest = max(map(abs, same), default=float("nan"))
    return f"{len(same)} of {len(pairs)} places agree, log P there to {largest:.1e}"


def main(config: Config) -> None:
    """Load, export, compare."""
    recommender = Recommender.load(config.run)
    export_run(recommender, config.out, config.export)
    size = sum(path.stat().st_size for path in config.out.iterdir()) / 2**20
    print(f"written to {config.out}: {size:,.1f} MiB, for {', '.join(config.export.platforms)}")
    print("read back:", compare(recommender, Exported.load(config.out), config.export))


if __name__ == "__main__":
    cli.run(main, Config, prog="python -m experiments.export")
