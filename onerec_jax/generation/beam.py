"""Beam search over semantic IDs, with or without the trie of existing ones.

Every shape is static and the three levels unroll, so one `jit` holds the search. The user is
encoded once; beams share its keys and values (OneRec Technical Report, section 5: Pass@K).

Axes: B users, W beams, C candidates a beam, V codes.
"""

import jax
import jax.numpy as jnp
from flax import struct

from onerec_jax.generation.trie import Trie


@struct.dataclass
class Beams:
    """Generated IDs of each user, most probable first."""

    sid: jax.Array  # int32 [B, W, levels]; -1 in dead beams
    logp: jax.Array  # float32 [B, W], log P(ID | user) of the unconstrained model; -inf if dead
    leaf: jax.Array  # int32 [B, W], leaf of the trie; -1 if dead or searched without a trie


def beam_search(model, variables, batch, *, width: int, trie: Trie | None = None) -> Beams:
    """The `width` most probable semantic IDs of every user.

    Log-probabilities are never renormalised over the trie: it removes IDs that do not exist and
    leaves the others as likely as the model says. A level with fewer candidates than `width` keeps
    them all; what is missing at the end is dead (-inf). Equal scores keep the order of their
    parents, then of their codes.

    Args:
      model: a `OneRec` with `train=False`: dropless experts, so a user's beams do not depend on who
        else is in the batch.
      variables: its `params` and `router`.
      batch: `Batch` of B users; `target` is not read.
      trie: legal prefixes, or None to search all codes.
    """
    spec = model.spec
    users = batch.short.length.shape[0]
    cross, cache = model.apply(variables, batch, 1, method="start")
    score = jnp.zeros((users, 1))
    code = node = jnp.zeros((users, 1), jnp.int32)
    sid = jnp.zeros((users, 1, 0), jnp.int32)
    for level in range(spec.levels):
        logits, cache = model.apply(variables, code, cross, cache, level, method="decode_step")
        logp_bwv = jax.nn.log_softmax(logits)
        if trie is None:
            child_bwc, code_bwc = None, None
            score_bwc = score[..., None] + logp_bwv
        else:
            child_bwc, code_bwc, exists = trie.children(node, level)
            gathered = jnp.take_along_axis(logp_bwv, code_bwc, axis=-1)
            score_bwc = jnp.where(exists, score[..., None] + gathered, -jnp.inf)
        candidates = score_bwc.shape[-1]
        flat = score_bwc.reshape(users, -1)
        score, index = jax.lax.top_k(flat, min(width, flat.shape[1]))
        parent = index // candidates
        if trie is None:
            code = index % candidates
        else:
            code = jnp.take_along_axis(code_bwc.reshape(users, -1), index, axis=1)
            node = jnp.take_along_axis(child_bwc.reshape(users, -1), index, axis=1)
        sid = jnp.take_along_axis(sid, parent[..., None], axis=1)
        sid = jnp.concatenate([sid, code[..., None]], axis=-1)
        cache = cache.take(parent)

    dead = jnp.isneginf(score)
    leaf = jnp.where(dead, -1, node) if trie is not None else jnp.full_like(code, -1)
    sid = jnp.where(dead[..., None], -1, sid)
    missing = ((0, 0), (0, width - score.shape[1]))
    return Beams(
        sid=jnp.pad(sid, (*missing, (0, 0)), constant_values=-1),
        logp=jnp.pad(score, missing, constant_values=-jnp.inf),
        leaf=jnp.pad(leaf, missing, constant_values=-1),
    )
