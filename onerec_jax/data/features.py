"""Tables to model features: the vocabulary of a run, and arrays ready to be gathered.

OneRec Technical Report (arXiv 2506.13695), section 2.2.1: seven features an interaction (item,
author, tag, time, playtime, duration, label). The report gives no encodings; ours are logarithmic
buckets of seconds and a multi-hot label. A feature whose column is missing is left out.
"""

import dataclasses

import numpy as np
import polars as pl

from onerec_jax.data.schema import FEEDBACK, Dataset
from onerec_jax.data.splits import Split, train_mask
from onerec_jax.errors import InputError
from onerec_jax.inputs import TIME_BUCKETS, FeatureSpec, PositiveRule
from onerec_jax.tokenizer.semantic_ids import SemanticIds

MAX_TAGS = 8
"""Tags kept of an item, the most frequent of the catalogue first."""
MAX_RATING_VALUES = 32
"""A rating column with more distinct values than this is no label."""


def log_bucket(seconds, per_octave=2.0) -> np.ndarray:
    """Bucket `1 + floor(per_octave * log2(1 + seconds))`, int32, at most TIME_BUCKETS - 1.

    Two buckets an octave reach 2^31 seconds. NaN (unknown) is bucket 0.
    """
    seconds = np.asarray(seconds, np.float64)
    bucket = 1 + np.floor(per_octave * np.log2(1 + np.maximum(seconds, 0)))
    return np.where(np.isnan(seconds), 0, np.minimum(bucket, TIME_BUCKETS - 1)).astype(np.int32)


def _vocabulary(values: pl.Series) -> tuple[str, ...]:
    """Distinct values as text, sorted."""
    return tuple(sorted(values.drop_nulls().cast(pl.String).unique().to_list()))


def _index(values: pl.Series, words: tuple[str, ...]) -> np.ndarray:
    """Place of each value in `words`, from 1; 0 where it is null or not there. Int32 `[n]`."""
    place = {word: i + 1 for i, word in enumerate(words)}
    return np.array([place.get(v, 0) for v in values.cast(pl.String).to_list()], np.int32)


def build_feature_spec(
    dataset: Dataset, split: Split, ids: SemanticIds, positive: PositiveRule
) -> FeatureSpec:
    """Collects the vocabularies of a data set.

    What the log says (rating values) comes from its training part; what the tables say of items and
    users (tags, authors, static features) is known before any action and comes from all rows.
    """
    if len(ids.sids) != dataset.num_items:
        raise InputError(
            f"the semantic IDs cover {len(ids.sids)} items, data set '{dataset.name}' has "
            f"{dataset.num_items}: run `python -m experiments.tokenize` on it"
        )
    columns = dataset.interactions.columns
    labels = [name for name in FEEDBACK if name in columns]
    if "rating" in columns:
        ratings = dataset.interactions["rating"].filter(train_mask(dataset, split)).drop_nulls()
        values = np.unique(ratings.to_numpy())
        if len(values) <= MAX_RATING_VALUES:
            # The shortest text that names this float32 and no other.
            labels += [
                f"rating={np.format_float_positional(np.float32(value), trim='-')}"
                for value in values
            ]
    tags, tags_per_item = (), 0
    if "tags" in dataset.items.columns:
        counts = dataset.items["tags"].explode().drop_nulls().value_counts(sort=True)
        tags = tuple(sorted(counts["tags"].to_list()))
        longest = dataset.items["tags"].list.len().max() or 0
        tags_per_item = int(min(longest, MAX_TAGS))
    num_authors = 0
    if "author_id" in dataset.items.columns:
        num_authors = len(_vocabulary(dataset.items["author_id"]))
    static = tuple(
        (name, _vocabulary(dataset.users[name]))
        for name in dataset.users.columns
        if name not in ("user_id", "user_row")
    )
    return FeatureSpec(
        num_items=dataset.num_items,
        levels=ids.levels,
        codebook_size=ids.codebook_size,
        tags=tags if tags_per_item else (),
        tags_per_item=tags_per_item,
        num_authors=num_authors,
        has_time="time_s" in columns,
        has_playtime="playtime_s" in columns,
        has_duration=item_durations(dataset, split) is not None,
        labels=tuple(labels),
        static=static,
        positive=positive,
    )


def item_durations(dataset: Dataset, split: Split) -> np.ndarray | None:
    """Length of every item in seconds, float64 `[I]`, NaN where unknown; None if nothing says it.

    From the items table, else the median of what the training part of the log says of the item.
    """
    if "duration_s" in dataset.items.columns:
        return dataset.items["duration_s"].cast(pl.Float64).fill_null(np.nan).to_numpy()
    if "duration_s" not in dataset.interactions.columns:
        return None
    training = dataset.interactions.filter(train_mask(dataset, split))
    logged = training.group_by("item_row").agg(pl.col("duration_s").median())
    durations = np.full(dataset.num_items, np.nan)
    durations[logged["item_row"].to_numpy()] = logged["duration_s"].fill_null(np.nan).to_numpy()
    return durations


@dataclasses.dataclass(frozen=True, eq=False)
class ItemFeatures:
    """Features by item row."""

    sid: np.ndarray  # int32 [I, levels]
    tags: np.ndarray | None  # int32 [I, tags_per_item], 0 = padding
    author: np.ndarray | None  # int32 [I], 0 = unknown
    duration: np.ndarray | None  # int32 [I], log bucket


@dataclasses.dataclass(frozen=True, eq=False)
class ActionLog:
    """Actions of many users, sorted by user and position (CSR), with features by action."""

    offsets: np.ndarray  # int64 [U + 1]
    item: np.ndarray  # int32 [N], item row
    positive: np.ndarray  # bool [N]
    time_s: np.ndarray | None  # int64 [N]
    playtime: np.ndarray | None  # int32 [N], log bucket
    label: np.ndarray | None  # uint8 [N, labels]
    static: np.ndarray  # int32 [U, static features]


def item_features(
    dataset: Dataset, split: Split, ids: SemanticIds, spec: FeatureSpec
) -> ItemFeatures:
    """Arrays of item features for `spec`."""
    tags = author = duration = None
    if spec.tags:
        tags = np.zeros((dataset.num_items, spec.tags_per_item), np.int32)
        counts = dataset.items["tags"].explode().drop_nulls().value_counts()
        frequency = dict(counts.iter_rows())
        place = {tag: i + 1 for i, tag in enumerate(spec.tags)}
        for row, words in enumerate(dataset.items["tags"].to_list()):
            words = sorted(dict.fromkeys(words or []), key=lambda tag: (-frequency[tag], tag))
            known = [place[tag] for tag in words if tag in place][: spec.tags_per_item]
            tags[row, : len(known)] = known
    if spec.num_authors:
        authors = dataset.items["author_id"]
        author = _index(authors, _vocabulary(authors))
    if spec.has_duration:
        duration = log_bucket(item_durations(dataset, split), 4)
    return ItemFeatures(ids.sids, tags, author, duration)


def action_log(dataset: Dataset, split: Split, spec: FeatureSpec) -> ActionLog:
    """Arrays of action features for `spec`."""
    label = None
    if spec.labels:
        bits = []
        for name in spec.labels:
            if name.startswith("rating="):
                bits.append(dataset.column("rating") == np.float32(name.removeprefix("rating=")))
            else:
                bits.append(dataset.column(name) > 0)
        label = np.stack(bits, axis=1).astype(np.uint8)
    static = [_index(dataset.users[name], words) for name, words in spec.static]
    return ActionLog(
        offsets=dataset.offsets,
        item=dataset.item_rows,
        positive=positive_actions(dataset, split, spec.positive),
        time_s=dataset.column("time_s") if spec.has_time else None,
        playtime=log_bucket(dataset.column("playtime_s"), 4) if spec.has_playtime else None,
        label=label,
        static=np.stack(static, axis=1) if static else np.zeros((dataset.num_users, 0), np.int32),
    )


def positive_actions(dataset: Dataset, split: Split, rule: PositiveRule) -> np.ndarray:
    """Which actions count as positive feedback under `rule`, bool `[N]`."""
    clauses = [
        dataset.column(name) > 0 for name in rule.actions if dataset.column(name) is not None
    ]
    if (rating := dataset.column("rating")) is not None:
        clauses.append(rating >= rule.min_rating)
    playtime, duration = dataset.column("playtime_s"), item_durations(dataset, split)
    if playtime is not None and duration is not None:
        known = np.where(duration > 0, duration, np.nan)[dataset.item_rows]
        clauses.append(playtime >= rule.min_watch_ratio * known)
    if not clauses:
        return np.ones(len(dataset.item_rows), bool)
    return np.logical_or.reduce(clauses)
