"""Groups of items: their log-probabilities, their items, repetitions."""

import functools

import helpers
import jax
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.generation.beam import beam_search
from onerec_jax.generation.rollout import (
    RolloutConfig,
    find_items,
    first_of_each,
    policy_log_probs,
    rollout,
)
from onerec_jax.generation.sampling import sample, sample_without_replacement
from onerec_jax.generation.trie import build_trie
from onerec_jax.models.onerec import OneRec
from onerec_jax.tokenizer.semantic_ids import SemanticIds

USERS, GROUP = 3, 10


@pytest.fixture(scope="module")
def made():
    """A model of experts, its variables and a batch."""
    spec = helpers.bare_spec()
    cfg = helpers.tiny_config(num_experts=4, decoder_layers=1, lifelong_length=0, dropout=0.3)
    model, batch = OneRec(cfg, spec), helpers.random_batch(cfg, spec, USERS)
    variables = helpers.random_variables(model, batch)
    keys = jax.random.split(jax.random.key(0), USERS)
    return model, {k: variables[k] for k in ("params", "router")}, batch, keys


SEARCHES = {
    "beam": lambda *args: beam_search(*args[:3], width=GROUP),
    "sample": functools.partial(sample, count=GROUP),
    "gumbel": functools.partial(sample_without_replacement, count=GROUP),
}


@pytest.mark.parametrize("method", SEARCHES)
def test_log_probabilities_are_those_of_the_search_and_of_training(made, method):
    """The searches decode step by step; training sees all codes of all items at once."""
    model, variables, batch, keys = made
    cfg = RolloutConfig(group=GROUP, method=method)

    @helpers.quick_jit
    def draw(variables, batch, keys):
        found = rollout(model, variables, batch, keys, cfg=cfg)
        other = policy_log_probs(model, variables, batch, found.sid[:, 4:5])[0]
        return found, SEARCHES[method](model, variables, batch, keys), other

    found, theirs, alone = jax.device_get(draw(variables, batch, keys))
    assert found.alive.all()
    np.testing.assert_array_equal(found.sid, theirs.sid)
    logp = found.logp.sum(-1) if method == "beam" else found.logp
    np.testing.assert_allclose(logp, theirs.logp, rtol=1e-4, atol=1e-5)
    # Whom an item shares the group with changes nothing.
    np.testing.assert_allclose(alone[:, 0], found.logp[:, 4], rtol=1e-4, atol=1e-5)


def test_masked_rollouts_exist_and_keep_the_log_probabilities_of_all_codes(made):
    """Of four IDs; what is missing to the group is dead."""
    model, variables, batch, keys = made
    ids = helpers.random_ids(4)
    trie = build_trie(ids.leaf_sids, ids.codebook_size)
    cfg = RolloutConfig(group=GROUP, masked=True)
    draw = helpers.quick_jit(functools.partial(rollout, model, cfg=cfg))
    found = jax.device_get(draw(variables, batch, keys, trie=trie))
    np.testing.assert_array_equal(found.alive.sum(1), len(ids.leaf_sids))
    item = find_items(found.sid, found.alive, ids, *ids.items_by_leaf(np.arange(4)))
    np.testing.assert_array_equal(item >= 0, found.alive)
    # Another program, the learner's, gives the same bits: on policy the ratio is 1.
    free = helpers.quick_jit(functools.partial(policy_log_probs, model))
    np.testing.assert_array_equal(free(variables, batch, found.sid)[0], found.logp)
    assert (found.logp.sum(-1) < np.log(1 / 4)).all()  # not renormalised over the four


def test_items_of_ids():
    """The first in serving order stands for an ID; no item for what does not exist or is dead."""
    sids = np.array([[1, 1], [0, 0], [1, 1]], np.int32)
    ids = SemanticIds(sids, np.zeros((2, 2, 1), np.float32), {})
    by_leaf = ids.items_by_leaf(np.array([1, 2, 0]))
    drawn = np.array([[[1, 1], [0, 0], [0, 1], [0, 0]]])
    alive = np.array([[True, True, True, False]])
    np.testing.assert_array_equal(find_items(drawn, alive, ids, *by_leaf), [[2, 1, -1, -1]])


def test_repetitions_by_loops():
    item = np.random.default_rng(0).integers(-1, 5, (20, 9))
    expected = [[x >= 0 and x not in row[:i] for i, x in enumerate(row)] for row in item.tolist()]
    np.testing.assert_array_equal(first_of_each(item), expected)


def test_settings_that_fit_nothing():
    for message, values in {
        "--rollout.group 1": {"group": 1},
        "--rollout.temperature 0": {"method": "sample", "temperature": 0},
        "--rollout.top-p 1.5": {"method": "sample", "top_p": 1.5},
        "--rollout.top-k is of": {"top_k": 3},
        "--rollout.temperature is of draws": {"temperature": 2.0},
        "--rollout.refresh-every -1": {"refresh_every": -1},
    }.items():
        with pytest.raises(InputError, match=message):
            RolloutConfig(**values)


def test_log_probabilities_in_parts_are_the_same(made):
    model, variables, batch, _ = made
    batch = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), batch)
    rng = np.random.default_rng(0)
    sid = rng.integers(0, model.spec.codebook_size, (2 * USERS, GROUP, model.spec.levels))
    sid = sid.astype(np.int32)
    whole, parted = (
        helpers.quick_jit(functools.partial(policy_log_probs, model, parts=parts))(
            variables, batch, sid
        )
        for parts in (1, USERS)
    )
    for one, other in zip(whole, parted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
