"""Rollouts: the groups of items that a policy proposes to users, to be rewarded.

OneRec Technical Report (arXiv 2506.13695), section 2.4.1 and Tables 6 to 10. Codes are drawn from
all codes, whether an item has them or not: legality is what the policy has to learn, and the ratio
of two policies needs the log-probabilities of both over the same codes.

Axes: B users, G items of a group, S levels.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from onerec_jax.errors import InputError, require_at_least
from onerec_jax.generation.beam import beam_search
from onerec_jax.generation.sampling import sample, sample_without_replacement
from onerec_jax.generation.trie import Trie
from onerec_jax.losses.ecpo import log_probs
from onerec_jax.sharding import collect, deal
from onerec_jax.tokenizer.semantic_ids import SemanticIds


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How the items of a group are found."""

    group: int = 128
    """Items G a user. The report's rule of thumb is four times what is generated in serving, 512
    there."""
    method: Literal["beam", "sample", "gumbel"] = "beam"
    """beam: the G most probable, as the report prefers; sample: G independent draws; gumbel: G
    different draws, by stochastic beam search."""
    temperature: float = 1.0
    """Of the draws; the ratio is that of the policy itself."""
    top_k: int = 0
    """Of independent draws: codes to keep on each level; 0: all."""
    top_p: float = 1.0
    """Of independent draws: share of the probability to keep on each level."""
    parts: int = 1
    """Parts that the users with rollouts are cut into, one after the other, wherever all codes of
    all items go through the model at once: less memory, the same step."""
    masked: bool = False
    """Draw only IDs that exist: an ablation, in which nothing is left for the format reward."""
    refresh_every: int = 1000
    """Steps after which the policy that draws becomes the present one (1000 in the report); 0:
    never, it stays the pretrained one."""

    def __post_init__(self):
        if self.group < 2:
            raise InputError(
                f"--rollout.group {self.group}: a group needs 2 items or more to compare"
            )
        require_at_least(self, "rollout.", top_k=0, refresh_every=0, parts=1)
        if not (self.temperature > 0 and 0 < self.top_p <= 1):
            name = "temperature" if 0 < self.top_p <= 1 else "top-p"
            value = getattr(self, name.replace("-", "_"))
            raise InputError(f"--rollout.{name} {value} must be above 0, and top-p at most 1")
        other = {"top-k": self.top_k, "top-p": self.top_p != 1}
        if self.method != "sample" and (set_ := [name for name, value in other.items() if value]):
            raise InputError(f"--rollout.{set_[0]} is of --rollout.method sample: leave it out")
        if self.method == "beam" and self.temperature != 1:
            raise InputError("--rollout.temperature is of draws, and beams are not drawn")


@struct.dataclass
class Rollout:
    """What a policy proposed to B users."""

    sid: jax.Array  # int32 [B, G, S]; zeros where dead
    logp: jax.Array  # float32 [B, G, S], log P(code | codes before, user), of all codes
    alive: jax.Array  # bool [B, G]; dead: fewer IDs than G exist


def policy_log_probs(model, variables, batch, sid_bgs, *, parts: int = 1):
    """Log-probabilities and entropies of codes under a policy, float32 `[B, G, S]` each, in nats.

    By teacher forcing, all items of a user behind one pass of the encoder. Sampler and learner both
    come here, so that their ratio is 1 where their parameters are the same: the searches say the
    same but for the rounding of another order of sums.

    Args:
      model: a `OneRec` with `train=False`: dropless experts, no dropout.
      variables: its `params` and `router`.
      batch: `Batch` of B users; `target` is not read.
      sid_bgs: int32 `[B, G, S]`.
      parts: that the users are cut into, one after the other. For gradients call it part by part.
    """
    if parts > 1:
        dealt = deal((batch, sid_bgs), parts)
        found = jax.lax.map(lambda part: policy_log_probs(model, variables, *part), dealt)
        return collect(found)
    logits = model.apply(variables, batch.replace(target=sid_bgs), method="by_level")
    levels = [log_probs(logits_bgv, sid_bgs[..., i]) for i, logits_bgv in enumerate(logits)]
    return tuple(jnp.stack(found, axis=-1) for found in zip(*levels, strict=True))


def draw_ids(model, variables, batch, keys, *, cfg: RolloutConfig, trie: Trie | None = None):
    """The IDs of a group, int32 `[B, G, S]`, -1 where dead; arguments as `rollout`."""
    args = model, variables, batch
    trie = trie if cfg.masked else None
    if cfg.method == "beam":
        return beam_search(*args, width=cfg.group, trie=trie).sid
    options = {"count": cfg.group, "temperature": cfg.temperature, "trie": trie}
    if cfg.method == "gumbel":
        return sample_without_replacement(*args, keys, **options).sid
    return sample(*args, keys, **options, top_k=cfg.top_k, top_p=cfg.top_p).sid


def rollout(model, variables, batch, keys, *, cfg: RolloutConfig, trie: Trie | None = None):
    """A group of each user's items, with the log-probabilities that the policy gives them.

    Args:
      model, variables, batch: as `policy_log_probs`.
      keys: B random keys; not read by beam search.
      trie: of the IDs that exist; for `cfg.masked` alone. Log-probabilities are of all codes then
        too, on both sides of the ratio.
    """
    sid = draw_ids(model, variables, batch, keys, cfg=cfg, trie=trie)
    alive = sid[..., 0] >= 0
    sid = jnp.maximum(sid, 0)
    logp, _ = policy_log_probs(model, variables, batch, sid, parts=cfg.parts)
    return Rollout(sid, logp, alive)


def find_items(sid_bgs: np.ndarray, alive_bg, ids: SemanticIds, offsets, items) -> np.ndarray:
    """The item behind each ID, int32 `[B, G]`; -1 where none has it or the draw is dead.

    Of items that share an ID it is the first in serving order, the one that a list shows first.

    Args:
      offsets, items: from `SemanticIds.items_by_leaf`.
    """
    leaf = np.where(alive_bg, ids.find(sid_bgs), -1)
    return np.where(leaf >= 0, items[offsets[np.maximum(leaf, 0)]], -1).astype(np.int32)


def first_of_each(item_bg: np.ndarray) -> np.ndarray:
    """Which draws count, bool `[B, G]`: of equal items in a group the first, of no item none.

    Repetitions happen in independent draws only. They would pull mean and deviation of a group to
    what is probable already.
    """
    order = np.argsort(item_bg, axis=1, kind="stable")
    ordered = np.take_along_axis(item_bg, order, axis=1)
    first = np.ones(item_bg.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    found = np.empty_like(first)
    np.put_along_axis(found, order, first, axis=1)
    return found & (item_bg >= 0)
