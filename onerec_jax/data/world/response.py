"""The world: what a user does when shown an item, expected and drawn.

The only place that knows what would have happened. An answer depends on the world and on (user,
item, session, slot, time_s) and on nothing else: not on what was asked before or with it.

A person clicks or not; the watch ratio is log-normal, much shorter without a click, and capped;
a view is long by KuaiRand's rule; reactions follow long views, dislikes follow the others; and
whoever has seen a long view is less likely to leave. All expectations are exact.

Axes: n rows of a query.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import sigmoid
from jax.scipy.special import ndtr, ndtri

from onerec_jax.data.world.constants import (
    DAY_S,
    LONG_VIEW_S,
    START_S,
    WORLDS,
    WorldConfig,
    WorldConstants,
    check_config,
    fingerprint,
)
from onerec_jax.data.world.latents import (
    FEEDBACK,
    GAP,
    MOOD,
    REACTIONS,
    ItemLatents,
    UserLatents,
    affinity,
    direction,
    draw_items,
    draw_users,
    mood,
    stream,
)
from onerec_jax.errors import InputError

BLOCK = 128
"""Rows of the one compiled program. Queries are cut and padded to it: programs of other sizes
would round differently. A multiple of every vector width, so that all rows are treated alike."""
WEEK_S = 7 * DAY_S
GAP_SHAPE = 1.5
"""Shape of the law of gaps: above one, for visits are habits and so less erratic than chance."""


class Response(NamedTuple):
    """Expected feedback, float32 `[n]` each; probabilities but for the first two."""

    watch_s: np.ndarray  # seconds
    watch_ratio: np.ndarray  # of the item's duration, replays count
    click: np.ndarray
    long_view: np.ndarray
    like: np.ndarray
    comment: np.ndarray
    forward: np.ndarray
    follow: np.ndarray
    hate: np.ndarray
    leave: np.ndarray  # the session ends after this item


class Feedback(NamedTuple):
    """Drawn feedback, `[n]` each: float32 for the first two, int8 (0 or 1) for the rest."""

    watch_s: np.ndarray
    watch_ratio: np.ndarray
    click: np.ndarray
    long_view: np.ndarray
    like: np.ndarray
    comment: np.ndarray
    forward: np.ndarray
    follow: np.ndarray
    hate: np.ndarray
    leave: np.ndarray


class Latents(NamedTuple):
    """All that a jitted function has to know of a world."""

    items: ItemLatents
    users: UserLatents
    mood_key: jax.Array
    noise_key: jax.Array


class World:
    """A simulated platform: everybody's and everything's latents, and the law of feedback."""

    def __init__(self, config: WorldConfig):
        """Draws the latents.

        Raises:
          InputError: as `check_config`.
        """
        check_config(config)
        self.config = config
        self.constants: WorldConstants = WORLDS[config.name]
        items = draw_items(self.constants, config)
        self.latents = Latents(
            items,
            draw_users(self.constants, config, items),
            stream(config.seed, MOOD),
            stream(config.seed, FEEDBACK),
        )
        self.fingerprint = fingerprint(config)
        self.quota = np.asarray(self.latents.users.quota)
        """Int32 [users]: exposures until the log of the user ends."""
        self._gap_s = np.asarray(self.latents.users.gap_s)

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> "World":
        """The world that made a data set, from its `meta` (or dataset.json).

        Raises:
          InputError: the data set is of no world, or of one whose law has changed since.
        """
        try:
            stored = meta["world"]
            world = cls(WorldConfig(**stored["config"]))
            known = stored["fingerprint"]
        except (KeyError, TypeError) as error:
            raise InputError(
                "the data set names no world that made it; make one with "
                "python -m experiments.prepare --source world"
            ) from error
        if world.fingerprint != known:
            raise InputError(
                f"the data set was made by world {known}, but its settings now give "
                f"{world.fingerprint}; make it again with python -m experiments.prepare"
            )
        return world

    @property
    def meta(self) -> dict[str, Any]:
        """What `from_meta` needs, as plain values."""
        return {"config": dataclasses.asdict(self.config), "fingerprint": self.fingerprint}

    def expected(self, user, item, session, slot, time_s) -> Response:
        """Expected feedback; exact, no sampling.

        Args:
          user, item: int `[n]` (or a number, for all), rows of the tables.
          session: int `[n]`, session of the user from 0.
          slot: int `[n]`, place within the session from 0.
          time_s: int `[n]`, Unix time in seconds, from the start of the world on.

        Raises:
          ValueError: a user, item, session, slot or time out of range.
        """
        query = self._query(user, item, session, slot, time_s)
        return Response(*self._in_blocks(_expected, query))

    def respond(self, user, item, session, slot, time_s) -> Feedback:
        """Drawn feedback; arguments as `expected`.

        The noise belongs to (seed, user, item, time_s): the same question has the same answer.
        """
        query = self._query(user, item, session, slot, time_s)
        watch_s, ratio, *flags = self._in_blocks(_respond, query)
        return Feedback(watch_s, ratio, *(flag.astype(np.int8) for flag in flags))

    def return_within_7_days(self, user, satisfaction) -> np.ndarray:
        """Probability that the next session begins within 7 days, float64 `[n]`.

        Args:
          user: int `[n]`.
          satisfaction: float `[n]`, mean of `satisfaction(feedback)` over the session.
        """
        return -np.expm1(-((WEEK_S / self._gap_scale(user, satisfaction)) ** GAP_SHAPE))

    def gap_s(self, user, session, satisfaction) -> np.ndarray:
        """Drawn seconds from the end of a session to the next one, int64 `[n]`, at least 1.

        Weibull of shape GAP_SHAPE, with a mean that shrinks with satisfaction: the law that
        `return_within_7_days` states. The noise belongs to (seed, user, session).
        """
        user, session = np.broadcast_arrays(np.asarray(user), np.asarray(session))
        zero = np.zeros_like(user)
        query = np.stack([user, session, zero, zero, zero]).astype(np.int32)
        (noise,) = self._in_blocks(_gap_noise, query)
        gap = self._gap_scale(user, satisfaction) * noise.astype(np.float64) ** (1 / GAP_SHAPE)
        return np.ceil(gap).astype(np.int64)

    def _gap_scale(self, user, satisfaction):
        """Float64: scale of the Weibull law, in seconds."""
        c = self.constants
        # No single session makes or breaks a habit.
        surplus = np.clip(np.asarray(satisfaction, float) - c.satisfaction_base, -0.6, 0.6)
        mean = self._gap_s[user] * np.exp(-c.return_satisfaction * surplus)
        return mean / math.gamma(1 + 1 / GAP_SHAPE)

    def _query(self, user, item, session, slot, time_s):
        """Int32 [5, n] of the arguments, time counted from the world's start."""
        arrays = np.broadcast_arrays(
            *(np.atleast_1d(x) for x in (user, item, session, slot)),
            np.atleast_1d(np.asarray(time_s, np.int64)) - START_S,
        )
        limits = (self.config.users, self.config.items, 2**31, 2**31, 2**31)
        for name, array, limit in zip(
            ("user", "item", "session", "slot", "time_s"), arrays, limits, strict=True
        ):
            if array.size and (array.min() < 0 or array.max() >= limit):
                raise ValueError(f"{name} from {array.min()} to {array.max()} is out of range")
        return np.stack([array.astype(np.int32) for array in arrays])

    def _in_blocks(self, function, query: np.ndarray) -> np.ndarray:
        """float32 [outputs, n] of a function of int32 [5, n], by blocks of one size."""
        n = query.shape[1]
        padded = np.zeros((len(query), max(-(-n // BLOCK), 1) * BLOCK), np.int32)
        padded[:, :n] = query
        parts = [
            function(self.constants, self.latents, padded[:, start : start + BLOCK])
            for start in range(0, padded.shape[1], BLOCK)
        ]
        return np.concatenate([np.asarray(part) for part in parts], axis=1)[:, :n]


def satisfaction(feedback: Feedback | Response | Mapping[str, np.ndarray]) -> np.ndarray:
    """How content a shown item leaves the user, float32 `[n]`; its mean over a session counts.

    A long view is worth 1, a reaction 1 more, a dislike -3: a weekly survey in one number.

    Args:
      feedback: a world's answer, or columns of a log by name.
    """
    of = feedback if isinstance(feedback, Mapping) else feedback._asdict()
    liked = of["like"] + of["comment"] + of["forward"] + of["follow"]
    return (of["long_view"] + liked - 3.0 * of["hate"]).astype(np.float32)


class _Law(NamedTuple):
    """Parameters of the feedback to one row; `[n]` each, pairs are (without, with) a click."""

    click: jax.Array
    log_ratio: tuple[jax.Array, jax.Array]  # mean of the log watch ratio before the cap
    duration: jax.Array  # seconds
    reaction: jax.Array  # [n, 4] given a long view
    hate: jax.Array  # given no long view
    leave: tuple[jax.Array, jax.Array]  # without and with a long view


def _law(c: WorldConstants, latents: Latents, query) -> _Law:
    items, users = latents.items, latents.users
    user, item, session, slot, time = query
    day = time.astype(jnp.float32) / DAY_S
    toward = direction(c, users, user, mood(users, latents.mood_key, user, session, day), day)
    liking = affinity(c, items, users, user, item[:, None], toward)[:, 0]
    farm, log_slot = items.farm[item], jnp.log1p(slot.astype(jnp.float32))
    log_ratio = (
        c.watch_base
        + c.watch_affinity * liking
        + c.watch_quality * items.quality[item]
        - c.watch_duration * (items.log_duration[item] - np.log(c.duration_median_s))
        - c.watch_fatigue * log_slot
        - c.watch_farm * farm
    )
    base = np.array([getattr(c, f"{name}_base") for name in REACTIONS], np.float32)
    sign = np.array([1, 1, 1, 1, -1], np.float32)
    reaction = sigmoid(
        base
        + c.reaction_affinity * sign * liking[:, None]
        + users.propensity[user]
        + c.hate_farm * farm[:, None] * (sign < 0)
    )
    leave = (
        c.leave_base - c.leave_affinity * liking + c.leave_fatigue * log_slot - users.patience[user]
    )
    return _Law(
        click=sigmoid(
            c.click_base + c.click_affinity * liking + c.click_catchiness * items.catchiness[item]
        ),
        log_ratio=(log_ratio - c.watch_skip, log_ratio),
        duration=jnp.exp(items.log_duration[item]),
        reaction=reaction[:, :4],
        hate=reaction[:, 4],
        leave=(sigmoid(leave), sigmoid(leave + c.leave_long_view)),
    )


def _long_view_from(duration):
    """Seconds from which a view is long."""
    return jnp.minimum(duration, LONG_VIEW_S)


@functools.partial(jax.jit, static_argnums=0)
def _expected(c: WorldConstants, latents: Latents, query) -> jax.Array:
    """Float32 [10, n], the fields of Response."""
    law, s, cap = _law(c, latents, query), c.watch_noise, np.log(c.watch_max_ratio)
    threshold = jnp.log(_long_view_from(law.duration) / law.duration)

    def given(mean):
        """Mean of min(X, cap) and P(long view) for log X ~ N(mean, s^2)."""
        below = jnp.exp(mean + s * s / 2) * ndtr((cap - mean) / s - s)
        above = c.watch_max_ratio * ndtr((mean - cap) / s)
        return below + above, ndtr((mean - threshold) / s)

    (ratio_0, long_0), (ratio_1, long_1) = map(given, law.log_ratio)
    ratio = ratio_0 + law.click * (ratio_1 - ratio_0)
    long_view = long_0 + law.click * (long_1 - long_0)
    leave_0, leave_1 = law.leave
    return jnp.stack(
        [
            ratio * law.duration,
            ratio,
            law.click,
            long_view,
            *(long_view[:, None] * law.reaction).T,
            (1 - long_view) * law.hate,
            leave_0 + long_view * (leave_1 - leave_0),
        ]
    )


@functools.partial(jax.jit, static_argnums=0)
def _respond(c: WorldConstants, latents: Latents, query) -> jax.Array:
    """Float32 [10, n], the fields of Feedback."""
    law = _law(c, latents, query)
    user, item, _, _, time = query

    def draw(*numbers):
        key = latents.noise_key
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return jax.random.uniform(key, (8,), minval=1e-7, maxval=1 - 1e-7)

    u = jax.vmap(draw, out_axes=1)(user, item, time)
    click = u[0] < law.click
    log_ratio = jnp.where(click, law.log_ratio[1], law.log_ratio[0]) + c.watch_noise * ndtri(u[1])
    ratio = jnp.minimum(jnp.exp(log_ratio), c.watch_max_ratio)
    watch_s = ratio * law.duration
    long_view = watch_s >= _long_view_from(law.duration)
    reaction = (u[2:6] < law.reaction.T) & long_view
    hate = (u[6] < law.hate) & ~long_view
    leave = u[7] < jnp.where(long_view, law.leave[1], law.leave[0])
    flags = jnp.concatenate([jnp.stack([click, long_view]), reaction, jnp.stack([hate, leave])])
    return jnp.concatenate([jnp.stack([watch_s, ratio]), flags.astype(jnp.float32)])


@functools.partial(jax.jit, static_argnums=0)
def _gap_noise(c: WorldConstants, latents: Latents, query) -> jax.Array:
    """Float32 [1, n]: a unit exponential of (user, session), the first two rows of `query`."""
    del c

    def draw(user, session):
        key = jax.random.fold_in(jax.random.fold_in(latents.mood_key, user), session)
        return jax.random.uniform(jax.random.fold_in(key, GAP), minval=1e-7, maxval=1 - 1e-7)

    return -jnp.log(jax.vmap(draw)(query[0], query[1]))[None]
