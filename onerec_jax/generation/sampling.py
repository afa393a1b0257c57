"""Semantic IDs drawn from the policy: with replacement, and without (stochastic beam search).

Both take one key a user, so that nobody's draws depend on who else is in the batch, encode a user
once for all draws, and compute the first level from one row. Log-probabilities are given twice,
code by code: under the model as it is (the policy of a policy gradient), and under the distribution
that codes were drawn from, which temperature, trie, filter, top-k and top-p change.

Axes: B users, G draws a user, R rows of a level (1, then G), V codes, K best codes, J mask words.
"""

import jax
import jax.numpy as jnp
from flax import struct

from onerec_jax.errors import InputError
from onerec_jax.generation import topk
from onerec_jax.generation.beam import descend, masks
from onerec_jax.generation.filters import Filter
from onerec_jax.generation.trie import Trie


@struct.dataclass
class Samples:
    """IDs drawn for each user. A draw is dead where nothing is legal, or nothing new is left."""

    sid: jax.Array  # int32 [B, G, levels]; -1 if dead
    logp: jax.Array  # float32 [B, G, levels], log P(code | codes before, user); -inf if dead
    sampling_logp: jax.Array  # float32 [B, G, levels], of what was drawn from; -inf if dead
    leaf: jax.Array  # int32 [B, G], leaf of the trie; -1 if dead or drawn without a trie
    perturbed: jax.Array | None = None  # float32 [B, G]; of draws without replacement alone


def sample(
    model,
    variables,
    batch,
    keys,
    *,
    count: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    trie: Trie | None = None,
    filter: Filter | None = None,
) -> Samples:
    """Ancestral sampling: `count` independent IDs of every user, repetitions included.

    On each level logits are divided by the temperature; codes that do not exist or are filtered
    fall away, then all but the `top_k` best, then all but the fewest best that hold `top_p` of the
    probability left; what remains is renormalised.

    Args:
      model: a `OneRec` with `train=False`.
      variables, batch, trie, filter: as `beam_search`.
      keys: B random keys, such as `jax.random.split(key, B)`.
      top_k: codes to keep, the lower ones of equals; 0: all.
      top_p: share of the probability to keep, one code at least; 1: all.

    Raises:
      InputError: a setting out of range, or a filter without a trie.
    """
    _check(temperature)
    if not (0 < top_p <= 1 and top_k >= 0):
        raise InputError(f"top_p {top_p} must be in (0, 1] and top_k {top_k} at least 0")
    codes = model.spec.codebook_size
    kept = min(top_k or codes, codes)

    def draw(key, score_rv):
        """A code of each draw, int32 `[G]`, and its log-probability float32 `[G]`."""
        index_rk = jnp.arange(codes)[None]
        if kept < codes or top_p < 1:
            score_rv, index_rk = topk.top_k(score_rv, kept)
            p_rk = jax.nn.softmax(score_rv)
            above_rk = jnp.cumsum(p_rk, axis=-1) - p_rk
            score_rv = jnp.where(above_rk < top_p, score_rv, -jnp.inf)
        logp_rk = _log_softmax(score_rv)
        choice_g = jax.random.categorical(key, logp_rk, shape=(count,))
        return _pick(index_rk, choice_g), _pick(logp_rk, choice_g)

    cross, cache = model.apply(variables, batch, method="start")
    code = node = jnp.zeros((len(keys), 1), jnp.int32)
    dead = jnp.zeros((len(keys), 1), bool)
    sid, logp, sampling_logp = [], [], []
    for level in range(model.spec.levels):
        # Draws never change places, and all share the cache of the first level as it is.
        logits_brv, cache = model.apply(variables, code, cross, cache, level, method="decode_step")
        exists_brj, legal_brj = masks(trie, filter, node, level)
        score_brv = _masked(logits_brv / temperature, legal_brj, dead)
        code, drawn_from = jax.vmap(draw)(_fold_in(keys, level), score_brv)
        sid.append(code)
        sampling_logp.append(drawn_from)
        logp.append(jax.vmap(_pick)(jax.nn.log_softmax(logits_brv), code))
        dead = jnp.isneginf(drawn_from)
        row = jnp.arange(count) % node.shape[1]  # the one that all share, or each its own
        parent = jnp.broadcast_to(row, code.shape)
        node = descend(trie, level, exists_brj, node, parent, code, dead)
    return _samples(sid, logp, sampling_logp, node, dead)


def sample_without_replacement(
    model,
    variables,
    batch,
    keys,
    *,
    count: int,
    temperature: float = 1.0,
    trie: Trie | None = None,
    filter: Filter | None = None,
) -> Samples:
    """Stochastic beam search: `count` different IDs, as drawn one by one and not put back.

    "Stochastic Beams and Where to Find Them" (arXiv 1903.06059), algorithm 1: every ID's
    log-probability is perturbed by a Gumbel variable of its own, and the best `count` are found top
    down, for the largest below a prefix is a Gumbel variable too, shifted by the prefix's
    log-probability. The root's is drawn, not set to 0, so that `perturbed` are independent.

    `sampling_logp` is the probability of drawing the ID first, not that of finding it among the
    `count` (its inclusion probability), so a mean over draws is no estimate of an expectation. For
    one weigh each by `p / (1 - exp(-exp(log p - kappa)))`, kappa the smallest of `perturbed`, and
    leave the draw of kappa out (section 4.2).

    Args:
      As `sample`.

    Returns:
      `Samples` by descending `perturbed`; fewer than `count` legal IDs leave dead draws at the end.

    Raises:
      InputError: a setting out of range, or a filter without a trie.
    """
    _check(temperature)
    codes = model.spec.codebook_size
    cross, cache = model.apply(variables, batch, method="start")
    code = node = jnp.zeros((len(keys), 1), jnp.int32)
    total = jnp.zeros((len(keys), 1))  # log-probability of the prefix, of what is drawn from
    perturbed = jax.vmap(lambda key: jax.random.gumbel(key, (1,)))(
        _fold_in(keys, model.spec.levels)
    )
    sid, logp, sampling_logp = [], [], []
    for level in range(model.spec.levels):
        logits_brv, cache = model.apply(variables, code, cross, cache, level, method="decode_step")
        exists_brj, legal_brj = masks(trie, filter, node, level)
        drawn_from_brv = _log_softmax(
            _masked(logits_brv / temperature, legal_brj, jnp.isneginf(perturbed))
        )
        total_brv = total[..., None] + drawn_from_brv
        noise_brv = _gumbel(_fold_in(keys, level), logits_brv.shape[1:])
        shifted_brv = _with_maximum(total_brv + noise_brv, perturbed)
        flat = shifted_brv.reshape(len(keys), -1)
        perturbed, index = topk.top_k(flat, min(count, flat.shape[1]))
        parent, code = index // codes, index % codes

        def chosen(x_brv, index=index):
            return jnp.take_along_axis(x_brv.reshape(len(keys), -1), index, axis=1)

        node = descend(trie, level, exists_brj, node, parent, code, jnp.isneginf(perturbed))
        total = chosen(total_brv)
        for values, new in (
            (sid, code),
            (logp, chosen(jax.nn.log_softmax(logits_brv))),
            (sampling_logp, chosen(drawn_from_brv)),
        ):
            values[:] = [jnp.take_along_axis(x, parent, axis=1) for x in values] + [new]
        cache = cache.take(parent)

    found = _samples(sid, logp, sampling_logp, node, jnp.isneginf(perturbed))
    missing = ((0, 0), (0, count - perturbed.shape[1]))
    return Samples(
        sid=jnp.pad(found.sid, (*missing, (0, 0)), constant_values=-1),
        logp=jnp.pad(found.logp, (*missing, (0, 0)), constant_values=-jnp.inf),
        sampling_logp=jnp.pad(found.sampling_logp, (*missing, (0, 0)), constant_values=-jnp.inf),
        leaf=jnp.pad(found.leaf, missing, constant_values=-1),
        perturbed=jnp.pad(perturbed, missing, constant_values=-jnp.inf),
    )


def _check(temperature):
    if not temperature > 0:
        raise InputError(f"temperature {temperature} must be positive")


def _fold_in(keys, level):
    return jax.vmap(lambda key: jax.random.fold_in(key, level))(keys)


def _gumbel(keys, shape):
    return jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys)


def _masked(score_brv, legal_brj, dead_br):
    if legal_brj is not None:
        legal_brv = topk.unpack(legal_brj, score_brv.shape[-1])
        score_brv = jnp.where(legal_brv, score_brv, -jnp.inf)
    return jnp.where(dead_br[..., None], -jnp.inf, score_brv)


def _log_softmax(score):
    """-inf everywhere, and not NaN, where nothing is legal."""
    return jnp.where(jnp.isneginf(score), -jnp.inf, jax.nn.log_softmax(score))


def _pick(x_rv, index_g):
    """One value of each row, `[R, V]` with R of 1 or G, int `[G]` -> `[G]`."""
    rows = jnp.broadcast_to(x_rv, (len(index_g), x_rv.shape[1]))
    return jnp.take_along_axis(rows, index_g[:, None], axis=1)[:, 0]


def _with_maximum(gumbel_brv, maximum_br):
    """Gumbel variables given that the largest of a row is `maximum` (1903.06059, appendix B.3)."""
    gap = gumbel_brv - gumbel_brv.max(-1, keepdims=True)  # at most 0
    gap = jnp.where(jnp.isnan(gap), -jnp.inf, gap)  # rows without a legal code
    # log(1 - exp(gap)), exact at both ends.
    rest = jnp.where(gap > -0.7, jnp.log(-jnp.expm1(gap)), jnp.log1p(-jnp.exp(gap)))
    v = maximum_br[..., None] - gumbel_brv + rest
    found = maximum_br[..., None] - jnp.maximum(v, 0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
    return jnp.where(jnp.isneginf(gumbel_brv), -jnp.inf, found)


def _samples(sid, logp, sampling_logp, node, dead):
    sid, logp, sampling_logp = (jnp.stack(x, axis=-1) for x in (sid, logp, sampling_logp))
    dead = dead[..., None]
    return Samples(
        jnp.where(dead, -1, sid),
        jnp.where(dead, -jnp.inf, logp),
        jnp.where(dead, -jnp.inf, sampling_logp),
        node,
    )
