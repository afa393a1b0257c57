"""Cross-entropy of captions that a decoder writes from compressed item tokens.

Axes: B items, S caption positions, V caption vocabulary.
"""

import jax
import jax.numpy as jnp


def caption_loss(logits_bsv, target_bs, length_b):
    """`- sum_k log P(t^{k+1} | t^1, …, t^k, item)` over the first `length_b` targets.

    OneRec Technical Report (arXiv 2506.13695), section 2.1.1, `L_caption`. The report sums over the
    words of an item. Sums and counts come apart here, so that the caller chooses: the mean over
    items of the sums is the report's, sum over count is nats a word.

    Args:
      logits_bsv: `[B, S, V]`, any float type; position k has read the targets before k.
      target_bs: int32 `[B, S]`; whatever stands past the length is not read.
      length_b: int32 `[B]`, targets that exist, 0 for an item without a caption.

    Returns:
      Float32 sum over the words of each item `[B]`, in nats, and int32 number of words `[B]`.
    """
    length_b = jnp.clip(length_b, 0, target_bs.shape[1])
    valid_bs = jnp.arange(target_bs.shape[1]) < length_b[:, None]
    # Before the softmax: an infinity at a padded position would make its gradient NaN.
    logits_bsv = jnp.where(valid_bs[..., None], logits_bsv.astype(jnp.float32), 0)
    target_bs = jnp.where(valid_bs, target_bs, 0)
    logp_bsv = jax.nn.log_softmax(logits_bsv)
    nll_bs = -jnp.take_along_axis(logp_bsv, target_bs[..., None], axis=-1)[..., 0]
    return jnp.where(valid_bs, nll_bs, 0).sum(1), length_b.astype(jnp.int32)
