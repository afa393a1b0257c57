"""A run as files that serve without it: StableHLO of the search, weights, trie, items.

See `onerec_jax.serving.exported` for the reader and the layout of the folder.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Literal

import jax
import numpy as np
import polars as pl

from onerec_jax.data.actions import ACTION_COLUMNS
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.files import atomic_folder
from onerec_jax.generation.beam import beam_search
from onerec_jax.generation.filters import Filter
from onerec_jax.generation.generator import compute_copy
from onerec_jax.models.onerec import OneRec
from onerec_jax.serving.exported import FORMAT, pack_texts
from onerec_jax.serving.recommender import Recommender


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Shapes and platforms of the exported search."""

    users: tuple[int, ...] = (1, 32)
    """Numbers of users of a batch."""
    widths: tuple[int, ...] = (64,)
    """Beam widths."""
    filter_size: int = 1024
    """Items that the search itself leaves out or is confined to."""
    platforms: tuple[Literal["cpu", "cuda", "tpu"], ...] = ("cpu", "cuda")
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the products. One program serves all platforms, so that "auto" cannot choose."""

    def __post_init__(self):
        require_at_least(self, "", filter_size=1)
        for name in ("users", "widths"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: give positive numbers")
        if not self.platforms:
            raise InputError("--platforms names none: give cpu, cuda or both")


def named(tree) -> dict[str, jax.Array]:
    """Leaves of a tree by their path, "short/sid"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def export_run(recommender: Recommender, folder, config: ExportConfig) -> None:
    """Writes the folder; it appears whole or not at all.

    Raises:
      InputError: the folder exists, or flatbuffers is missing.
    """
    folder = pathlib.Path(folder)
    if folder.exists():
        raise InputError(f"--out {folder} exists: remove it or give another folder")
    try:
        from jax import export

        export.export(jax.jit(lambda x: x), platforms=config.platforms)(1.0).serialize()
    except ImportError as error:
        raise InputError("to export, pip install flatbuffers") from error
    run = recommender.run
    cfg = dataclasses.replace(run.model_config, compute_dtype=config.dtype, attention="xla")
    model = OneRec(cfg, run.spec)
    variables = compute_copy(model, recommender.variables)
    trie = recommender.generator.trie
    batch, _ = recommender.gather([recommender.query([])])
    like = variables, trie, batch

    def search(width):
        def call(weights, trie, batch, filter):
            variables, trie, batch = (
                jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in named(tree)])
                for tree, leaves in zip(like, (weights, trie, batch), strict=True)
            )
            beams = beam_search(
                model, variables, batch, width=width, trie=trie, filter=Filter(**filter)
            )
            return {"leaf": beams.leaf, "logp": beams.logp}

        return jax.jit(call)

    with atomic_folder(folder) as tmp:
        arrays = {"weights": named(variables), "trie": named(trie), "items": _items(recommender)}
        for name, table in arrays.items():
            table = {key: np.asarray(x) for key, x in table.items()}
            if name == "weights":  # bfloat16 is not NumPy's
                table = {key: x.astype(np.float32) for key, x in table.items()}
            np.savez(tmp / f"{name}.npz", **table)
        programs = {}
        for users in sorted(set(config.users)):
            nodes = np.zeros((users, run.spec.levels, config.filter_size), np.int32)
            filter = {"parent": nodes, "code": nodes, "keep": np.zeros(users, bool)}
            many = {key: np.repeat(x, users, axis=0) for key, x in named(batch).items()}
            for width in sorted(set(config.widths)):
                name = f"search-{users}x{width}.jaxexport"
                made = export.export(search(width), platforms=config.platforms)(
                    named(variables), named(trie), many, filter
                )
                (tmp / name).write_bytes(made.serialize())
                programs[name] = [users, width]
        manifest = {
            "format": FORMAT,
            "jax": jax.__version__,
            "platforms": list(config.platforms),
            "run": str(run.folder),
            "step": recommender.step,
            "data": run.dataset.fingerprint,
            "semantic_ids": run.ids.fingerprint,
            "spec": json.loads(run.spec.to_json()),
            "model": dataclasses.asdict(cfg),
            "slots": {name: cfg.slots(name) for name in ("short", "positive", "lifelong")},
            "action_columns": [
                name
                for name in ACTION_COLUMNS
                if name in run.dataset.interactions.columns and name != "time_s"
            ],
            "weights": {key: x.dtype.name for key, x in named(variables).items()},
            "batch": list(named(batch)),
            "filter_size": config.filter_size,
            "programs": programs,
            "files": {},
        }
        for path in sorted(tmp.iterdir()):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            manifest["files"][path.name] = digest
        (tmp / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _items(recommender: Recommender) -> dict[str, np.ndarray]:
    """The item table: ids, titles, codes, features, and the items of each leaf."""
    run, features = recommender.run, recommender.builder.items
    ids = run.dataset.items["item_id"]
    titles = [recommender.catalogue.title(row) for row in range(len(ids))]
    table = {
        "sid": run.ids.sids,
        "leaf": run.ids.leaf_of_item,
        "leaf_offsets": recommender.generator.offsets,
        "by_leaf": recommender.generator.items,
        "tags": features.tags,
        "author": features.author,
        "duration": features.duration,
    }
    table["title_bytes"], table["title_offsets"] = pack_texts(titles)
    if ids.dtype == pl.Int64:
        table["id"] = ids.to_numpy()
    else:
        table["id_bytes"], table["id_offsets"] = pack_texts(ids.to_list())
    if "duration_s" in run.dataset.items.columns:
        seconds = run.dataset.items["duration_s"].cast(pl.Float64).fill_null(np.nan)
        table["duration_s"] = seconds.to_numpy()
    return {name: x for name, x in table.items() if x is not None}
