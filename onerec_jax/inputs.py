"""What the model sees: the feature specification of a run, and one batch of examples.

Both are plain values. Training, evaluation and serving read the same `FeatureSpec` from the run
folder, so that they cannot disagree on a vocabulary or a bucket.
"""

import dataclasses
import json
from typing import Literal

import jax
from flax import struct

from onerec_jax.errors import require_at_least

TIME_BUCKETS = 64
"""Buckets of ages and durations; bucket 0 is "unknown" and contributes nothing."""


@dataclasses.dataclass(frozen=True)
class PositiveRule:
    """Which actions enter the positive-feedback pathway (OneRec V0: watched or interacted with).

    An action is positive if any clause holds whose column the data set has. Without any of these
    columns an action (a purchase, a review) is positive by itself.
    """

    min_rating: float = 4.0
    min_watch_ratio: float = 0.8
    """playtime_s / duration_s from which a video counts as watched."""
    actions: tuple[str, ...] = ("long_view", "like", "follow", "comment", "forward")


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """How columns of many values become embeddings of bounded size."""

    max_words: int = 256
    """A static column with at most so many distinct values gets one embedding each. Above, numbers
    go to logarithmic buckets and everything else is hashed."""
    hash_buckets: int = 65_536
    """Buckets of a hashed column (CRC-32 of the value's text)."""
    user_id: bool = True
    """Take the user's id as a static feature, as the report does (uid)."""

    def __post_init__(self):
        require_at_least(self, "features.", max_words=1, hash_buckets=1)


@dataclasses.dataclass(frozen=True)
class StaticFeature:
    """One static user feature: index 0 is unknown, 1 to `size` are values, buckets or hashes."""

    name: str
    kind: Literal["words", "log", "hash"]
    size: int
    words: tuple[str, ...] = ()
    """Value i has index i + 1; of kind "words" only."""


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """Vocabulary sizes of one data set under one tokenizer. A feature it lacks has size 0."""

    num_items: int
    levels: int
    codebook_size: int
    tags: tuple[str, ...] = ()
    """Tag vocabulary; tag i has index i + 1, 0 is padding."""
    tags_per_item: int = 0
    num_authors: int = 0
    authors_hashed: bool = False
    has_time: bool = False
    has_playtime: bool = False
    has_duration: bool = False
    labels: tuple[str, ...] = ()
    """Bits of the multi-hot label: feedback columns and rating values."""
    clustered: bool = False
    """The lifelong pathway holds clusters of actions with member counts, not single actions."""
    static: tuple[StaticFeature, ...] = ()
    positive: PositiveRule = PositiveRule()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "FeatureSpec":
        values = json.loads(text)
        positive = values.pop("positive")
        positive["actions"] = tuple(positive["actions"])
        values["tags"], values["labels"] = tuple(values["tags"]), tuple(values["labels"])
        values["static"] = tuple(
            StaticFeature(**{**feature, "words": tuple(feature["words"])})
            for feature in values["static"]
        )
        return cls(**values, positive=PositiveRule(**positive))


@struct.dataclass
class Pathway:
    """Interactions of B users, latest first, valid entries before padding.

    A feature that the data set lacks is None.
    """

    length: jax.Array  # int32 [B]
    sid: jax.Array  # int32 [B, T, levels], semantic ID
    item: jax.Array  # int32 [B, T], item row
    tags: jax.Array | None = None  # int32 [B, T, tags_per_item], 0 = padding
    author: jax.Array | None = None  # int32 [B, T], 0 = unknown
    age: jax.Array | None = None  # int32 [B, T], log bucket of request time - action time
    playtime: jax.Array | None = None  # int32 [B, T], log bucket of seconds
    duration: jax.Array | None = None  # int32 [B, T], log bucket of seconds
    label: jax.Array | None = None  # uint8 [B, T, labels], multi-hot
    count: jax.Array | None = None  # int32 [B, T], log bucket of a cluster's members


@struct.dataclass
class Batch:
    """The four pathways of B users and the M things they did next.

    A pathway of which no user of the batch has anything may come with T = 0 slots.
    """

    static: jax.Array  # int32 [B, static features]; bucket 0 = unknown
    short: Pathway
    positive: Pathway
    lifelong: Pathway
    target: jax.Array  # int32 [B, M, levels], semantic IDs of the next items, in order
    target_count: jax.Array  # int32 [B]; slots beyond repeat the real ones and bear no loss


@struct.dataclass
class RewardBatch:
    """One history of each of B users and M items to be judged after parts of it.

    History entry 0 is the newest. Item m is judged as if only the entries from `hidden[m]` on had
    happened: exposures of one stretch of a log see what lies before each of them, candidates for
    one request (hidden 0) see everything, and all share one pass over the history.
    """

    static: jax.Array  # int32 [B, static features]; bucket 0 = unknown
    history: Pathway
    seconds: jax.Array | None  # int32 [B, T], from each action to the request; None without times
    target: Pathway  # the M items; no playtime and no labels
    hidden: jax.Array  # int32 [B, M], newest entries that an item must not see
    since: jax.Array  # int32 [B, M], seconds from the time that an item is judged at to the request
    label: jax.Array  # int8 [B, M, objectives], 0 or 1; -1: unknown or no exposure
    session_label: jax.Array | None = None  # int8 [B, W, heads], of lists of M / W items each
