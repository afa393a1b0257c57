"""Gradients of early-clipped negatives, beside what the losses' own formulas say of one item."""

import helpers
import jax
import numpy as np
import pytest

from onerec_jax.generation.rollout import policy_log_probs
from onerec_jax.losses.ecpo import PolicyConfig
from onerec_jax.models.onerec import OneRec
from onerec_jax.posttraining.off_policy import negative_gradients

SPEC = helpers.bare_spec()
CFG = helpers.tiny_config(num_experts=0, decoder_layers=1, lifelong_length=0)
MODEL = OneRec(CFG, SPEC)
USERS, GROUP = 2, 4
BATCH = helpers.random_batch(CFG, SPEC, USERS, seed=1)
POLICY = PolicyConfig(epsilon=0.2, delta=0.1)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def drawn():
    """Variables, IDs and the log-probabilities that the policy gives them."""
    variables = helpers.random_variables(MODEL, BATCH)
    sid = np.random.default_rng(0).integers(0, SPEC.codebook_size, (USERS, GROUP, SPEC.levels))
    logp = policy_log_probs(MODEL, variables, BATCH, sid)[0]
    return variables, sid.astype(np.int32), np.asarray(logp)


def gradients(drawn, ratio, advantage, valid=None, **options):
    """As measured where the items' ratios to the old policy are these, `[R, G]`."""
    variables, sid, logp = drawn
    old = logp - np.log(np.asarray(ratio, np.float32))[..., None] / SPEC.levels
    valid = np.ones((USERS, GROUP), bool) if valid is None else valid
    advantage = np.broadcast_to(np.asarray(advantage, np.float32), (USERS, GROUP))
    return negative_gradients(
        MODEL, variables, BATCH, sid, old, advantage, valid, POLICY, **options
    )


def test_one_item_reaches_the_bound(drawn):
    ratio, valid = np.ones((USERS, GROUP)), np.ones((USERS, GROUP), bool)
    ratio[1, 2], ratio[0, 1], valid[0, 1] = 20, 50, False  # the latter counts nowhere
    found = gradients(drawn, ratio, -0.5, valid)
    assert (found["items"], found["share"]) == (1, pytest.approx(1 / 7))
    assert found["ratio"] == pytest.approx(20, rel=1e-4)
    assert found["ecpo"] == pytest.approx(found["bound"], rel=1e-4)
    assert found["grpo"] / found["ecpo"] == pytest.approx(20 / 1.3, rel=1e-3)
    assert found["grpo_item"] == pytest.approx(found["grpo"], rel=1e-3)


def test_several_items_stay_below_the_bound(drawn):
    ratio = np.array([[1.0, 3, 2, 1.1], [9, 1.2, 1.5, 4]])
    advantage = np.array([[-1.0, -1, 1, -1], [-2, -1, -0.5, 0]])  # three early-clipped negatives
    found = gradients(drawn, ratio, advantage)
    assert found["items"] == 3
    assert found["share"] == pytest.approx(3 / 6)
    assert 0 < found["ecpo"] <= found["bound"] * (1 + 1e-5)
    assert found["grpo"] > found["ecpo"]
    assert found["grpo"] <= found["grpo_item"] * (1 + 1e-5)
    assert found["grpo_item"] > found["bound"]
    assert gradients(drawn, ratio, advantage, limit=2)["items"] == 2


def test_on_policy_there_is_nothing_to_measure(drawn):
    found = gradients(drawn, np.ones((USERS, GROUP)), -1.0)
    assert found["items"] == found["share"] == 0
    assert "grpo" not in found
