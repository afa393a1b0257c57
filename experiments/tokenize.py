"""Semantic IDs for a data set: `python -m experiments.tokenize --data FOLDER --out FOLDER`.

Item vectors, residual k-means on the items of the training part, codes for all items.
"""

import dataclasses
import pathlib

import rich.console
import rich.table

from onerec_jax import cli
from onerec_jax.data.schema import load_dataset
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.build import TokenizerConfig, tokenize
from onerec_jax.tokenizer.semantic_ids import SemanticIds


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """Fit residual k-means and give every item a semantic ID."""

    data: pathlib.Path
    """Data set folder from experiments.prepare."""
    out: pathlib.Path
    """Folder to write."""
    vectors: pathlib.Path | None = None
    """Item vectors, .npy [items, D] in the order of items.parquet; default: from the item text."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    overwrite: bool = False
    """Replace semantic IDs that are already in --out."""


def show(ids: SemanticIds) -> None:
    """Print how good the codes are."""
    quality = ids.manifest["quality"]
    table = rich.table.Table(title=f"semantic IDs of {ids.manifest['dataset']}")
    table.add_column("level")
    table.add_column("codes used", justify="right")
    table.add_column("entropy (nats)", justify="right")
    for level in range(ids.levels):
        table.add_row(
            f"{level + 1}",
            f"{quality['utilisation'][level]:.1%} of {ids.codebook_size}",
            f"{quality['entropy'][level]:.3f}",
        )
    console = rich.console.Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(
        f"{quality['distinct_ids']:,} IDs for {ids.manifest['items']:,} items; "
        f"collision rate {quality['collision_rate']:.2%}, "
        f"largest {quality['largest_collision']} items on one ID; "
        f"reconstruction loss {quality['reconstruction_loss']:.6f}"
    )
    if before := quality.get("before_spreading"):
        console.print(f"collision rate before spreading {before['collision_rate']:.2%}")


def main(config: TokenizeConfig) -> None:
    """Tokenize one data set and show the result."""
    if config.out.exists() and not config.overwrite:
        raise InputError(f"--out {config.out} exists: give --overwrite or another folder")
    if config.out.exists() and not (config.out / "semantic_ids.json").exists():
        raise InputError(
            f"--out {config.out} exists and holds no semantic IDs: give another folder"
        )
    ids = tokenize(load_dataset(config.data), config.tokenizer, config.vectors)
    ids.save(config.out)
    show(ids)
    print(f"written to {config.out}")


if __name__ == "__main__":
    cli.run(main, TokenizeConfig, prog="python -m experiments.tokenize")
