"""Items and users of a run by id, by words and by likeness.

A run serves the data set and semantic IDs that it was trained on, until `publish` names newer ones
in `catalogue.json` of the run folder: a grown catalogue under the same codebooks
(`experiments.tokenize --extend`), newer histories, or both.
"""

import dataclasses
import functools
import json
import pathlib

import numpy as np
import polars as pl

from onerec_jax.data.lifelong import Snapshots
from onerec_jax.data.schema import load_dataset
from onerec_jax.errors import InputError
from onerec_jax.files import read_json, write_text
from onerec_jax.run import Run
from onerec_jax.serving.questions import Ids
from onerec_jax.tokenizer.semantic_ids import SemanticIds

CATALOGUE = "catalogue.json"


class IdIndex(Ids):
    """Rows of a sorted column of ids, int64 or string."""

    def __init__(self, ids: pl.Series, what: str):
        self._ids = ids
        super().__init__(ids.to_numpy() if ids.dtype == pl.Int64 else ids.to_list(), what)

    def like(self, prefix: str, limit: int) -> list[int | str]:
        """At most `limit` ids that begin with the prefix, in order."""
        texts = self._ids.cast(pl.String) if self._integers else self._ids
        return self._ids.filter(texts.str.starts_with(prefix)).head(limit).to_list()


class Catalogue:
    """What can be asked of the items and users of a run without the model."""

    def __init__(self, run: Run):
        self.run = run
        self.items = IdIndex(run.dataset.items["item_id"], "item")
        self.users = IdIndex(run.dataset.users["user_id"], "user")
        columns = run.dataset.items.columns
        self._titles = run.dataset.items["title"] if "title" in columns else None

    def title(self, row: int) -> str:
        """For display."""
        title = None if self._titles is None else self._titles[int(row)]
        return title or f"item {self.items[row]}"

    def describe(self, row: int) -> dict:
        """Id, title and semantic ID of an item."""
        return {
            "item_id": self.items[row],
            "title": self.title(row),
            "semantic_id": self.run.ids.sids[int(row)].tolist(),
        }

    def details(self, row: int) -> dict:
        """The same with the columns of the items table that describe it, and its popularity."""
        table = self.run.dataset.items
        names = ("brand", "author_id", "tags", "duration_s", "text")
        known = [name for name in names if name in table.columns]
        values = dict(zip(known, table[int(row), known].row(0), strict=True)) if known else {}
        return self.describe(row) | values | {"training_actions": int(self.run.popularity[row])}

    def history(self, user: int) -> np.ndarray:
        """Item rows of a user's whole log, oldest first."""
        first, end = self.run.dataset.offsets[user : user + 2]
        return self.run.dataset.item_rows[first:end]

    @functools.cached_property
    def _lower(self) -> pl.Series:
        ids = self.run.dataset.items["item_id"].cast(pl.String)
        return ids if self._titles is None else self._titles.fill_null(ids).str.to_lowercase()

    def search(self, words: str, limit: int) -> np.ndarray:
        """Rows of the items whose title has all words, the most popular first."""
        found = pl.Series([True]).new_from_index(0, len(self.items))
        for word in words.lower().split():
            found &= self._lower.str.contains(word, literal=True)
        rows = np.flatnonzero(found.to_numpy())
        return rows[np.argsort(self.run.tie_order[rows])][:limit]

    @functools.cached_property
    def _author_rows(self) -> tuple[IdIndex, np.ndarray, np.ndarray]:
        """Authors, and the items of each as a CSR list."""
        if "author_id" not in self.run.dataset.items.columns:
            raise InputError("this data set has no authors: exclude items instead")
        authors = self.run.dataset.items["author_id"]
        authors = authors.cast(pl.Int64 if authors.dtype.is_integer() else pl.String)
        known = authors.drop_nulls().unique().sort()
        index = IdIndex(known, "author")
        row = authors.replace_strict(
            known, pl.Series(np.arange(len(known))), default=len(known), return_dtype=pl.Int64
        ).to_numpy()
        items = np.argsort(row, kind="stable").astype(np.int32)
        return index, np.searchsorted(row[items], np.arange(len(known) + 1)), items

    def of_authors(self, authors) -> np.ndarray:
        """Rows of all items of the given authors, int32.

        Raises:
          UnknownId: no item has such an author; InputError: the data set has no authors.
        """
        if not len(authors):
            return np.zeros(0, np.int32)
        index, offsets, items = self._author_rows
        rows = index.rows(authors)
        return np.concatenate([items[offsets[row] : offsets[row + 1]] for row in rows])

    @functools.cached_property
    def _codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes of the content, int32 `[I, levels]`, and norms of the vectors they stand for."""
        ids = self.run.ids
        codes = ids.sids if ids.codes is None else ids.codes
        codes = codes[:, : len(ids.codebooks)]
        norms = np.empty(len(codes), np.float32)
        for start in range(0, len(codes), 65_536):
            block = codes[start : start + 65_536]
            vectors = sum(book[block[:, level]] for level, book in enumerate(ids.codebooks))
            norms[start : start + 65_536] = np.linalg.norm(vectors, axis=1)
        return codes, norms

    def similar(self, row: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The items whose content is most like an item's.

        Likeness is the cosine of the vectors that the codes stand for (sums of codebook centres,
        `SemanticIds.vectors`). The products with all centres are summed by code, so that no table
        of all vectors is needed. Equal ones come by popularity.

        Returns:
          Item rows int32 and cosines float32, at most n, the item itself left out.
        """
        codes, norms = self._codes
        books = self.run.ids.codebooks
        query = sum(book[codes[row, level]] for level, book in enumerate(books))
        product = sum((book @ query)[codes[:, level]] for level, book in enumerate(books))
        cosine = product / np.maximum(norms * np.linalg.norm(query), 1e-12)
        cosine[row] = -np.inf
        n = min(n, len(cosine) - 1)
        if n < 1:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        least = np.partition(cosine, -n)[-n]
        rows = np.flatnonzero(cosine >= least)
        rows = rows[np.lexsort((self.run.tie_order[rows], -cosine[rows]))][:n]
        return rows.astype(np.int32), cosine[rows]


def open_for_serving(folder) -> Run:
    """`Run.open` with the catalogue that was published for it, if one was.

    Raises:
      InputError: no run there, or the catalogue has changed since or does not fit.
    """
    run = Run.open(folder)
    path = run.folder / CATALOGUE
    if not path.exists():
        return run
    names = read_json(path)
    try:
        parts = {part: names[part] for part in ("data", "semantic_ids")}
        found = _with_catalogue(
            run,
            *(parts[part]["folder"] for part in parts),
            (names.get("lifelong") or {}).get("folder"),
        )
        for part, now in (("data", found.dataset), ("semantic_ids", found.ids)):
            if now.fingerprint != parts[part]["fingerprint"]:
                raise InputError(
                    f"{parts[part]['folder']} has changed since it was published for {folder}: "
                    "publish it again"
                )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}): publish the catalogue again") from error
    return found


def publish(folder, data, semantic_ids, lifelong=None) -> Run:
    """Makes a run serve another data set and semantic IDs; servers of the run take them up.

    Args:
      folder: run folder.
      data: from `experiments.prepare`.
      semantic_ids: of that data set, under the codebooks that the run was trained with.
      lifelong: snapshots of that data set, for runs that use them.

    Raises:
      InputError: they do not fit the run or each other.
    """
    run = _with_catalogue(Run.open(folder), data, semantic_ids, lifelong)
    named = {"data": (data, run.dataset), "semantic_ids": (semantic_ids, run.ids)}
    if lifelong is not None:
        named["lifelong"] = (lifelong, run.snapshots)
    parts = {
        name: {"folder": str(pathlib.Path(where).resolve()), "fingerprint": part.fingerprint}
        for name, (where, part) in named.items()
    }
    write_text(run.folder / CATALOGUE, json.dumps(parts, indent=1))
    return run


def _with_catalogue(run: Run, data, semantic_ids, lifelong) -> Run:
    dataset, ids = load_dataset(data), SemanticIds.load(pathlib.Path(semantic_ids))
    if not np.array_equal(ids.codebooks, run.ids.codebooks) or ids.levels != run.ids.levels:
        raise InputError(
            f"{semantic_ids} has other codebooks than those that {run.folder} was trained with: "
            "extend the run's with `python -m experiments.tokenize --extend`, or train again"
        )
    if ids.manifest.get("dataset_fingerprint") != dataset.fingerprint:
        raise InputError(
            f"{semantic_ids} holds no semantic IDs of the items in {data}: make them with "
            "`python -m experiments.tokenize --extend`"
        )
    for table in ("items", "users", "interactions"):
        missing = set(getattr(run.dataset, table).columns) - set(getattr(dataset, table).columns)
        if missing:
            raise InputError(
                f"{data}/{table}.parquet lacks the column {min(missing)} of the data set that "
                f"{run.folder} was trained on: prepare it from the same source"
            )
    old, new = run.dataset.items["item_id"], dataset.items["item_id"]
    if run.model_config.history_item == "item" and not old.equals(new):
        raise InputError(
            f"{run.folder} knows items by embeddings of their own, and {data} has other items: "
            "train again"
        )
    snapshots = None
    if run.spec.clustered:
        if lifelong is None:
            raise InputError(
                f"{run.folder} reads compressed lives: make those of {data} with "
                "`python -m experiments.compress` and name them too"
            )
        snapshots = Snapshots.load(pathlib.Path(lifelong), dataset)
    return dataclasses.replace(
        run, dataset=dataset, ids=ids, snapshots=snapshots, trained_on=run.dataset
    )
