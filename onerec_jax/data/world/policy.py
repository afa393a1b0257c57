"""The policy that made the log: a fair recommender of the old kind, built for clicks.

It is part of the world and reads latents through noise; policies under test must not.

Axes: B users of a request, C candidates, S slots of the slate.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax.data.world.constants import DAY_S, START_S, WorldConstants
from onerec_jax.data.world.latents import (
    POLICY,
    affinity,
    direction,
    interest_weights,
    mood,
    stream,
)
from onerec_jax.data.world.loop import Log, Request
from onerec_jax.data.world.response import Latents, World

BLOCKS = (32, 256)
"""Users of the two compiled programs."""


class LoggingPolicy:
    """Popular, believed-to-fit and random candidates; the best by a noisy score, in order.

    Popularity is the exposures up to the day before, plus the items' prior. A small share of slots
    shows items drawn from the whole catalogue instead, flagged. The noise belongs to (seed, user,
    time), so the log depends on the world alone.
    """

    def __init__(self, world: World):
        self.world = world
        self._key = stream(world.config.seed, POLICY)
        topic = np.asarray(world.latents.items.topic)
        order = np.argsort(topic, kind="stable").astype(np.int32)
        ends = np.cumsum(np.bincount(topic, minlength=world.constants.topics)).astype(np.int32)
        self._by_topic = jnp.asarray(order), jnp.asarray(ends)
        prior = np.exp(np.asarray(world.latents.items.log_prior, np.float64))
        self._prior = prior / prior.mean()
        self._popularity_of = None

    def __call__(self, users: np.ndarray, log: Log, request: Request):
        """Item rows and random flags, int32 `[B, S]` each; see `Policy`."""
        if self._popularity_of != (id(log), request.day):
            # One exposure an item on average is what the prior counts for.
            weight = log.counts + self._prior
            self._popularity = (
                jnp.asarray(np.cumsum(weight / weight.sum()), jnp.float32),
                jnp.asarray(np.log(weight / weight.mean()), jnp.float32),
            )
            self._popularity_of = id(log), request.day
        b = len(users)
        size = BLOCKS[0] if b <= BLOCKS[0] else BLOCKS[1]
        padded = -(-b // size) * size
        query = np.zeros((3, padded), np.int32)
        query[:, :b] = users, request.session, request.time_s - START_S
        recent = np.full((padded, self.world.constants.recent_hidden), -1, np.int32)
        recent[:b] = log.last(users, recent.shape[1])
        parts = [
            _slates(
                self.world.constants,
                self.world.latents,
                self._key,
                self._by_topic,
                self._popularity,
                query[:, start : start + size],
                recent[start : start + size],
            )
            for start in range(0, padded, size)
        ]
        slates = np.concatenate([np.asarray(part) for part in parts], axis=1)[:, :b]
        return slates[0], slates[1]


@functools.partial(jax.jit, static_argnums=0)
def _slates(c: WorldConstants, latents: Latents, key, by_topic, popularity, query, recent_br):
    """Int32 [2, B, S]: item rows and random flags."""
    items, users = latents.items, latents.users
    cdf, log_popularity = popularity
    num_items = cdf.shape[0]
    user, session, time = query
    day = time.astype(jnp.float32) / DAY_S
    candidates = c.candidates_popular + c.candidates_mood + c.candidates_random
    keys = jax.vmap(lambda u, t: jax.random.fold_in(jax.random.fold_in(key, u), t))(user, time)

    def draw(k):
        number = 3 * candidates + 2 * c.slate + 2
        return jax.random.uniform(k, (number,), minval=1e-7, maxval=1 - 1e-7)

    def anything(uniform):
        # In float32 the product may round up to the number of items.
        return jnp.minimum((uniform * num_items).astype(jnp.int32), num_items - 1)

    u = jax.vmap(draw)(keys)
    u_pick, u_error, u_gumbel, u_slot, u_rest = jnp.split(
        u, np.cumsum([candidates, candidates, candidates, 2 * c.slate]), axis=1
    )

    # The mood that the platform believes in: the true one, or another guess by the interests.
    share = jnp.cumsum(interest_weights(users, user, day), -1)
    guess = jnp.sum(u_rest[:, :1] >= share[:, :-1], -1)
    true = mood(users, latents.mood_key, user, session, day)
    believed = jnp.where(u_rest[:, 1] < c.mood_known, true, guess)

    popular, near, anywhere = jnp.split(
        u_pick, [c.candidates_popular, c.candidates_popular + c.candidates_mood], axis=1
    )
    order, ends = by_topic
    topic = users.topics[user, believed][:, None]
    start = jnp.where(topic > 0, ends[topic - 1], 0)
    place = start + (near * (ends[topic] - start)).astype(jnp.int32)
    item = jnp.concatenate(
        [
            jnp.searchsorted(cdf[:-1], popular),
            order[jnp.minimum(place, num_items - 1)],
            anything(anywhere),
        ],
        axis=1,
    ).astype(jnp.int32)

    score = (
        affinity(c, items, users, user, item, direction(c, users, user, believed, day))
        + c.policy_noise * jax.scipy.special.ndtri(u_error)
        + c.policy_popularity * log_popularity[item]
        + c.policy_catchiness * items.catchiness[item]
        - c.policy_temperature * jnp.log(-jnp.log(u_gumbel))
    )
    seen = (item[:, :, None] == recent_br[:, None]).any(-1)
    earlier = np.tri(candidates, k=-1, dtype=bool)
    twice = ((item[:, :, None] == item[:, None]) & earlier).any(-1)
    # What was seen lately comes after all else, a second copy last of all.
    _, best = jax.lax.top_k(score - 100.0 * seen - 10_000.0 * twice, c.slate)
    slate = jnp.take_along_axis(item, best, axis=1)
    is_rand = u_slot[:, : c.slate] < c.random_share
    return jnp.stack(
        [jnp.where(is_rand, anything(u_slot[:, c.slate :]), slate), is_rand.astype(jnp.int32)]
    )
