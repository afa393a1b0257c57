"""What can be read of items and users: a noisy, nonlinear view of latents that stay hidden.

Axes: I items, U users, A authors, T topics, V words, H hidden units.
"""

import numpy as np
import polars as pl

from onerec_jax.data.sources import join_text
from onerec_jax.data.world.constants import WorldConstants
from onerec_jax.data.world.latents import (
    STATIC,
    TAG,
    TEXT,
    num_authors,
    stream,
    topic_centres,
    uniforms,
)
from onerec_jax.data.world.response import World

TITLE_WORDS = 5
STYLE_WORDS = 3
"""Words that an author likes to use, and the share of a text that is made of them."""
STYLE_SHARE = 0.15
MAX_TAGS = 3
GENDERS = ("f", "m")
AGES = ("under 18", "18-23", "24-30", "31-40", "41-49", "50+")
CITY_TIERS = 5
CHUNK = 4096
"""Items whose words are drawn at a time: the table of probabilities is [CHUNK, V]."""


def pseudo_words(number: int) -> list[str]:
    """Distinct pronounceable words of two syllables, at most 4900, the same for every world."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    n = len(syllables)
    # A step prime to n * n walks over all pairs, so that neighbours do not look alike.
    places = [i * 1_847 % (n * n) for i in range(number)]
    return [syllables[p // n] + syllables[p % n] for p in places]


def tag_words(c: WorldConstants) -> list[str]:
    """One tag a topic; tags end in a way that no word of a text does."""
    return [f"{word}st" for word in pseudo_words(c.vocabulary + c.topics)[c.vocabulary :]]


def item_table(world: World) -> pl.DataFrame:
    """`item_id`, `title`, `text`, `tags`, `author_id`, `duration_s` and `viral_farm`.

    `viral_farm` (int8) is what the platform knows and rewards may use; it is no model input.
    """
    items = world.latents.items
    words, tags = _words(world), _tags(world)
    return pl.DataFrame(
        {
            "item_id": np.arange(world.config.items),
            "title": [" ".join(w[:TITLE_WORDS]) for w in words],
            "text": [
                join_text(" ".join(w), ", ".join(t)) for w, t in zip(words, tags, strict=True)
            ],
            "tags": pl.Series(tags, dtype=pl.List(pl.String)),
            "author_id": np.asarray(items.author, np.int64),
            "duration_s": np.exp(np.asarray(items.log_duration)),
            "viral_farm": np.asarray(items.farm).astype(np.int8),
        }
    )


def user_table(world: World) -> pl.DataFrame:
    """`user_id`, `gender`, `age_band` and `city_tier`, weakly tied to interests and habits."""
    users, c = world.latents.users, world.constants
    u = np.asarray(uniforms(stream(world.config.seed, STATIC), np.arange(world.config.users), (3,)))
    first_topic = np.asarray(users.topics)[:, 0]
    # Odd topics lean to one side: 60 to 40.
    gender = (u[:, 0] < np.where(first_topic % 2 == 1, 0.6, 0.4)).astype(int)
    # The age is mostly chance and a little the taste for long videos.
    taste = (np.asarray(users.log_duration) - np.log(c.duration_median_s)) / c.duration_taste_spread
    age = np.clip((len(AGES) * (u[:, 1] + 0.06 * taste)).astype(int), 0, len(AGES) - 1)
    patience = np.asarray(users.patience) / c.patience_spread
    tier = np.clip((CITY_TIERS * (u[:, 2] + 0.06 * patience)).astype(int), 0, CITY_TIERS - 1)
    return pl.DataFrame(
        {
            "user_id": np.arange(world.config.users),
            "gender": [GENDERS[i] for i in gender],
            "age_band": [AGES[i] for i in age],
            "city_tier": (1 + tier).astype(np.int8),
        }
    )


def _words(world: World) -> list[list[str]]:
    """Words of every item: drawn from the softmax of a tanh net of the latents, in places from
    the author's style words instead."""
    c, config, items = world.constants, world.config, world.latents.items
    rng = np.random.default_rng((config.seed, TEXT))
    inputs = c.latent_dim + 2
    # Both layers keep the variance of what comes in, whatever their width.
    w_1 = 2 * rng.standard_normal((inputs, c.text_hidden))
    w_2 = rng.standard_normal((c.text_hidden, c.vocabulary)) / c.text_hidden**0.5
    common = 0.5 * rng.standard_normal(c.vocabulary)
    style = rng.integers(0, c.vocabulary, (num_authors(c, config.items), STYLE_WORDS))
    vocabulary = pseudo_words(c.vocabulary)
    z, author = np.asarray(items.z), np.asarray(items.author)
    hints = c.text_quality * np.stack([items.quality, items.catchiness], 1) / c.latent_dim**0.5

    most, texts = c.text_words_max, []
    for start in range(0, config.items, CHUNK):
        rows = np.arange(start, min(start + CHUNK, config.items))
        u = np.asarray(uniforms(stream(config.seed, TEXT), rows, (3 * most + 1,)))
        hidden = np.tanh(np.concatenate([z[rows], hints[rows]], 1) @ w_1)
        logit = c.text_sharpness * hidden @ w_2 + common
        cdf = np.cumsum(np.exp(logit - logit.max(1, keepdims=True)), axis=1)
        # One sorted array for all rows: row r's values lie in (r, r + 1].
        cdf = cdf / cdf[:, -1:] + np.arange(len(rows))[:, None]
        picks = np.searchsorted(cdf.ravel(), u[:, :most] + np.arange(len(rows))[:, None])
        word = picks - c.vocabulary * np.arange(len(rows))[:, None]
        which = (u[:, most : 2 * most] * STYLE_WORDS).astype(int)
        habit = style[author[rows][:, None], which]
        word = np.where(u[:, 2 * most : 3 * most] < STYLE_SHARE, habit, word)
        number = c.text_words_min + u[:, -1] * (c.text_words_max - c.text_words_min + 1)
        texts += [
            [vocabulary[i] for i in row[:n]]
            for row, n in zip(word.tolist(), number.astype(int).tolist(), strict=True)
        ]
    return texts


def _tags(world: World) -> list[list[str]]:
    """One to three different tags an item, by nearness to topic centres, some at random."""
    c, config = world.constants, world.config
    centres = np.asarray(topic_centres(c, config.seed))
    words = tag_words(c)
    u = np.asarray(uniforms(stream(config.seed, TAG), np.arange(config.items), (1 + 3 * MAX_TAGS,)))
    logit = c.tag_sharpness * np.asarray(world.latents.items.z) @ centres.T
    cdf = np.cumsum(np.exp(logit - logit.max(1, keepdims=True)), axis=1)
    cdf /= cdf[:, -1:]
    by_content, by_chance, wrong = u[:, 1:4], u[:, 4:7], u[:, 7:]
    picks = np.stack([(v[:, None] >= cdf[:, :-1]).sum(1) for v in by_content.T], 1)
    picks = np.where(wrong < c.tag_error, (by_chance * c.topics).astype(int), picks)
    number = 1 + (u[:, 0] * MAX_TAGS).astype(int)
    return [
        [words[t] for t in dict.fromkeys(row[:n])]
        for row, n in zip(picks.tolist(), number.tolist(), strict=True)
    ]
