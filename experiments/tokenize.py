"""Semantic IDs for a data set: `python -m experiments.tokenize --data FOLDER --out FOLDER`.

Item content to vectors, if wanted aligned with what people like together, residual k-means on the
items of the training part, IDs for all items, and a report on how good they are. With --extend the
items that an earlier table does not know get their IDs from its codebooks.

    python -m experiments.tokenize --data runs/data/beauty --out runs/ids --tokenizer.align small
    python -m experiments.tokenize --data runs/data/grown --out runs/ids-2 --extend runs/ids
"""

import dataclasses
import os
import pathlib
import sys

import jax
import tyro

from onerec_jax import cli
from onerec_jax.data.schema import load_dataset
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer import report
from onerec_jax.tokenizer.alignment import ALIGNMENT_PRESETS
from onerec_jax.tokenizer.build import Tokenizer, extend, tokenize
from onerec_jax.tokenizer.config import Files, TokenizerConfig


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """Give every item of a data set a semantic ID."""

    data: pathlib.Path
    """Data set folder from experiments.prepare."""
    out: pathlib.Path
    """Folder to write."""
    vectors: pathlib.Path | None = None
    """Item vectors: .npy [items, D] in the order of items.parquet, or .parquet with item_id;
    default: from the item text."""
    tokens: pathlib.Path | None = None
    """Several vectors an item: .npz with values [items, tokens, D] and lengths [items]."""
    pairs: pathlib.Path | None = None
    """Item pairs for the alignment: .parquet with item_id and other_id; default: mined."""
    extend: pathlib.Path | None = None
    """Folder of semantic IDs to keep; only items that it does not know get new ones. Its settings
    stand in place of the --tokenizer flags."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    devices: int = 0
    """Devices to spread the work over; 0 = all."""
    stability: bool = True
    """Fit the first level again with another seed, to report how far the two agree."""
    overwrite: bool = False
    """Replace semantic IDs that are already in --out."""

    def __post_init__(self):
        require_at_least(self, "", devices=0)

    @property
    def files(self) -> Files:
        return Files(self.vectors, self.tokens, self.pairs)


def check_target(config: TokenizeConfig) -> None:
    """Refuses an --out that must not be written, before any work is done."""
    if config.out.exists() and not config.overwrite:
        raise InputError(f"--out {config.out} exists: give --overwrite or another folder")
    if config.out.exists() and not (config.out / "semantic_ids.json").exists():
        raise InputError(
            f"--out {config.out} exists and holds no semantic IDs: give another folder"
        )
    above = next(folder for folder in config.out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"--out {config.out}: nothing can be written to {above}: give another one")


def say(line: str) -> None:
    print(line, flush=True)


def make(config: TokenizeConfig) -> Tokenizer:
    """The tokenizer, fitted or extended."""
    if config.devices > jax.device_count():
        raise InputError(f"--devices {config.devices}: this machine has {jax.device_count()}")
    dataset, mesh = load_dataset(config.data), make_mesh(config.devices)
    if config.extend is None:
        return tokenize(
            dataset,
            config.tokenizer,
            config.files,
            mesh=mesh,
            stability=config.stability,
            say=say,
        )
    return extend(Tokenizer.load(config.extend), dataset, config.files, mesh=mesh, say=say)


def main(config: TokenizeConfig) -> None:
    """Make the IDs, write them and show how good they are."""
    check_target(config)
    tokenizer = make(config)
    try:
        tokenizer.save(config.out)
    except OSError as error:
        raise InputError(
            f"--out {config.out}: cannot be written ({error.strerror or error})"
        ) from error
    report.show(tokenizer.report)
    print(f"\nwritten to {config.out}: report.md, report.json, codes.png, the table and codebooks")


def with_alignment_preset(default: TokenizerConfig, argv: list[str]) -> TokenizerConfig:
    """The defaults that --tokenizer.align among the flags asks for."""
    name = cli.flag_value(argv, "--tokenizer.align")
    if name not in ALIGNMENT_PRESETS:
        return default  # off, or a value that is refused later
    return dataclasses.replace(default, align=name, alignment=ALIGNMENT_PRESETS[name])


def run_command(argv: list[str] | None = None) -> None:
    """The command line; `argv` replaces the process's own flags."""
    argv = sys.argv[1:] if argv is None else argv
    tokenizer = with_alignment_preset(TokenizerConfig(), argv)
    default = TokenizeConfig(data=tyro.MISSING, out=tyro.MISSING, tokenizer=tokenizer)
    cli.run(main, TokenizeConfig, prog="python -m experiments.tokenize", default=default, argv=argv)


if __name__ == "__main__":
    run_command()
