"""Amazon review sequences in the files that the benchmarks of generative retrieval pass around.

`NAME.txt` holds `user item item …` a line, oldest item first; a user's further lines continue
the first. `NAME.item.json` (or .gz) beside it holds `{item id: {title, brand, …}}`. There are no
times, so there is no `time_s`.

The two files often disagree by one, because one preparation numbers items from 1 and the other
from 0. The rule: if the JSON's ids are exactly the sequences' ids minus one, they are shifted
up, and dataset.json says so under `item_ids`; otherwise each id means the same in both files.
"""

import collections
import itertools
import pathlib
from typing import Any

import polars as pl

from onerec_jax.data.schema import Dataset, build_dataset
from onerec_jax.data.sources import clean, join_text, plain_ids, read_json, read_text
from onerec_jax.errors import InputError

LICENCE = (
    "Amazon product data (J. McAuley et al.), for research use; the sequence files come from "
    "public repositories that mostly state no licence of their own"
)
JSON_ENDINGS = (".item.json", ".item.json.gz")


def read_amazon(path: pathlib.Path, *, split: str = "leave-one-out") -> Dataset:
    """Sequences and item texts of one Amazon category.

    Items have `title`, `brand`, `description` (each absent if no item has one, null where one
    item lacks it), `tags` (parts of the category path) and `text` (title, brand, tags and
    description joined). HTML entities are unescaped; the brand "Unknown" counts as none.

    Args:
      path: `NAME.txt`, or a folder with exactly one `NAME.txt` beside its `NAME.item.json[.gz]`.
      split: "leave-one-out"; "time" is refused later, as there are no times.

    Raises:
      InputError: file missing or damaged, or item ids that do not fit together.
    """
    sequence_path, item_path = _find_pair(path)
    sequences = _read_sequences(sequence_path)
    fields = _read_items(item_path)
    used, known = plain_ids(
        sequences["item_id"].unique(maintain_order=True), pl.Series("item_id", list(fields))
    )
    shift = _shift(used, known, sequence_path, item_path, sequences)
    known = known + 1 if shift else known
    return build_dataset(
        sequence_path.stem,
        _item_table(known, list(fields.values())),
        None,
        sequences.select(
            plain_ids(sequences["user_id"])[0], sequences["item_id"].cast(known.dtype)
        ),
        meta={
            "source": "amazon",
            "origin": f"{sequence_path.resolve()} and {item_path.name}",
            "licence": LICENCE,
            "item_ids": f"those of {sequence_path.name}"
            + (f", {item_path.name} plus one" if shift else ""),
        },
        split=split,
        items_file=str(item_path),
        interactions_file=str(sequence_path),
    )


def _find_pair(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The sequence file and its item file."""
    if not path.exists():
        raise InputError(f"--path {path}: no such file or folder; give NAME.txt or its folder")
    texts = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    pairs = [
        (text, item)
        for text in texts
        for item in (text.with_name(text.stem + ending) for ending in JSON_ENDINGS)
        if item.is_file()
    ]
    if path.is_file() and not pairs:
        raise InputError(f"{path}: {path.stem}.item.json[.gz] must lie beside it, with item texts")
    if len({text for text, _ in pairs}) != 1:
        names = ", ".join(sorted({text.name for text, _ in pairs})) or "none"
        raise InputError(
            f"--path {path}: must hold one NAME.txt with NAME.item.json[.gz], found {names}; "
            "give the NAME.txt itself"
        )
    return pairs[0]


def _read_sequences(path: pathlib.Path) -> pl.DataFrame:
    """`user_id`, `item_id` (strings) and `line` (from 1), in file order."""
    users, items, lines = [], [], []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        user, *sequence = line.split() or [None]
        if user is None:
            continue
        if not sequence:
            raise InputError(f"{path}, line {number}: user {user} has no items; remove the line")
        users.extend(itertools.repeat(user, len(sequence)))
        items.extend(sequence)
        lines.extend(itertools.repeat(number, len(sequence)))
    if not items:
        raise InputError(f"{path}: holds no sequences; a line reads 'user item item …'")
    return pl.DataFrame({"user_id": users, "item_id": items, "line": lines})


def _read_items(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Item id (string) -> fields."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # json keeps the last of equal keys without a word; a doubled item is a mistake.
        fields = dict(pairs)
        if len(fields) < len(pairs):
            (double, _), *_ = collections.Counter(key for key, _ in pairs).most_common(1)
            raise InputError(f"{path}: '{double}' is a duplicate id; keep one of them")
        return fields

    items = read_json(path, refuse_duplicates)
    if not isinstance(items, dict) or not all(isinstance(item, dict) for item in items.values()):
        raise InputError(f"{path}: expected {{item id: {{title, brand, …}}}}; check the file")
    if not items:
        raise InputError(f"{path}: holds no items; give the item texts of the sequences")
    return items


def _shift(
    used: pl.Series,
    known: pl.Series,
    sequence_path: pathlib.Path,
    item_path: pathlib.Path,
    sequences: pl.DataFrame,
) -> bool:
    """Whether the item file's ids are the sequences' minus one; False if they are the same.

    Raises:
      InputError: an id has no item, or the item file would fit both ways.
    """
    known_ids = set(known)
    down = {item - 1 for item in used} if used.dtype == pl.Int64 else None
    if down == known_ids:
        return True
    if unknown := [item for item in used if item not in known_ids]:
        line = sequences.filter(pl.col("item_id") == str(unknown[0]))["line"][0]
        raise InputError(
            f"{sequence_path}, line {line}: item {unknown[0]} has no row in {item_path} (nor has "
            f"it with all ids less one; {len(unknown)} such items); add it or remove it"
        )
    if down is not None and len(used) < len(known_ids) and down <= known_ids:
        raise InputError(
            f"{item_path}: its ids fit those of {sequence_path.name} both as they are and less "
            "one; remove the items that no sequence has"
        )
    return False


def _item_table(ids: pl.Series, items: list[dict[str, Any]]) -> pl.DataFrame:
    """item_id and the text columns of which at least one item has something."""
    columns: dict[str, list] = {
        field: [_words(item.get(field)) for item in items]
        for field in ("title", "brand", "description")
    }
    columns["brand"] = ["" if brand == "Unknown" else brand for brand in columns["brand"]]
    tags = [_tags(item.get("categories")) for item in items]
    joined = zip(columns["title"], columns["brand"], tags, columns["description"], strict=True)
    text = [join_text(title, brand, ", ".join(tag), rest) for title, brand, tag, rest in joined]

    table = pl.DataFrame({"item_id": ids})
    for field, values in columns.items():
        if any(values):
            table = table.with_columns(pl.Series(field, [value or None for value in values]))
    if any(text):
        table = table.with_columns(pl.Series("text", text))
    if any(tags):
        table = table.with_columns(pl.Series("tags", tags, dtype=pl.List(pl.String)))
    return table


def _words(value: Any) -> str:
    """A field as one clean string; lists, however nested, are joined by spaces."""
    if isinstance(value, list):
        return " ".join(filter(None, map(_words, value)))
    return clean(value)


def _tags(value: Any) -> list[str]:
    """Parts of a category path: a comma-separated string, or a list of parts or of paths."""
    if isinstance(value, list):
        parts = [
            part for entry in value for part in (entry if isinstance(entry, list) else [entry])
        ]
    else:
        parts = str(value or "").split(",")
    # Several paths of one item share their root; a tag counts once.
    return list(dict.fromkeys(filter(None, map(clean, parts))))
