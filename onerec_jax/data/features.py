"""Tables to model features: the vocabulary of a run, and arrays ready to be gathered.

OneRec Technical Report (arXiv 2506.13695), section 2.2.1: seven features an interaction (item,
author, tag, time, playtime, duration, label) and static user features. The report gives no
encodings. Ours:

- age (request time minus action time): two buckets an octave of seconds, `log_bucket`;
- playtime, duration: four buckets an octave of seconds;
- label: one bit a feedback column and rating value, no bit for what is unknown;
- static features: one embedding a value, logarithmic buckets for numbers of many values, hashes for
  words of many values (`FeatureConfig`).

Bucket or index 0 is "unknown" and contributes nothing. A feature whose column is missing is left
out.
"""

import dataclasses
import zlib

import numpy as np
import polars as pl

from onerec_jax.data.lifelong import Snapshots, find_snapshot
from onerec_jax.data.schema import FEEDBACK, Dataset
from onerec_jax.data.splits import Split, train_mask
from onerec_jax.errors import InputError
from onerec_jax.inputs import (
    TIME_BUCKETS,
    FeatureConfig,
    FeatureSpec,
    PositiveRule,
    StaticFeature,
)
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


def _hashed(values: pl.Series, buckets: int) -> np.ndarray:
    """`1 + CRC-32 of each value's text, modulo buckets`; 0 where it is null. Int32 `[n]`."""
    texts = values.cast(pl.String)
    code = {
        text: 1 + zlib.crc32(text.encode()) % buckets for text in texts.drop_nulls().unique()
    } | {None: 0}
    return np.array([code[text] for text in texts.to_list()], np.int32)


def _static_feature(values: pl.Series, config: FeatureConfig) -> StaticFeature:
    """How a column of the users table becomes an index."""
    if values.n_unique() <= config.max_words + (values.null_count() > 0):
        words = _vocabulary(values)
        return StaticFeature(values.name, "words", len(words), words)
    if values.dtype.is_numeric() and values.name != "user_id":
        return StaticFeature(values.name, "log", TIME_BUCKETS - 1)
    return StaticFeature(values.name, "hash", config.hash_buckets)


def _static_index(values: pl.Series, feature: StaticFeature) -> np.ndarray:
    """Index of each value under `feature`, int32 `[n]`."""
    if feature.kind == "words":
        return _index(values, feature.words)
    if feature.kind == "hash":
        return _hashed(values, feature.size)
    return log_bucket(values.cast(pl.Float64).fill_null(np.nan).to_numpy())


def build_feature_spec(
    dataset: Dataset,
    split: Split,
    ids: SemanticIds,
    positive: PositiveRule,
    config: FeatureConfig = FeatureConfig(),  # noqa: B008 (a frozen value)
    *,
    clustered: bool = False,
) -> FeatureSpec:
    """Collects the vocabularies of a data set.

    What the log says (rating values) comes from its training part; what the tables say of items and
    users (tags, authors, static features) is known before any action and comes from all rows.

    Args:
      clustered: the lifelong pathway will hold clusters.
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
    num_authors, authors_hashed = 0, False
    if "author_id" in dataset.items.columns:
        num_authors = len(_vocabulary(dataset.items["author_id"]))
        authors_hashed = num_authors > config.hash_buckets
        num_authors = min(num_authors, config.hash_buckets)
    left_out = {"user_row"} | ({"user_id"} if not config.user_id else set())
    static = tuple(
        _static_feature(dataset.users[name], config)
        for name in dataset.users.columns
        if name not in left_out
    )
    return FeatureSpec(
        num_items=dataset.num_items,
        levels=ids.levels,
        codebook_size=ids.codebook_size,
        tags=tags if tags_per_item else (),
        tags_per_item=tags_per_item,
        num_authors=num_authors,
        authors_hashed=authors_hashed,
        has_time="time_s" in columns,
        has_playtime="playtime_s" in columns,
        has_duration=item_durations(dataset, split) is not None,
        labels=tuple(labels),
        clustered=clustered,
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
    positive_rows: np.ndarray  # int64 [P], rows of positive actions, ascending
    time_s: np.ndarray | None  # int64 [N]
    playtime: np.ndarray | None  # uint8 [N], log bucket
    label: np.ndarray | None  # uint8 [N, labels]
    static: np.ndarray  # int32 [U, static features]


def item_features(
    dataset: Dataset,
    split: Split,
    ids: SemanticIds,
    spec: FeatureSpec,
    trained_on: Dataset | None = None,
) -> ItemFeatures:
    """Arrays of item features for `spec`.

    Args:
      trained_on: the data set that `spec` was collected from, if it is another one.
    """
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
        if spec.authors_hashed:
            author = _hashed(authors, spec.num_authors)
        else:
            known = dataset if trained_on is None else trained_on
            author = _index(authors, _vocabulary(known.items["author_id"]))
    if spec.has_duration:
        duration = log_bucket(item_durations(dataset, split), 4)
    return ItemFeatures(ids.sids, tags, author, duration)


def action_log(dataset: Dataset, spec: FeatureSpec) -> ActionLog:
    """Arrays of action features for `spec`."""
    label = None
    if spec.labels:
        label = np.zeros((len(dataset.item_rows), len(spec.labels)), np.uint8)
        for bit, name in enumerate(spec.labels):
            if name.startswith("rating="):
                value = np.float32(name.removeprefix("rating="))
                label[:, bit] = dataset.column("rating") == value
            else:
                label[:, bit] = dataset.column(name) > 0
    playtime = None
    if spec.has_playtime:
        playtime = log_bucket(dataset.column("playtime_s"), 4).astype(np.uint8)
    return ActionLog(
        offsets=dataset.offsets,
        item=dataset.item_rows,
        positive_rows=np.flatnonzero(positive_actions(dataset, spec.positive)),
        time_s=dataset.column("time_s") if spec.has_time else None,
        playtime=playtime,
        label=label,
        static=static_features(dataset, spec),
    )


def static_features(dataset: Dataset, spec: FeatureSpec) -> np.ndarray:
    """Index of every user's static features for `spec`, int32 `[U, static features]`."""
    static = [_static_index(dataset.users[feature.name], feature) for feature in spec.static]
    return np.stack(static, axis=1) if static else np.zeros((dataset.num_users, 0), np.int32)


def positive_actions(dataset: Dataset, rule: PositiveRule) -> np.ndarray:
    """Which actions count as positive feedback under `rule`, bool `[N]`.

    The share watched is of the duration that the log gives with the action, else of the item's.
    """
    clauses = [
        dataset.column(name) > 0 for name in rule.actions if dataset.column(name) is not None
    ]
    if (rating := dataset.column("rating")) is not None:
        clauses.append(rating >= rule.min_rating)
    playtime, duration = dataset.column("playtime_s"), dataset.column("duration_s")
    if "duration_s" in dataset.items.columns:
        item = dataset.items["duration_s"].cast(pl.Float64).fill_null(np.nan).to_numpy()
        item = item[dataset.item_rows]
        duration = item if duration is None else np.where(duration > 0, duration, item)
    if playtime is not None and duration is not None:
        clauses.append(playtime >= rule.min_watch_ratio * np.where(duration > 0, duration, np.nan))
    if not clauses:
        return np.ones(len(dataset.item_rows), bool)
    return np.logical_or.reduce(clauses)


@dataclasses.dataclass(frozen=True, eq=False)
class LifelongLog:
    """Lives compressed to clusters, a group a snapshot (`data/lifelong.py`), with features.

    Item, author, tags and label of a cluster are those of its representative; time, playtime and
    duration are means over its members.
    """

    keys: np.ndarray  # int64 [S], ascending: user << 32 | actions that the snapshot stands for
    offsets: np.ndarray  # int64 [S + 1]; a snapshot without clusters is its actions themselves
    representative: np.ndarray  # int32 [C], position within the user
    time_s: np.ndarray | None  # int64 [C]
    playtime: np.ndarray | None  # uint8 [C], log bucket
    duration: np.ndarray | None  # uint8 [C], log bucket
    count: np.ndarray  # uint8 [C], log bucket of the number of members

    def find(self, user, position) -> np.ndarray:
        """`find_snapshot` among these."""
        return find_snapshot(self.keys, user, position)

    def covered(self, snapshot) -> np.ndarray:
        """Actions of the user that each snapshot stands for, int64."""
        return self.keys[snapshot] & 0xFFFFFFFF


SINGLE = int(log_bucket(1))
"""Bucket of a cluster of one action, `log_bucket(1)`."""


def uncompressed(log: ActionLog) -> LifelongLog:
    """Lives in which every action of a user stands for itself, for histories given by hand."""
    none = np.zeros(0, np.int64)
    return LifelongLog(
        keys=np.arange(len(log.offsets) - 1) << 32 | np.diff(log.offsets),
        offsets=np.zeros(len(log.offsets), np.int64),
        representative=none,
        time_s=none,
        playtime=none,
        duration=none,
        count=none,
    )


def lifelong_log(snapshots: Snapshots, spec: FeatureSpec) -> LifelongLog:
    """Arrays of cluster features for `spec`."""

    def buckets(values, has):
        return log_bucket(values, 4).astype(np.uint8) if has else None

    return LifelongLog(
        keys=snapshots.keys,
        offsets=snapshots.cluster_offsets,
        representative=snapshots.representative,
        time_s=snapshots.time_s if spec.has_time else None,
        playtime=buckets(snapshots.playtime_s, spec.has_playtime),
        duration=buckets(snapshots.duration_s, spec.has_duration),
        count=log_bucket(snapshots.count, 2).astype(np.uint8),
    )
