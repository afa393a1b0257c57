"""FLOPs of the preference score: against what XLA counts, and by hand."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import bare_spec, full_spec, random_pathway

from onerec_jax.inputs import RewardBatch
from onerec_jax.models.reward import PScore, RewardConfig
from onerec_jax.training.reward_flops import score_flops


def batch_of(spec, users, history, items) -> RewardBatch:
    rng = np.random.default_rng(0)
    zero = np.zeros((users, items), np.int32)
    return RewardBatch(
        static=np.zeros((users, len(spec.static)), np.int32),
        history=random_pathway(rng, spec, [history] * users, history).replace(age=None),
        seconds=np.zeros((users, history), np.int32) if spec.has_time else None,
        target=random_pathway(rng, spec, [items] * users, items).replace(age=None),
        hidden=zero,
        since=zero,
        label=np.zeros((users, items, 0), np.int8),
    )


@pytest.mark.parametrize("spec", [full_spec(), bare_spec()], ids=["full", "bare"])
@pytest.mark.parametrize("changes", [{}, {"d_model": 128}, {"shared_dims": (512, 256)}])
def test_against_the_compiler(spec, changes):
    """XLA also counts masks, softmaxes and activations: a little more, never less."""
    cfg = RewardConfig(history_length=48, compute_dtype="float32", **changes)
    users, items, content, objectives = 2, 40, 24, ("ctr", "lvtr", "ltr")
    codebooks = np.zeros((spec.levels, spec.codebook_size, content), np.float32)
    model, batch = PScore(cfg, spec, objectives, codebooks), batch_of(spec, users, 48, items)
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))
    cost = jax.jit(model.apply).lower(variables, batch).cost_analysis()
    parts = score_flops(cfg, spec, objectives=3, content=content, history=48, items=items)
    assert 0.97 < sum(parts.values()) * users / cost["flops"] <= 1.0


def test_by_hand():
    """D 4, two heads, one entry, one item, one objective, nothing known but codes of width 3."""
    cfg = RewardConfig(
        d_model=4, num_heads=2, item_dim=5, shared_dims=(6,), tower_dims=(7,), fusion_dims=(8,)
    )
    size = {"objectives": 1, "content": 3}
    parts = score_flops(cfg, bare_spec(), history=1, items=1, **size)
    item, entry, square = (3 + 4 + 5) * 4, 4 * 8 + 8 * 4, 4 * 4
    assert parts["embeddings"] == 2 * 2 * item
    assert parts["history"] == 2 * (entry + 4 * square)  # keys and values, twice
    assert parts["attention"] == 2 * (2 * square + 3 + 5 * 4)
    user = 3 * 4 + 2 * 2
    assert parts["towers"] == 2 * ((user + 4 * 4) * 6 + 6 * 7 + 7)
    assert parts["fusion"] == 2 * ((7 + user + 4) * 8 + 8)
    many = score_flops(cfg, bare_spec(), history=[1, 0], items=[1, 5], **size)
    assert [part[0] for part in many.values()] == list(parts.values())
    assert many["history"][1] == 0
    assert many["fusion"][1] == 5 * parts["fusion"]
