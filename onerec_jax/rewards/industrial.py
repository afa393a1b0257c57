"""Specific Industrial Reward: hold down the share of items that the platform wants less of.

OneRec Technical Report (arXiv 2506.13695), section 2.4.3: content farms' share of exposures rises
if nothing is done; above a target share f their rewards are cut by a factor.

Axes: B users, G items of a group, I items.
"""

import dataclasses
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from onerec_jax.data.schema import Dataset
from onerec_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class IndustrialConfig:
    """Target share f and factor alpha; the report prints neither."""

    target_share: float = 0.05
    """Share of flagged items (f) above which their rewards are cut."""
    factor: float = 0.5
    """What their rewards are multiplied by (alpha)."""

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not 0 < value < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--industrial.{flag} {value} must lie between 0 and 1")


def flagged_items(dataset: Dataset, flagged: str | Collection = "viral_farm") -> np.ndarray:
    """Which items are held down, bool `[I]`.

    Args:
      flagged: a column of the items table (above 0: flagged), or item ids.

    Raises:
      InputError: no such column, ids that no item has, or nothing flagged.
    """
    if isinstance(flagged, str):
        if flagged not in dataset.items.columns:
            raise InputError(
                f"{dataset.name}: the items table has no column {flagged} that flags items: name "
                "another, or give the ids"
            )
        mask, what = (dataset.items[flagged].fill_null(0) > 0).to_numpy(), f"column {flagged}"
    else:
        given, what = dict.fromkeys(flagged), "the list of flagged items"
        ids = dataset.items["item_id"].to_list()
        if unknown := list(given.keys() - set(ids)):
            raise InputError(
                f"{dataset.name}: {len(unknown)} flagged ids are of no item ({min(unknown)!r}, for "
                "one): correct the list"
            )
        mask = np.array([item in given for item in ids])
    if not mask.any():
        raise InputError(
            f"{dataset.name}: {what} flags no item, so the industrial reward would do nothing: "
            "flag some or leave it out"
        )
    return mask


def target_below(share: float, cut: float) -> float:
    """The target share f that lies a part `cut` below the share that nothing holds down.

    Raises:
      InputError: the share is 0, or the cut leaves none of it or all.
    """
    if not 0 < cut < 1:
        raise InputError(f"a cut of {cut} must lie between 0 and 1")
    if not 0 < share <= 1:
        raise InputError(
            f"flagged items have a share of {share:.3g} where nothing holds them down: there is "
            "nothing to cut, flag others"
        )
    return share * (1 - cut)


def flagged_share(flagged_bg, valid_bg):
    """Share of the flagged among the valid items of a batch, float32; 0 without any."""
    return (flagged_bg & valid_bg).sum() / jnp.maximum(valid_bg.sum(), 1)


def industrial_rewards(reward_bg, flagged_bg, share, cfg: IndustrialConfig):
    """`r' = alpha r` for flagged items while their share exceeds f, else `r' = r`.

    To be applied to the preference score before `group_advantages`. A factor below 1 lowers only
    what is positive: scores below 0 would have to be shifted first.

    Args:
      reward_bg: float32 `[B, G]`, from 0 on.
      flagged_bg: bool `[B, G]`.
      share: float or float32 scalar, the share of flagged items now: of exposures, or
        `flagged_share` of what is sampled.
    """
    factor = jnp.where((share > cfg.target_share) & flagged_bg, cfg.factor, 1.0)
    return jnp.asarray(reward_bg, jnp.float32) * factor
