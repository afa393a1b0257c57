"""Advantages of the items of a group: rewards less the group's mean, over its deviation.

OneRec Technical Report (arXiv 2506.13695), section 2.4.1.

Axes: B users, G items of a group.
"""

import jax.numpy as jnp
import numpy as np

from onerec_jax.errors import InputError

MIN_DEVIATION = 1e-6
"""A group whose rewards deviate less is skipped: float32 rewards about 1 differ by rounding alone,
and the division would make that as loud as a true preference."""


def group_advantages(reward_bg, valid_bg=None):
    """`A_i = (r_i - mean(r_1..r_G)) / std(r_1..r_G)` of every group.

    Args:
      reward_bg: float32 `[B, G]`.
      valid_bg: bool `[B, G]`, items that have a reward (those of the catalogue); None: all. The
        others enter neither mean nor deviation: as negatives they would squeeze the probability of
        everything into the present favourite (section 2.4.2).

    Returns:
      Advantages float32 `[B, G]` of mean 0 and deviation 1 over the valid items of a group, and
      bool `[B, G]`, which of them count: none of a group with fewer than two valid items or of
      rewards that are all alike. Those that do not count are 0.

    Raises:
      InputError: groups of fewer than two.
    """
    if reward_bg.shape[1] < 2:
        raise InputError(
            f"a group of {reward_bg.shape[1]} item has nothing to compare: sample 2 or more a user"
        )
    valid_bg = jnp.ones(reward_bg.shape, bool) if valid_bg is None else valid_bg
    reward_bg = jnp.asarray(reward_bg, jnp.float32)
    count = jnp.maximum(valid_bg.sum(1, keepdims=True), 1)
    # From the least on: the sum of what lies close together would lose it to rounding.
    least = jnp.min(reward_bg, axis=1, keepdims=True, where=valid_bg, initial=jnp.inf)
    above = jnp.where(valid_bg, reward_bg - least, 0)
    surplus = jnp.where(valid_bg, above - above.sum(1, keepdims=True) / count, 0)
    deviation = jnp.sqrt((surplus**2).sum(1, keepdims=True) / count)
    counts_bg = valid_bg & (deviation > MIN_DEVIATION)
    return jnp.where(counts_bg, surplus / jnp.maximum(deviation, MIN_DEVIATION), 0), counts_bg


def check_rewards(reward_bg, item_bg, item_ids) -> None:
    """Refuses a reward that is no number.

    Args:
      reward_bg: float `[B, G]`, on the host.
      item_bg: int `[B, G]`, item rows; -1 is no item and needs no reward.
      item_ids: ids of the items table in row order, for the message.

    Raises:
      InputError: names the first such item.
    """
    bad = ~np.isfinite(reward_bg) & (np.asarray(item_bg) >= 0)
    if bad.any():
        row = int(np.asarray(item_bg)[bad][0])
        raise InputError(
            f"the reward of item {item_ids[row]} is {np.asarray(reward_bg)[bad][0]} "
            f"({int(bad.sum())} of {bad.size} rewards are no numbers): look at the reward run's "
            "metrics.jsonl and train it again"
        )
