"""Random users as a large platform would have them, for benchmarks: popularity follows a law."""

import numpy as np

from onerec_jax.config import ModelConfig
from onerec_jax.inputs import TIME_BUCKETS, Batch, FeatureSpec, Pathway, StaticFeature

LABELS = ("click", "like", "follow", "comment", "forward", "hate", "long_view", "profile_enter")
TAGS_PER_ITEM = 4


def large_spec(*, items: int, authors: int, tags: int, codebook_size: int) -> FeatureSpec:
    """All seven interaction features, clusters, and a hashed user id."""
    return FeatureSpec(
        num_items=items,
        levels=3,
        codebook_size=codebook_size,
        tags=tuple(map(str, range(tags))),
        tags_per_item=TAGS_PER_ITEM,
        num_authors=authors,
        has_time=True,
        has_playtime=True,
        has_duration=True,
        labels=LABELS,
        clustered=True,
        static=(StaticFeature("user_id", "hash", 65_536),),
    )


def popular(rng, size, shape) -> np.ndarray:
    """Int32 rows below `size`: row r comes about as often as 1 / (r + 1), rows shuffled by hash."""
    rank = np.floor(np.exp(rng.random(shape) * np.log(size + 1))).astype(np.int64) - 1
    return (np.minimum(rank, size - 1) * 2_654_435_761 % size).astype(np.int32)


def lengths_of(kind: str, cfg: ModelConfig, users: int, rng) -> dict[str, np.ndarray]:
    """Lengths of the three histories of each user, int32.

    "full": every slot holds an action. "realistic": the number of actions of a life is log-normal
    (median 800, sigma 1.5); 3 in 10 are positive; lives up to the pathway's slots are held as they
    are.
    """
    if kind == "full":
        life = np.full(users, 10**6)
    else:
        life = np.ceil(np.exp(rng.normal(np.log(800), 1.5, users))).astype(np.int64)
    return {
        "short": np.minimum(life, cfg.slots("short")).astype(np.int32),
        "positive": np.minimum(life * 3 // 10, cfg.slots("positive")).astype(np.int32),
        "lifelong": np.minimum(life, cfg.slots("lifelong")).astype(np.int32),
    }


def random_users(
    cfg: ModelConfig, spec: FeatureSpec, users: int, *, targets=1, lengths="full", seed=0
) -> Batch:
    """A batch of users; entries past a length are zero, as the pipeline makes them."""
    rng = np.random.default_rng(seed)

    def pathway(name, length) -> Pathway:
        shape = (users, cfg.slots(name))
        valid = np.arange(shape[1]) < length[:, None]

        def fill(values, dtype=np.int32):
            mask = valid.reshape(*valid.shape, *(1,) * (values.ndim - 2))
            return np.where(mask, values, 0).astype(dtype)

        def bucket():
            return fill(rng.integers(1, TIME_BUCKETS, shape))

        codes = popular(rng, spec.codebook_size, (*shape, spec.levels))
        return Pathway(
            length=length,
            sid=fill(codes),
            item=fill(popular(rng, spec.num_items, shape)),
            tags=fill(1 + popular(rng, len(spec.tags), (*shape, spec.tags_per_item))),
            author=fill(1 + popular(rng, spec.num_authors, shape)),
            age=bucket(),
            playtime=bucket(),
            duration=bucket(),
            label=fill(rng.integers(2, size=(*shape, len(spec.labels))), np.uint8),
            count=bucket() if name == "lifelong" else None,
        )

    pathways = {k: pathway(k, v) for k, v in lengths_of(lengths, cfg, users, rng).items()}
    return Batch(
        static=rng.integers(1, 65_537, (users, 1)).astype(np.int32),
        target=popular(rng, spec.codebook_size, (users, targets, spec.levels)),
        target_count=np.full(users, targets, np.int32),
        **pathways,
    )
