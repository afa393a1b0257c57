"""What a simulated platform is made of: its size, and the numbers of its law.

The numbers were set once so that the log resembles a short-video log (rates of feedback, lengths,
popularity), before any model was trained on it, and are not to be tuned to any model. World "a"
is for work; world "b" has other numbers throughout and only confirms what was found in "a".
Distances are in units of the affinity, a logit-like number whose spread over items is about one.
"""

import dataclasses
import hashlib
import json
from typing import Literal

from onerec_jax.errors import InputError, require_at_least

VERSION = 1
"""Part of every fingerprint; raise it when an equation changes, for old logs then differ."""
DAY_S = 86_400
START_S = 1_704_067_200
"""Unix time at which every world begins: 1 January 2024, a Monday, UTC."""
LONG_VIEW_S = 18.0
"""KuaiRand's rule: a long view lasts 18 s, or the whole video where that is shorter."""
MAX_ACTIONS = 100_000
"""Longest history: what OneRec's lifelong pathway is said to read (arXiv 2506.13695, 2.2.1)."""
MAX_ACTIONS_A_DAY = 2_000
"""About nine hours at 15 s an item; more would not fit between waking and sleeping."""


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """A simulated short-video platform."""

    users: int = 2000
    """People on the platform."""
    items: int = 5000
    """Videos; all are there from the first day."""
    actions: int = 200
    """Mean number of exposures a user, 5 to 100,000; nobody has fewer than 5."""
    spread: float = 0.8
    """Standard deviation of the logarithm of a user's number of exposures; 0: all have the same."""
    days: int = 60
    """Days that the log should span, roughly: visits are as frequent as that takes."""
    seed: int = 0
    """Everything is drawn from it."""
    name: Literal["a", "b"] = "a"
    """Which law: a is for work, b has other constants and confirms."""


@dataclasses.dataclass(frozen=True)
class WorldConstants:
    """The law of a world; every field says why it has the value that world "a" gives it."""

    # Items
    latent_dim: int = 16
    """Large enough that 48 topics are nearly orthogonal, small enough to be learned from text."""
    topics: int = 48
    """A codebook of 256 can tell them apart and still has codes left for what lies within."""
    topic_skew: float = 0.7
    """Exponent of the popularity of topics by rank: the first is 15 times the last."""
    topic_noise: float = 0.7
    """Spread around the topic centre: two items of a topic have a cosine of 0.67 on average."""
    items_per_author: int = 10
    """An author is seen often enough that the name says something beyond the topic."""
    author_skew: float = 1.5
    """Power of the uniform that picks an author: the first tenth makes a fifth of the items."""
    author_focus: float = 0.7
    """Share of an author's items on the author's main topic: a hint, not a label."""
    author_quality: float = 0.6
    """Part of an item's quality that is its author's, as a correlation: quality is learnable."""
    farm_every: int = 12
    """Every so-many-th author is a content farm, a share of 8 %: enough to measure, few enough
    that a platform would not have noticed."""
    farm_catchiness: float = 1.3
    """Farms draw the click: a bit over one standard deviation of catchiness."""
    farm_quality: float = -1.2
    """Farms disappoint: a bit over one standard deviation of quality."""
    duration_median_s: float = 24.0
    """KuaiRand's videos have a median of 20 to 30 s."""
    duration_topic_spread: float = 0.35
    """Topics differ in length (sketches, lectures), by a factor of 1.4."""
    duration_spread: float = 0.55
    """Within a topic, by a factor of 1.7; the whole log-normal then has KuaiRand's width."""
    duration_min_s: float = 4.0
    """Shorter clips are not videos."""
    duration_max_s: float = 300.0
    """The platform's limit."""
    prior_spread: float = 0.9
    """Standard deviation of the log of an item's prior popularity (fans, promotion)."""

    # What can be read of an item
    vocabulary: int = 2000
    """Pseudo-words: a small real vocabulary."""
    text_hidden: int = 64
    """Width of the net from latents to words: wide enough not to lose any of them."""
    text_sharpness: float = 2.4
    """Scale of the word logits: a text then tells topics apart but not every item."""
    text_quality: float = 0.3
    """Weight of quality and catchiness in the words: a title sounds like clickbait at times."""
    text_words_min: int = 8
    """As short as a caption without hashtags."""
    text_words_max: int = 20
    """As long as a caption gets."""
    tag_error: float = 0.12
    """Share of tags that are picked at random: authors tag for reach."""
    tag_sharpness: float = 9.0
    """Scale of the cosine to topic centres that tags are drawn by: near topics get confused."""

    # Users
    interests: int = 6
    """Points of interest of a user: more than fit into a short history of 20 actions."""
    interest_noise: float = 0.5
    """Spread of a user's own point around the topic centre: taste within the topic counts."""
    interest_base: float = 0.5
    """Standard deviation of the lasting part of the interest logits: no interest dies."""
    interest_swing: float = 1.6
    """Mean amplitude of the periodic part: an interest goes from a twentieth to a half and back."""
    period_min_days: float = 10.0
    """Fastest return of an interest: beyond what a short history covers."""
    period_max_days: float = 90.0
    """Slowest: old interests come back after weeks, so that a long history is worth having."""
    duration_taste_spread: float = 0.5
    """Standard deviation of the log of the duration that a user prefers."""
    favourite_authors: int = 4
    """Authors whom a user follows with attention: few, as attention is."""
    propensity_spread: float = 0.7
    """Standard deviation of a user's logit for each reaction: a few people give most likes."""
    patience_spread: float = 0.35
    """Standard deviation of a user's leave logit: some stay for 6 items, some for 13."""

    # Affinity of a user to an item
    mood_weight: float = 2.0
    """Most of the answer is what the session is about."""
    mix_weight: float = 1.2
    """The rest of a user's interests count for about half of the mood."""
    author_bonus: float = 0.6
    """A favourite author is worth a third of the right topic."""
    quality_weight: float = 0.35
    """One standard deviation of quality is worth a sixth of the right topic."""
    duration_mismatch: float = 0.25
    """Cost of a factor e between the video's length and the preferred one."""

    # Feedback
    click_base: float = -1.2
    """Puts clicks at about half of the exposures, as in KuaiRand's standard log."""
    click_affinity: float = 0.9
    """Liking shows in the click, but noisily."""
    click_catchiness: float = 0.7
    """One standard deviation of catchiness is worth nearly one unit of liking."""
    watch_base: float = -0.95
    """Puts the median watch ratio of a clicked, indifferent video at 0.4."""
    watch_affinity: float = 0.4
    """One unit of liking lengthens the watch by half."""
    watch_quality: float = 0.18
    """Quality holds, beyond the liking that it brings."""
    watch_duration: float = 0.45
    """Elasticity: a video twice as long is watched for 1.46 times as long, not twice."""
    watch_fatigue: float = 0.06
    """Per log slot of the session: the twentieth video is watched a sixth shorter."""
    watch_farm: float = 0.5
    """Farms' videos end in disappointment: 40 % shorter."""
    watch_skip: float = 1.3
    """Without a click the video runs for about a quarter as long until it is swiped away."""
    watch_noise: float = 0.75
    """Standard deviation of the log ratio: one watch says little, many say a lot."""
    watch_max_ratio: float = 3.0
    """Replays end after the third time."""
    like_base: float = -2.85
    """Given a long view; about 4 % of exposures."""
    comment_base: float = -4.7
    """Given a long view; half a percent of exposures to one percent."""
    forward_base: float = -5.4
    """Given a long view; about three in a thousand."""
    follow_base: float = -5.1
    """Given a long view; about five in a thousand."""
    hate_base: float = -6.0
    """Given no long view; about two in a thousand."""
    reaction_affinity: float = 0.55
    """Reactions grow with liking, dislikes shrink with it."""
    hate_farm: float = 1.0
    """Farms are hated nearly three times as often."""

    # Sessions
    leave_base: float = -2.25
    """Puts a session at nine items on average, two to three minutes."""
    leave_affinity: float = 0.35
    """What one likes, one stays for."""
    leave_fatigue: float = 0.25
    """Per log slot: long sessions end sooner or later."""
    leave_long_view: float = -0.5
    """After a long view one stays: a good video earns the next."""
    return_satisfaction: float = 1.2
    """The mean gap shrinks by a factor e for 0.83 of satisfaction: the reward that comes late."""
    satisfaction_base: float = 0.4
    """Satisfaction at which the gap is the planned one: about that of the logging policy."""

    # The policy that made the log
    slate: int = 8
    """Items a request: a session takes one or two."""
    candidates_popular: int = 32
    """Half by popularity: the rich get richer."""
    candidates_mood: int = 20
    """A third from topics that the platform believes the user to be in the mood for."""
    candidates_random: int = 12
    """The rest at random: new and rare items get a chance."""
    mood_known: float = 0.45
    """How often the platform reads the mood rightly: a fair recommender, with room above it."""
    policy_noise: float = 0.8
    """Standard deviation of its error about affinity: about the spread of affinity itself."""
    policy_popularity: float = 0.15
    """Weight of log popularity: popular items come first at equal affinity."""
    policy_catchiness: float = 0.4
    """It was built for clicks, which is how farms thrive."""
    policy_temperature: float = 0.5
    """Scale of the Gumbel noise: the log explores a little."""
    random_share: float = 0.02
    """Share of exposures that are uniformly random, as KuaiRand's is_rand: unbiased, but few."""
    recent_hidden: int = 256
    """It does not show again what is among a user's latest so many exposures, if it can."""


WORLDS = {
    "a": WorldConstants(),
    "b": WorldConstants(
        latent_dim=24,
        topics=72,
        topic_skew=0.9,
        topic_noise=0.9,
        items_per_author=16,
        author_skew=1.2,
        author_focus=0.55,
        author_quality=0.45,
        farm_every=8,
        farm_catchiness=1.0,
        farm_quality=-1.5,
        duration_median_s=32.0,
        duration_topic_spread=0.5,
        duration_spread=0.7,
        duration_min_s=5.0,
        duration_max_s=420.0,
        prior_spread=1.2,
        vocabulary=3000,
        text_hidden=96,
        text_sharpness=2.0,
        text_quality=0.45,
        text_words_min=6,
        text_words_max=16,
        tag_error=0.2,
        tag_sharpness=7.0,
        interests=8,
        interest_noise=0.7,
        interest_base=0.7,
        interest_swing=1.3,
        period_min_days=7.0,
        period_max_days=60.0,
        duration_taste_spread=0.65,
        favourite_authors=6,
        propensity_spread=0.9,
        patience_spread=0.5,
        mood_weight=1.7,
        mix_weight=1.6,
        author_bonus=0.9,
        quality_weight=0.45,
        duration_mismatch=0.35,
        click_base=-0.7,
        click_affinity=0.75,
        click_catchiness=0.9,
        watch_base=-0.85,
        watch_affinity=0.35,
        watch_quality=0.25,
        watch_duration=0.55,
        watch_fatigue=0.09,
        watch_farm=0.7,
        watch_skip=1.6,
        watch_noise=0.9,
        watch_max_ratio=4.0,
        like_base=-2.9,
        comment_base=-4.9,
        forward_base=-5.7,
        follow_base=-5.3,
        hate_base=-6.2,
        reaction_affinity=0.65,
        hate_farm=0.7,
        leave_base=-2.5,
        leave_affinity=0.25,
        leave_fatigue=0.35,
        leave_long_view=-0.7,
        return_satisfaction=0.9,
        satisfaction_base=0.35,
        slate=6,
        candidates_popular=24,
        candidates_mood=28,
        candidates_random=16,
        mood_known=0.35,
        policy_noise=1.0,
        policy_popularity=0.25,
        policy_catchiness=0.3,
        policy_temperature=0.7,
        random_share=0.03,
        recent_hidden=192,
    ),
}
"""The laws by name. Those of "b" are "a"'s moved by a fifth to a half, for the same reasons."""


def check_config(config: WorldConfig) -> None:
    """Refuses a world that cannot be.

    Raises:
      InputError: too few users, items, actions or days, a negative spread or seed, too many
        actions for a lifetime or for the days, or an unknown name.
    """
    if config.name not in WORLDS:
        raise InputError(f"--world.name {config.name}: unknown; choose one of {', '.join(WORLDS)}")
    require_at_least(config, "world.", users=1, items=100, actions=5, spread=0, days=1, seed=0)
    if config.seed >= 2**31:
        raise InputError(f"--world.seed {config.seed} must be below {2**31}")
    if config.actions > MAX_ACTIONS:
        raise InputError(f"--world.actions {config.actions} must be at most {MAX_ACTIONS}")
    if config.actions > MAX_ACTIONS_A_DAY * config.days:
        raise InputError(
            f"--world.actions {config.actions} do not fit into {config.days} days of "
            f"{MAX_ACTIONS_A_DAY}; give more --world.days"
        )


def fingerprint(config: WorldConfig) -> str:
    """16 hex digits that change with the configuration and with any constant of its law."""
    parts = [VERSION, dataclasses.asdict(config), dataclasses.asdict(WORLDS[config.name])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
