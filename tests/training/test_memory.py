"""Memory before allocation: the state to the byte, activations within reason."""

import flax.linen as nn
import helpers
import jax
import pytest

from onerec_jax.errors import InputError
from onerec_jax.models.dropless import COMMON_LOAD
from onerec_jax.models.onerec import OneRec
from onerec_jax.sharding import MeshConfig
from onerec_jax.training.memory import (
    Memory,
    check_fits,
    policy_memory,
    step_memory,
    user_activations,
)
from onerec_jax.training.optimizer import OptimizerConfig, make_optimizer

CFG, SPEC = helpers.tiny_config(), helpers.full_spec(codebook_size=8)
BATCH = helpers.random_batch(CFG, SPEC, 1)


def memory(mesh=MeshConfig(), users=8, cfg=CFG, **options):  # noqa: B008 (a frozen value)
    tx = make_optimizer(OptimizerConfig(), 100)
    return step_memory(cfg, SPEC, tx, mesh, users=users, **options)


def test_state_of_one_device():
    variables = jax.eval_shape(OneRec(CFG, SPEC).init, jax.random.key(0), BATCH)
    params, router = (
        sum(x.size for x in jax.tree.leaves(nn.unbox(variables[k]))) for k in ("params", "router")
    )
    found = memory()
    assert found.parameters == 4 * (params + router)
    assert found.gradients == 4 * params
    assert found.optimizer == pytest.approx(2 * 4 * params, abs=64)  # and Adam's counters
    assert found.total == found.state + found.gradients + found.activations


def test_what_meshes_and_parts_save():
    whole = memory()
    zero = memory(MeshConfig(data=4))
    assert zero.parameters == whole.parameters
    assert zero.optimizer < whole.optimizer / 2
    split = memory(MeshConfig(fsdp=4))
    assert split.parameters < whole.parameters / 2
    assert memory(MeshConfig(expert=8)).parameters < whole.parameters
    for mesh in (MeshConfig(data=4), MeshConfig(fsdp=4), MeshConfig(expert=4)):
        assert memory(mesh).activations == whole.activations // 4
    assert memory(accumulate=2).activations == whole.activations // 2
    assert memory(cfg=helpers.tiny_config(remat=True)).activations < whole.activations


@pytest.mark.parametrize("items", [1, 5])
def test_activations_are_what_autodiff_keeps(items):
    """Of the size of the residuals of the real backward pass, in a model far from a real one."""
    cfg = helpers.tiny_config(session_items=items)
    model, users = OneRec(cfg, SPEC, train=True), 16
    batch = helpers.random_batch(cfg, SPEC, users, targets=items)
    params = helpers.random_variables(model, batch)

    def loss(params):
        return model.apply(params, batch).sum()

    back = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    # Users come first, or behind the decoder's layers.
    kept = sum(4 * x.size for x in jax.tree.leaves(back) if users in x.shape[:2])
    assert 0.5 < user_activations(cfg, SPEC) * users / max(kept, 1) < 4


def test_activations_of_lists():
    """19 positions in two layers of the decoder and 15 rows of logits, in place of 3 and 3."""
    one, lists = (user_activations(helpers.tiny_config(session_items=m), SPEC) for m in (1, 5))
    row = 2 * 12 * 16 + 2 * 8 * (2 * 16 + 3 * 12)  # of all eight experts: there is no limit
    assert lists - one == 4 * (16 * row + 2 * 12 * 8)


def test_a_joint_step_holds_two_policies_and_two_gradients():
    tx, mesh = make_optimizer(OptimizerConfig(), 100), MeshConfig()
    sizes = {"users": 8, "rollout_users": 4, "group": 16}
    found, tuned = policy_memory(CFG, SPEC, tx, mesh, **sizes), memory()
    usual = helpers.tiny_config(capacity_factor=COMMON_LOAD)
    assert found.parameters == 2 * tuned.parameters
    assert found.gradients == 2 * tuned.gradients
    assert found.optimizer == tuned.optimizer
    assert found.activations == memory(users=4, targets=16, cfg=usual).activations
    assert found.copies == 0
    half = policy_memory(helpers.tiny_config(compute_dtype="bfloat16"), SPEC, tx, mesh, **sizes)
    assert half.copies == tuned.gradients // 2
    assert half.total == half.state + half.gradients + half.activations + half.copies
    parted = policy_memory(CFG, SPEC, tx, mesh, **sizes, parts=2)
    assert parted.activations == memory(users=2, targets=16, cfg=usual).activations
    assert parted.gradients == found.gradients
    sizes |= {"users": 512}  # fine-tuning needs more than the groups
    found = policy_memory(CFG, SPEC, tx, mesh, **sizes, accumulate=2)
    assert found.activations == memory(users=256).activations


def test_a_state_that_does_not_fit():
    found = Memory(parameters=2 << 30, optimizer=4 << 30, gradients=2 << 30, activations=0)
    check_fits(found, 8 << 30)
    with pytest.raises(InputError, match=r"8\.0 GiB a device, 2\.0 GiB more .*--mesh\.fsdp"):
        check_fits(found, 6 << 30)
