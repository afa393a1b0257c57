"""A data set to semantic IDs: content, alignment, codebooks on training items, IDs for every item.

`tokenize` fits everything; `extend` gives IDs to the items of a grown catalogue without refitting.
Both return a `Tokenizer`, which is what lies in a folder of `experiments.tokenize`.
"""

import dataclasses
import importlib.metadata
import json
import pathlib

import jax
import numpy as np
import polars as pl

from onerec_jax.data.schema import Dataset
from onerec_jax.data.splits import Split, item_popularity, make_split
from onerec_jax.errors import InputError
from onerec_jax.files import atomic_folder, read_json
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer import report as reports
from onerec_jax.tokenizer.alignment import Aligner, align
from onerec_jax.tokenizer.collisions import resolve
from onerec_jax.tokenizer.config import Files, TokenizerConfig, config_of
from onerec_jax.tokenizer.content import Rows, Say, describe, flat, read_content
from onerec_jax.tokenizer.item_pairs import ItemPairs
from onerec_jax.tokenizer.pairs import mine_pairs
from onerec_jax.tokenizer.rq_kmeans import decode, encode, fit_rq_kmeans, too_large
from onerec_jax.tokenizer.semantic_ids import SemanticIds, default_codebook_size, sid_keys
from onerec_jax.tokenizer.text import TfidfEncoder
from onerec_jax.tokenizer.vectors import ItemTokens, check_vectors, distinct_rows, fingerprint

VERSIONS = ("jax", "numpy", "scikit-learn")
SAME_CODES = 0.99
"""Share of known items that must get their old codes for an extension to be one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Semantic IDs, and what it takes to make more of them."""

    ids: SemanticIds
    report: dict
    encoder: TfidfEncoder | None = None
    aligner: Aligner | None = None
    vectors: np.ndarray | None = None
    """float [items, D], what was quantised; not saved."""

    def save(self, folder: pathlib.Path) -> None:
        """Writes everything; the folder appears whole or not at all."""
        with atomic_folder(folder) as tmp:
            self.ids.write(tmp)
            if self.encoder is not None:
                self.encoder.save(tmp / "encoder")
            if self.aligner is not None:
                self.aligner.save(tmp / "aligner")
            (tmp / "report.json").write_text(json.dumps(self.report, indent=1) + "\n")
            (tmp / "report.md").write_text(reports.markdown(self.report))
            reports.draw(tmp / "codes.png", self.ids, self.report)

    @classmethod
    def load(cls, folder: pathlib.Path) -> "Tokenizer":
        """Reads what `save` wrote.

        Raises:
          InputError: missing, damaged, or files that do not belong together.
        """
        folder = pathlib.Path(folder)
        ids = SemanticIds.load(folder)
        if not {"content", "aligned", "settings"} <= set(ids.manifest):
            raise InputError(
                f"{folder}: semantic_ids.json does not say what the IDs were made of: make them "
                "with `python -m experiments.tokenize`"
            )
        encoder = aligner = None
        if ids.manifest["content"]["kind"] == "tfidf":
            encoder = TfidfEncoder.load(folder / "encoder")
        if ids.manifest["aligned"]:
            aligner = Aligner.load(folder / "aligner")
        return cls(ids, read_json(folder / "report.json"), encoder, aligner)


# -------------------------------------------------------------------------------------- tokenize


def tokenize(
    dataset: Dataset,
    cfg: TokenizerConfig,
    files: Files | None = None,
    *,
    mesh=None,
    stability: bool = False,
    say: Say = lambda line: None,
) -> Tokenizer:
    """Fits on the items of the training part and gives an ID to all items.

    Args:
      mesh: devices to use; default: all.
      stability: fit the first level once more with another seed and compare.
      say: takes lines of progress.

    Raises:
      InputError: no text and no vectors; more codes than distinct training items; unusable files;
        out of memory.
    """
    files, mesh = files or Files(), mesh or make_mesh()
    if files.pairs is not None and cfg.align == "off":
        raise InputError(
            "--pairs is for the alignment: give --tokenizer.align too, or leave it out"
        )
    split = make_split(dataset)
    popularity = item_popularity(dataset, split)
    fit_rows = np.flatnonzero(popularity > 0)
    size = cfg.codebook_size or min(default_codebook_size(dataset.num_items), len(fit_rows))
    if size > len(fit_rows):
        raise InputError(
            f"--tokenizer.codebook-size {size} is larger than the {len(fit_rows)} training items "
            f"of data set '{dataset.name}': lower it"
        )
    sid_keys(np.zeros((1, cfg.levels + (cfg.collisions == "append"))), size)  # refuses too many
    content, origin, encoder = read_content(dataset, cfg, files, fit_rows, say, None)
    aligner = None
    if cfg.align != "off":
        aligner = _align(dataset, split, cfg, files, content, fit_rows, mesh, say)
    x_nd = flat(content, aligner)
    del content
    what = f"--vectors {files.vectors}" if files.vectors else "the item vectors"
    check_vectors(x_nd, what)

    mapped = isinstance(x_nd, np.memmap)
    fit_nd = Rows(x_nd, fit_rows) if mapped else x_nd[fit_rows]
    if not mapped and (distinct := distinct_rows(fit_nd)) < size:
        raise InputError(
            f"{what}: the {len(fit_rows)} training items have {distinct} distinct vectors, fewer "
            f"than --tokenizer.codebook-size {size}: lower it"
        )
    options = {"codebook_size": size, "cfg": cfg.kmeans, "mesh": mesh}
    with _memory_errors(fit_nd.shape, size, cfg.kmeans, mesh):
        fit = fit_rq_kmeans(fit_nd, levels=cfg.levels, seed=cfg.seed, say=say, **options)
        nearest = encode(x_nd, fit.codebooks, mesh=mesh, chunk=cfg.kmeans.chunk)
        other = None
        if stability:
            say("first level again, with another seed")
            other = fit_rq_kmeans(fit_nd, levels=1, seed=cfg.seed + 1, **options).codes[:, 0]
    codes = nearest.copy()
    codes[fit_rows] = fit.codes
    sids = resolve(cfg.collisions, x_nd, codes, fit.codebooks, -popularity)

    manifest = {
        "dataset": dataset.name,
        "dataset_fingerprint": dataset.fingerprint,
        "content": origin,
        "aligned": aligner is not None,
        "vectors": describe(origin, aligner is not None),
        "vectors_fingerprint": fingerprint(x_nd),
        "settings": dataclasses.asdict(dataclasses.replace(cfg, codebook_size=size)),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "fitted_items": len(fit_rows),
        "items": dataset.num_items,
    }
    ids = SemanticIds(sids, fit.codebooks, manifest, nearest, _plain_ids(dataset))
    report = make_report(ids, x_nd, codes, dataset)
    report["fit"] = fit.levels
    if other is not None:
        report["stability"] = reports.agreement(fit.codes[:, 0], other)
    if aligner is not None:
        report["alignment"] = list(aligner.log)
    manifest["quality"] = report["quality"]["stored"]
    return Tokenizer(ids, report, encoder, aligner, x_nd)


def _align(dataset, split: Split, cfg: TokenizerConfig, files: Files, content, fit_rows, mesh, say):
    """Trains the compressor on the items of the training part."""
    pairs = texts = None
    if cfg.alignment.pairs and files.pairs is not None:
        pairs = ItemPairs.load(files.pairs, dataset)
    elif cfg.alignment.pairs:
        pairs = mine_pairs(dataset, split, cfg.pairs, say=say)
    if pairs is not None:
        say(f"{len(pairs):,} item pairs")
    if cfg.alignment.captions and "text" in dataset.items.columns:
        texts = dataset.items["text"].to_list()
    tokens = content if isinstance(content, ItemTokens) else ItemTokens.from_vectors(content)
    return align(tokens, fit_rows, cfg.alignment, pairs=pairs, texts=texts, mesh=mesh, say=say)


def _plain_ids(dataset: Dataset) -> np.ndarray:
    """Item ids as NumPy can save them without pickles."""
    ids = dataset.items["item_id"]
    return np.array(ids.to_list(), np.str_ if ids.dtype == pl.String else np.int64)


def make_report(ids: SemanticIds, x_nd, codes_nl, dataset: Dataset) -> dict:
    """Numbers of the IDs as stored and of the readings behind them; what the codes hold in words.

    Args:
      codes_nl: int32 `[I, L]`, codes before collisions were resolved.
    """
    levels, size = len(ids.codebooks), ids.codebook_size

    def reading(sids_nl):
        codes_nl = sids_nl[:, :levels]
        return reports.quality(
            x_nd, sids_nl, codes_nl, size, lambda codes: decode(codes, ids.codebooks)
        )

    quality = {"stored": reading(ids.sids)}
    if not np.array_equal(ids.sids, codes_nl):
        quality["fitted"] = reading(codes_nl)
    if not np.array_equal(codes_nl, ids.codes):
        quality["nearest"] = reading(ids.codes)
    report = {
        "dataset": ids.manifest["dataset"],
        "items": len(ids.sids),
        "codebook_size": size,
        "vectors": ids.manifest["vectors"],
        "quality": quality,
    }
    columns = dataset.items.columns
    if "text" in columns:
        titles = dataset.items["title"].to_list() if "title" in columns else None
        texts = dataset.items["text"].to_list()
        report["readable"] = reports.readable_codes(ids, texts, titles)
    return report


class _memory_errors:
    """Turns a device's out-of-memory into one line with the estimate and the flags."""

    def __init__(self, *fit):
        self.fit = fit

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, MemoryError) or (
            isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
        ):
            raise InputError(too_large(*self.fit, "was not to be had")) from error


# ---------------------------------------------------------------------------------------- extend


def extend(
    tokenizer: Tokenizer,
    dataset: Dataset,
    files: Files | None = None,
    *,
    mesh=None,
    say: Say = lambda line: None,
) -> Tokenizer:
    """IDs for a grown catalogue: known items keep theirs, new ones get the nearest codes.

    Args:
      dataset: holds the new items and the known ones that are still there.
      files: vectors or tokens of all its items, if the table was made from such files.

    Raises:
      InputError: nothing is new; ids of another type; content that is not what the table was made
        of.
    """
    files, mesh, ids = files or Files(), mesh or make_mesh(), tokenizer.ids
    cfg = config_of(ids)
    if ids.item_ids is None:
        raise InputError("these semantic IDs do not say which items they are of: make them again")
    known = pl.DataFrame({"item_id": ids.item_ids}).with_row_index("old")
    items = dataset.items.select("item_id")
    if known["item_id"].dtype != items["item_id"].dtype:
        raise InputError(
            f"data set '{dataset.name}' has {items['item_id'].dtype} item ids, the semantic IDs "
            f"are of {known['item_id'].dtype} ones: give the data set they were made of, grown"
        )
    old = items.join(known, on="item_id", how="left", maintain_order="left")["old"].to_numpy()
    fixed = ~np.isnan(old.astype(float))
    rows = old[fixed].astype(np.int64)
    if not fixed.any() or fixed.all():
        raise InputError(
            f"data set '{dataset.name}' has {'no item' if not fixed.any() else 'only items'} of "
            "these semantic IDs: there is nothing to extend"
        )
    if files.pairs is not None:
        raise InputError("--pairs is for the alignment, and an extension fits none: leave it out")
    kind = ids.manifest["content"]["kind"]
    given = {name for name in ("vectors", "tokens") if getattr(files, name) is not None}
    if given != {kind} & {"vectors", "tokens"}:
        flags = f"--{kind} with those" if kind in ("vectors", "tokens") else "no file"
        raise InputError(
            f"the semantic IDs were made of {ids.manifest['vectors']}: give {flags} of all items "
            f"of data set '{dataset.name}'"
        )
    content, origin, _ = read_content(dataset, cfg, files, None, say, tokenizer.encoder)
    if origin.get("fingerprint") != ids.manifest["content"].get("fingerprint"):
        raise InputError(
            f"the text model {cfg.text} is another one than when the semantic IDs were made: "
            "restore it, or make them anew"
        )
    x_nd = flat(content, tokenizer.aligner)
    if x_nd.shape[1] != ids.codebooks.shape[2]:
        raise InputError(
            f"the item vectors are {x_nd.shape[1]} wide, the codebooks {ids.codebooks.shape[2]}: "
            "give vectors of the model that the semantic IDs were made with"
        )
    check_vectors(x_nd, f"--vectors {files.vectors}" if files.vectors else "the item vectors")
    nearest = encode(x_nd, ids.codebooks, mesh=mesh, chunk=cfg.kmeans.chunk)
    same = float((nearest[fixed] == ids.codes[rows]).all(1).mean())
    if same < SAME_CODES:
        raise InputError(
            f"only {same:.1%} of the known items get their old codes: these are not the vectors "
            "that the semantic IDs were made of, or their rows are in another order"
        )
    popularity = item_popularity(dataset, make_split(dataset))
    wanted = np.zeros((len(nearest), ids.levels), np.int32)
    wanted[:, : nearest.shape[1]] = nearest
    wanted[fixed] = ids.sids[rows]
    sids = resolve(cfg.collisions, x_nd, wanted, ids.codebooks, -popularity, fixed)
    manifest = ids.manifest | {
        "dataset": dataset.name,
        "dataset_fingerprint": dataset.fingerprint,
        "vectors_fingerprint": fingerprint(x_nd),
        "items": dataset.num_items,
        "extended": [
            *ids.manifest.get("extended", ()),
            {"from": ids.fingerprint, "known": int(fixed.sum()), "new": int((~fixed).sum())},
        ],
    }
    grown = SemanticIds(sids, ids.codebooks, manifest, nearest, _plain_ids(dataset))
    report = make_report(grown, x_nd, wanted[:, : len(ids.codebooks)], dataset)
    manifest["quality"] = report["quality"]["stored"]
    return Tokenizer(grown, report, tokenizer.encoder, tokenizer.aligner, x_nd)
