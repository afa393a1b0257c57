"""What nobody sees: the latent traits of items and users, and how interest moves with time.

Every value is drawn from (seed, id) and from the world's own random tables (topic centres), so a
user or item is the same whoever else is in the world; only what refers to other rows (an item's
author, a user's favourites) depends on how many there are.

Axes: U users, I items, A authors, T topics, K interests, D latent dimensions, n rows of a query.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from onerec_jax.data.world.constants import (
    DAY_S,
    MAX_ACTIONS,
    MAX_ACTIONS_A_DAY,
    WorldConfig,
    WorldConstants,
)

# Streams of random numbers; each is used with ids folded in.
TOPIC, AUTHOR, ITEM, USER, MOOD, FEEDBACK, GAP, TEXT, TAG, STATIC, POLICY = range(11)
MEAN_SESSION = 9
"""Items of a session of ordinary patience that the planned number of visits reckons with."""
SECONDS_AN_ITEM = 17
"""Seconds an exposure that the planned gaps reckon with."""
MIN_GAP_S = 120.0
"""Shortest planned mean gap between two sessions."""
REACTIONS = ("like", "comment", "forward", "follow", "hate")


class ItemLatents(NamedTuple):
    """Of every item."""

    z: jax.Array  # float32 [I, D], unit length: what it is about
    topic: jax.Array  # int32 [I]
    quality: jax.Array  # float32 [I], about standard normal, farms lower
    catchiness: jax.Array  # float32 [I], about standard normal, farms higher
    log_duration: jax.Array  # float32 [I], log seconds
    author: jax.Array  # int32 [I]
    farm: jax.Array  # float32 [I], 1: made by a content farm
    log_prior: jax.Array  # float32 [I], log of prior popularity


class UserLatents(NamedTuple):
    """Of every user."""

    points: jax.Array  # float32 [U, K, D], unit length: what each interest is about
    topics: jax.Array  # int32 [U, K]
    base: jax.Array  # float32 [U, K], lasting part of the interest logits
    swing: jax.Array  # float32 [U, K], amplitude of the periodic part
    period: jax.Array  # float32 [U, K], days
    phase: jax.Array  # float32 [U, K], radians
    log_duration: jax.Array  # float32 [U], log of the preferred seconds
    propensity: jax.Array  # float32 [U, 5], logits by REACTIONS
    patience: jax.Array  # float32 [U], lowers the leave logit
    favourites: jax.Array  # int32 [U, F], authors
    gap_s: jax.Array  # float32 [U], planned mean seconds between sessions
    quota: jax.Array  # int32 [U], exposures until the log of the user ends


def stream(seed: int | jax.Array, number: int) -> jax.Array:
    """Key of one stream of random numbers."""
    return jax.random.fold_in(jax.random.key(seed), number)


@functools.partial(jax.jit, static_argnames="shape")
def uniforms(key: jax.Array, ids: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Float32 `[n, *shape]` in (0, 1); row i depends on key and ids[i] alone."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
    return jax.vmap(lambda k: jax.random.uniform(k, shape, minval=1e-7, maxval=1 - 1e-7))(keys)


def _unit(x: jax.Array) -> jax.Array:
    """Scaled to unit length along the last axis."""
    return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True))


def _noisy(centre: jax.Array, noise: jax.Array, spread: float) -> jax.Array:
    """A unit vector near a unit centre; `noise` standard normal, last axis D."""
    return _unit(centre + spread / np.sqrt(centre.shape[-1]) * noise)


def topic_centres(c: WorldConstants, seed: int | jax.Array) -> jax.Array:
    """Float32 `[T, D]`, unit length."""
    ids = jnp.arange(c.topics)
    return _unit(ndtri(uniforms(stream(seed, TOPIC), ids, (c.latent_dim,))))


def _topic_share(c: WorldConstants) -> jax.Array:
    """Float32 `[T]`, popularity of topics, sums to one."""
    share = (1.0 + jnp.arange(c.topics)) ** -c.topic_skew
    return share / share.sum()


def num_authors(c: WorldConstants, items: int) -> int:
    """A, authors of a world with so many items."""
    return max(items // c.items_per_author, c.farm_every)


def draw_items(c: WorldConstants, config: WorldConfig) -> ItemLatents:
    """Latents of all items."""
    return _draw_items(c, config.items, config.seed)


# The seed is traced, so that another one needs no new program.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw_items(c, num_items, seed) -> ItemLatents:
    authors = num_authors(c, num_items)
    author_u = uniforms(stream(seed, AUTHOR), jnp.arange(authors), (2,))
    topic_cdf = jnp.cumsum(_topic_share(c))
    author_topic = jnp.searchsorted(topic_cdf[:-1], author_u[:, 0])
    author_quality = ndtri(author_u[:, 1])

    u = uniforms(stream(seed, ITEM), jnp.arange(num_items), (7 + c.latent_dim,))
    author = jnp.minimum(u[:, 0] ** c.author_skew * authors, authors - 1).astype(jnp.int32)
    farm = (author % c.farm_every == c.farm_every - 1).astype(jnp.float32)
    any_topic = jnp.searchsorted(topic_cdf[:-1], u[:, 1])
    topic = jnp.where(u[:, 2] < c.author_focus, author_topic[author], any_topic)
    own = jnp.sqrt(1 - c.author_quality**2) * ndtri(u[:, 3])
    # The length that is usual for a topic comes from the topic's own stream.
    usual = ndtri(uniforms(stream(seed, TOPIC), c.topics + jnp.arange(c.topics), ()))
    log_duration = (
        np.log(c.duration_median_s)
        + c.duration_topic_spread * usual[topic]
        + c.duration_spread * ndtri(u[:, 4])
    )
    return ItemLatents(
        z=_noisy(topic_centres(c, seed)[topic], ndtri(u[:, 7:]), c.topic_noise),
        topic=topic.astype(jnp.int32),
        quality=c.author_quality * author_quality[author] + own + c.farm_quality * farm,
        catchiness=ndtri(u[:, 5]) + c.farm_catchiness * farm,
        log_duration=jnp.clip(log_duration, np.log(c.duration_min_s), np.log(c.duration_max_s)),
        author=author,
        farm=farm,
        log_prior=c.prior_spread * ndtri(u[:, 6]),
    )


def draw_users(c: WorldConstants, config: WorldConfig, items: ItemLatents) -> UserLatents:
    """Latents of all users; favourites are authors of items on topics the user is interested in."""
    order = np.argsort(np.asarray(items.topic), kind="stable")
    by_topic = np.asarray(items.author)[order]
    end = np.cumsum(np.bincount(np.asarray(items.topic), minlength=c.topics)).astype(np.int32)
    plan = np.float32([config.actions, config.spread, config.days])
    return _draw_users(c, config.users, config.seed, plan, by_topic, end)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw_users(c, num_users, seed, plan, author_by_topic, topic_end) -> UserLatents:
    actions, spread, days = plan
    k, dims = c.interests, c.latent_dim
    key, ids = stream(seed, USER), jnp.arange(num_users)
    keys = [jax.random.fold_in(key, part) for part in range(4)]
    gumbel = -jnp.log(-jnp.log(uniforms(keys[0], ids, (c.topics,))))
    _, topics = jax.lax.top_k(jnp.log(_topic_share(c)) + gumbel, k)
    noise = ndtri(uniforms(keys[1], ids, (k, dims)))
    u = uniforms(keys[2], ids, (4, k))
    period = jnp.exp(
        np.log(c.period_min_days) + u[:, 2] * np.log(c.period_max_days / c.period_min_days)
    )
    single = ndtri(uniforms(keys[3], ids, (8,)))

    pick = uniforms(jax.random.fold_in(key, 4), ids, (c.favourite_authors,))
    topic = topics[:, jnp.arange(c.favourite_authors) % k]
    start = jnp.where(topic > 0, topic_end[topic - 1], 0)
    place = start + (pick * (topic_end[topic] - start)).astype(jnp.int32)

    quota = actions * jnp.exp(spread * single[:, 7] - spread**2 / 2)
    quota = jnp.clip(jnp.round(quota), 5, jnp.minimum(MAX_ACTIONS, MAX_ACTIONS_A_DAY * days))
    patience = c.patience_spread * single[:, 6]
    session = MEAN_SESSION * jnp.exp(patience)
    # There is a gap before the first session too. Chance and bad sessions make some users late, so
    # the plan fills four fifths of the days.
    gap_s = 0.8 * days * DAY_S / (quota / session + 1) - session * SECONDS_AN_ITEM
    return UserLatents(
        points=_noisy(topic_centres(c, seed)[topics], noise, c.interest_noise),
        topics=topics.astype(jnp.int32),
        base=c.interest_base * ndtri(u[:, 0]),
        swing=c.interest_swing * (0.5 + u[:, 1]),
        period=period,
        phase=2 * np.pi * u[:, 3],
        log_duration=np.log(c.duration_median_s) + c.duration_taste_spread * single[:, 0],
        propensity=c.propensity_spread * single[:, 1:6],
        patience=patience,
        favourites=author_by_topic[jnp.minimum(place, len(author_by_topic) - 1)],
        gap_s=jnp.maximum(gap_s, MIN_GAP_S),
        quota=quota.astype(jnp.int32),
    )


def interest_weights(users: UserLatents, user_n: jax.Array, day_n: jax.Array) -> jax.Array:
    """Share of each interest in a user's attention at a time, float32 `[n, K]`, sums to one.

    w_uk(t) = softmax_k(base_uk + swing_uk sin(2 pi t / period_uk + phase_uk)), a closed form: old
    interests return after their period, and no state has to be carried along.

    Args:
      user_n: int32 `[n]`.
      day_n: float32 `[n]`, days since the world began.
    """
    turn = day_n[:, None] / users.period[user_n]
    angle = 2 * np.pi * (turn - jnp.floor(turn)) + users.phase[user_n]
    logit = users.base[user_n] + users.swing[user_n] * jnp.sin(angle)
    weight = jnp.exp(logit - logit.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def mood(users: UserLatents, key: jax.Array, user_n, session_n, day_n) -> jax.Array:
    """The interest that a session is about, int32 `[n]` in [0, K).

    Drawn by the interest weights at the start of the day, with a uniform of (user, session): the
    same all through a session, but for the rare one across midnight whose weights move past it.
    """
    keys = jax.vmap(lambda u, s: jax.random.fold_in(jax.random.fold_in(key, u), s))(
        user_n, session_n
    )
    u_n = jax.vmap(jax.random.uniform)(keys)
    share = jnp.cumsum(interest_weights(users, user_n, jnp.floor(day_n)), -1)
    return jnp.sum(u_n[:, None] >= share[:, :-1], -1).astype(jnp.int32)


def direction(c: WorldConstants, users: UserLatents, user_n, mood_n, day_n) -> jax.Array:
    """The vector whose inner product with an item's z is the topical affinity, float32 `[n, D]`."""
    share = interest_weights(users, user_n, day_n)
    is_mood = mood_n[:, None] == jnp.arange(c.interests)
    weight = c.mix_weight * share + c.mood_weight * is_mood
    return jnp.sum(weight[..., None] * users.points[user_n], 1)


def affinity(
    c: WorldConstants, items: ItemLatents, users: UserLatents, user_n, item_nc, direction_nd
) -> jax.Array:
    """How much users like items, float32 `[n, C]`, for C items a user.

    Inner product with what the user is after, plus a bonus for favourite authors, plus quality,
    less the mismatch between the item's length and the preferred one.
    """
    topical = jnp.sum(direction_nd[:, None] * items.z[item_nc], -1)
    favourite = (items.author[item_nc][..., None] == users.favourites[user_n][:, None]).any(-1)
    mismatch = jnp.abs(items.log_duration[item_nc] - users.log_duration[user_n][:, None])
    return (
        topical
        + c.author_bonus * favourite
        + c.quality_weight * items.quality[item_nc]
        - c.duration_mismatch * mismatch
    )
