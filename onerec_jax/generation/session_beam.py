"""Beam search over whole lists: the most probable sequences of m different semantic IDs.

OneRec V0 (arXiv 2502.18965), section 3.3: a model of lists, beams of width 128, m = 5. As
`onerec_jax.generation.beam`, item after item: of all continuations of all beams of a position, the
best `width` go on, whatever the item. The user is encoded once; the last code of an item and the
next BOS go through the decoder in one pass of two positions.

No list holds an ID twice. Where a beam's item could only become one that its list has, it does not
go: a code is forbidden as soon as all IDs below it are in the list. Scores stay those of the
unconstrained model.

Axes: B users, W beams, I items so far, V codes, J words of a mask, X listed nodes of a filter.
"""

import jax
import jax.numpy as jnp
from flax import struct

from onerec_jax.errors import InputError
from onerec_jax.generation.beam import descend, masks
from onerec_jax.generation.filters import Filter
from onerec_jax.generation.topk import top_k_of_rows
from onerec_jax.generation.trie import Trie


@struct.dataclass
class SessionBeams:
    """Generated lists of each user, most probable first."""

    sid: jax.Array  # int32 [B, W, m, levels]; -1 in dead beams
    logp: jax.Array  # float32 [B, W], log P(list | user) of the unconstrained model; -inf if dead
    leaf: jax.Array  # int32 [B, W, m], leaves of the trie; -1 if dead or searched without a trie


def session_beam_search(
    model,
    variables,
    batch,
    *,
    width: int,
    items: int | None = None,
    trie: Trie | None = None,
    filter: Filter | None = None,
) -> SessionBeams:
    """The `width` most probable lists of every user.

    Args:
      model: a `OneRec` of lists, with `train=False`.
      variables, batch, width, trie, filter: as `beam_search`; the filter holds for every item.
      items: m, at most the model's `session_items`; None: as many.

    Raises:
      InputError: a list longer than the model's, or a filter without a trie.
    """
    spec, longest = model.spec, model.cfg.session_items
    items = longest if items is None else items
    if not 1 <= items <= longest:
        raise InputError(
            f"lists of {items} items: the model generates 1 to {longest} "
            "(--sessions.items of its training)"
        )
    cross, cache = model.apply(variables, batch, method="start")
    users, codes = len(cross.length), spec.codebook_size
    score = jnp.zeros((users, 1))
    code = jnp.zeros((users, 1), jnp.int32)
    # Codes, and nodes behind each of them, of the items so far.
    listed = path = jnp.zeros((users, 1, 0, spec.levels), jnp.int32)
    for item in range(items):
        node = jnp.zeros_like(code)
        sid = nodes = jnp.zeros((*code.shape, 0), jnp.int32)
        for level in range(spec.levels):
            logits_bwv, cache = model.apply(
                variables, code, cross, cache, level, item, method="decode_step"
            )
            exists_bwj, legal_bwj = masks(trie, filter, node, level)
            if item:
                done_bwj = complete(listed, path, sid, level, codes, trie, filter)
                if done_bwj is not None:
                    legal_bwj = ~done_bwj if legal_bwj is None else legal_bwj & ~done_bwj
            score, index = top_k_of_rows(
                logits_bwv,
                score - jax.nn.logsumexp(logits_bwv, axis=-1),
                min(width, logits_bwv.shape[1] * codes),
                legal_bwj,
            )
            parent, code = index // codes, index % codes
            node = descend(trie, level, exists_bwj, node, parent, code, jnp.isneginf(score))
            sid, nodes, listed, path = jax.tree.map(
                lambda x, p=parent: _take(x, p), (sid, nodes, listed, path)
            )
            sid = jnp.concatenate([sid, code[..., None]], axis=-1)
            nodes = jnp.concatenate([nodes, node[..., None]], axis=-1)
            cache = cache.take(parent)
        listed = jnp.concatenate([listed, sid[:, :, None]], axis=2)
        path = jnp.concatenate([path, nodes[:, :, None]], axis=2)

    dead = jnp.isneginf(score)[..., None]
    missing = ((0, 0), (0, width - score.shape[1]))
    return SessionBeams(
        sid=jnp.pad(
            jnp.where(dead[..., None], -1, listed), (*missing, (0, 0), (0, 0)), constant_values=-1
        ),
        logp=jnp.pad(score, missing, constant_values=-jnp.inf),
        leaf=jnp.pad(jnp.where(dead, -1, path[..., -1]), (*missing, (0, 0)), constant_values=-1),
    )


def _take(x, parent_bw):
    return jnp.take_along_axis(x, parent_bw.reshape(*parent_bw.shape, *(1,) * (x.ndim - 2)), 1)


def complete(listed_bwil, path_bwil, sid_bwl, level: int, codes: int, trie=None, filter=None):
    """Codes of `level` below which a beam could only find IDs that its list has.

    Args:
      listed_bwil: int32 `[B, W, I, levels]`, codes of the items in each list, all different.
      path_bwil: int32, likewise: the nodes of the trie behind these codes.
      sid_bwl: int32 `[B, W, level]`, codes of the item that is being decoded.
      codes: V.
      trie, filter: of the search.

    Returns:
      Packed mask uint32 `[B, W, J]`, or None where no list is long enough for one.
    """
    items, levels = listed_bwil.shape[2:]
    below = codes ** (levels - 1 - level)  # IDs below a code where all codes exist
    if trie is None and below > items:
        return None
    here_bwi = (listed_bwil[..., :level] == sid_bwl[:, :, None]).all(-1)
    code_bwi = listed_bwil[..., level]
    same_bwii = code_bwi[..., None] == code_bwi[:, :, None]
    found_bwi = (same_bwii & here_bwi[:, :, None]).sum(-1)  # in the list, below the same code
    if trie is not None:
        below = ids_below(path_bwil[..., level], level + 1, trie, filter)
    done_bwi = here_bwi & (found_bwi == below)
    word = jnp.arange(-(-codes // 32))
    mask = jnp.zeros((*code_bwi.shape[:2], len(word)), jnp.uint32)
    for item in range(items):
        done, code = done_bwi[..., item, None], code_bwi[..., item, None]
        bit = jnp.uint32(1) << (code % 32).astype(jnp.uint32)
        mask |= jnp.where(done & (word == code // 32), bit, 0)
    return mask


def ids_below(node_bwi, level: int, trie: Trie, filter: Filter | None = None):
    """IDs that a user may be given below nodes of `level` (those of its leaves are themselves).

    Args:
      node_bwi: int32 `[B, W, I]`; what is said of -1 means nothing.
      filter: counted if it is given; the node itself must not be masked.

    Returns:
      Int32 `[B, W, I]`.
    """
    first = jnp.maximum(node_bwi, 0)
    end, last = first + 1, trie.levels - 1
    if level > last:
        return jnp.ones_like(node_bwi)
    for below in range(level, last):
        first, end = trie.start[below][first], trie.start[below][end]
    if filter is None:
        return trie.start[last][end] - trie.start[last][first]
    # Listed nodes of the last level are leaves; what is above them lies between first and end.
    parent_bx = filter.parent[:, last]
    inside_bwix = (parent_bx[:, None, None] >= first[..., None]) & (
        parent_bx[:, None, None] < end[..., None]
    )
    named = inside_bwix.sum(-1)
    every = trie.start[last][end] - trie.start[last][first]
    return jnp.where(filter.keep[:, None, None], named, every - named)
