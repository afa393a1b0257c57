"""What the model sees: the feature specification of a run, and one batch of examples.

Both are plain values. Training, evaluation and serving read the same `FeatureSpec` from the run
folder, so that they cannot disagree on a vocabulary or a bucket.
"""

import dataclasses
import json

import jax
from flax import struct

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
class FeatureSpec:
    """Vocabulary sizes of one data set under one tokenizer. A feature it lacks has size 0."""

    num_items: int
    levels: int
    codebook_size: int
    tags: tuple[str, ...] = ()
    """Tag vocabulary; tag i has index i + 1, 0 is padding."""
    tags_per_item: int = 0
    num_authors: int = 0
    has_time: bool = False
    has_playtime: bool = False
    has_duration: bool = False
    labels: tuple[str, ...] = ()
    """Bits of the multi-hot label: feedback columns and rating values."""
    static: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Static user features, each with its vocabulary; value i has index i + 1, 0 is unknown."""
    positive: PositiveRule = PositiveRule()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "FeatureSpec":
        values = json.loads(text)
        positive = values.pop("positive")
        positive["actions"] = tuple(positive["actions"])
        values["tags"], values["labels"] = tuple(values["tags"]), tuple(values["labels"])
        values["static"] = tuple((name, tuple(words)) for name, words in values["static"])
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


@struct.dataclass
class Batch:
    """The four pathways of B users and what they did next."""

    static: jax.Array  # int32 [B, static features]; bucket 0 = unknown
    short: Pathway
    positive: Pathway
    lifelong: Pathway
    target: jax.Array  # int32 [B, levels], semantic ID of the next item
