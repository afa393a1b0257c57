"""The format reward: push up what is legal, whatever it is worth.

OneRec Technical Report (arXiv 2506.13695), section 2.4.2. Negative advantages squeeze probability
out of legal codes; K items drawn from each group at random push it back. Drawn from the top instead
they would soon all be legal and teach nothing about the rest.

Axes: B users, G items of a group, S levels, K items drawn.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax.errors import InputError
from onerec_jax.tokenizer.semantic_ids import SemanticIds, sid_keys


def format_advantages(
    key, legal_bg, k: int, *, choose: Literal["random", "top"] = "random", logp_bg=None
):
    """A = 1 for the legal of K chosen items; for the policy loss as they are, not normalised.

    Args:
      key: of this step; for the random choice.
      legal_bg: bool `[B, G]`, whether an item of the catalogue has the sampled ID.
      k: items to choose of each group.
      choose: at random, as the report does, or the K of highest `logp_bg`, its ablation.
      logp_bg: float32 `[B, G]`, log-probabilities under the sampling policy; for "top".

    Returns:
      Advantages float32 `[B, G]`, 1 or 0, and bool `[B, G]`, which items count: those that are
      chosen and legal. An illegal item is discarded and never a negative.

    Raises:
      InputError: K below 1 or above G.
    """
    g = legal_bg.shape[1]
    if not 1 <= k <= g:
        raise InputError(f"the format reward chooses {k} of groups of {g} items: give 1 to {g}")
    order_bg = jax.random.uniform(key, legal_bg.shape) if choose == "random" else logp_bg
    _, place_bk = jax.lax.top_k(order_bg, k)
    chosen_bg = jax.nn.one_hot(place_bk, g, dtype=bool).any(1)
    counts_bg = chosen_bg & legal_bg
    return counts_bg.astype(jnp.float32), counts_bg


def legal_prefixes(sid_bgs: np.ndarray, ids: SemanticIds) -> np.ndarray:
    """Whether the first codes of sampled IDs begin the ID of some item.

    Args:
      sid_bgs: int `[..., S]`.

    Returns:
      Bool `[..., S]`; the last level says whether the whole ID is legal. Its mean over samples is
      the legality rate by level.
    """
    legal = []
    for level, known in enumerate(ids.prefix_keys, start=1):
        key = sid_keys(np.asarray(sid_bgs)[..., :level], ids.codebook_size)
        legal.append(known[np.minimum(np.searchsorted(known, key), len(known) - 1)] == key)
    return np.stack(legal, axis=-1)
