"""Beam search over semantic IDs, with or without the trie of existing ones.

Every shape is static and the levels unroll, so one `jit` holds the search. The user is encoded once
and beams share its keys and values (OneRec Technical Report, section 5: Pass@K); the first level
has one row a user, for all beams begin alike.

The search is exact: of all continuations of all beams of a level, the best `width` go on. Logits
are read twice, for their logsumexp and for the maxima of chunks (`onerec_jax.generation.topk`);
scores of continuations are never written.

Axes: B users, W beams, V codes, J words of a mask.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from onerec_jax.errors import InputError
from onerec_jax.generation.filters import Filter
from onerec_jax.generation.topk import top_k_of_rows
from onerec_jax.generation.trie import Trie


@struct.dataclass
class Beams:
    """Generated IDs of each user, most probable first."""

    sid: jax.Array  # int32 [B, W, levels]; -1 in dead beams
    logp: jax.Array  # float32 [B, W], log P(ID | user) of the unconstrained model; -inf if dead
    leaf: jax.Array  # int32 [B, W], leaf of the trie; -1 if dead or searched without a trie


def beam_search(
    model,
    variables,
    batch,
    *,
    width: int,
    trie: Trie | None = None,
    filter: Filter | None = None,
) -> Beams:
    """The `width` most probable semantic IDs of every user.

    Log-probabilities are never renormalised over the trie: it removes IDs that do not exist and
    leaves the others as likely as the model says. Nor is `logp` the probability that a search finds
    the ID: beams are chosen, not drawn (for that see `onerec_jax.generation.sampling`).

    A level with fewer candidates than `width` keeps them all; what is missing at the end is dead
    (-inf). Equal scores keep the order of their parents, then of their codes.

    Args:
      model: a `OneRec` with `train=False`: dropless experts, so a user's beams do not depend on who
        else is in the batch.
      variables: its `params` and `router`.
      batch: `Batch` of B users; `target` is not read.
      width: any, beyond the number of codes too.
      trie: legal prefixes, or None to search all codes.
      filter: of the same trie: what of it each user may be given.

    Raises:
      InputError: a filter without a trie.
    """
    spec = model.spec
    cross, cache = model.apply(variables, batch, method="start")
    users, codes = len(cross.length), spec.codebook_size
    score = jnp.zeros((users, 1))
    code = node = jnp.zeros((users, 1), jnp.int32)
    sid = jnp.zeros((users, 1, 0), jnp.int32)
    for level in range(spec.levels):
        logits_bwv, cache = model.apply(variables, code, cross, cache, level, method="decode_step")
        exists_bwj, legal_bwj = masks(trie, filter, node, level)
        score, index = top_k_of_rows(
            logits_bwv,
            score - jax.nn.logsumexp(logits_bwv, axis=-1),
            min(width, logits_bwv.shape[1] * codes),
            legal_bwj,
        )
        parent, code = index // codes, index % codes
        node = descend(trie, level, exists_bwj, node, parent, code, jnp.isneginf(score))
        sid = jnp.take_along_axis(sid, parent[..., None], axis=1)
        sid = jnp.concatenate([sid, code[..., None]], axis=-1)
        cache = cache.take(parent)

    dead = jnp.isneginf(score)
    sid = jnp.where(dead[..., None], -1, sid)
    missing = ((0, 0), (0, width - score.shape[1]))
    return Beams(
        sid=jnp.pad(sid, (*missing, (0, 0)), constant_values=-1),
        logp=jnp.pad(score, missing, constant_values=-jnp.inf),
        leaf=jnp.pad(node, missing, constant_values=-1),
    )


def masks(trie, filter, node_bw, level):
    """Packed masks of the codes that exist below nodes and of those that may follow; or None."""
    if trie is None:
        if filter is not None:
            raise InputError("filters mask nodes of a trie: search with trie=")
        return None, None
    exists_bwj = trie.following(node_bw, level)
    return exists_bwj, exists_bwj if filter is None else filter.legal(exists_bwj, node_bw, level)


def descend(trie, level, exists_bwj, node_bw, parent_bw, code_bw, dead_bw):
    """The nodes behind codes of `level` that beams chose; -1 for dead ones and without a trie."""
    if trie is None:
        return jnp.full_like(code_bw, -1)
    node_bw = jnp.take_along_axis(node_bw, parent_bw, axis=1)
    exists_bwj = jnp.take_along_axis(exists_bwj, parent_bw[..., None], axis=1)
    return jnp.where(dead_bw, -1, trie.child(node_bw, level, exists_bwj, code_bw))


def refuse_nan(beams) -> None:
    """Raises InputError if the model gave some user NaN; for `Beams` or `SessionBeams` that are on
    the host."""
    broken = np.flatnonzero(np.isnan(beams.logp).any(1))
    if len(broken):
        raise InputError(
            f"the model's log-probabilities of {len(broken)} of {len(beams.logp)} users are NaN: "
            "its parameters have diverged; take an earlier checkpoint"
        )
