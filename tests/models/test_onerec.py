"""The whole model: caches, independence of users, meshes, lowering for TPU."""

import functools
from unittest import mock

import chex
import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding

from onerec_jax.config import PRESETS
from onerec_jax.generation.beam import beam_search
from onerec_jax.generation.trie import build_trie
from onerec_jax.inputs import Batch, Pathway
from onerec_jax.losses.ntp import ntp_loss
from onerec_jax.models import dropless
from onerec_jax.models.onerec import OneRec, resolve_dtype
from onerec_jax.sharding import BATCH, make_mesh, on_mesh, replicated, shardings_of
from onerec_jax.training.optimizer import OptimizerConfig, make_optimizer

CFG, SPEC = helpers.tiny_config(), helpers.full_spec()
USERS = 8
BATCH_OF_8 = helpers.random_batch(CFG, SPEC, USERS)


@functools.cache
def variables():
    return helpers.random_variables(OneRec(CFG, SPEC), BATCH_OF_8)


forward = helpers.quick_jit(OneRec(CFG, SPEC).apply)


def logits_of(batch):
    """Of the first target: `[B, levels, V]`."""
    return np.asarray(forward(variables(), batch))[:, 0]


def test_logits_are_float32_of_the_right_shape_and_read_the_history():
    logits = logits_of(BATCH_OF_8)
    chex.assert_shape(logits, (USERS, SPEC.levels, SPEC.codebook_size))
    chex.assert_type(logits, jnp.float32)
    chex.assert_tree_all_finite(logits)
    other = helpers.random_batch(CFG, SPEC, USERS, seed=5).replace(target=BATCH_OF_8.target)
    assert (np.abs(logits - logits_of(other)).max(-1) > 1e-4).all()


def test_padding_changes_nothing():
    poisoned = helpers.poison(BATCH_OF_8, CFG, SPEC)
    assert (poisoned.lifelong.sid != BATCH_OF_8.lifelong.sid).any()
    np.testing.assert_array_equal(logits_of(BATCH_OF_8), logits_of(poisoned))


def test_a_code_moves_later_levels_only():
    logits = logits_of(BATCH_OF_8)
    for level in range(SPEC.levels):
        target = BATCH_OF_8.target.copy()
        target[..., level] = (target[..., level] + 1) % SPEC.codebook_size
        other = logits_of(BATCH_OF_8.replace(target=target))
        moved = np.abs(logits - other).max(-1) > 1e-5
        np.testing.assert_array_equal(logits[:, : level + 1], other[:, : level + 1])
        assert moved[:, level + 1 :].all()


def test_a_user_does_not_depend_on_the_others():
    """Even with a capacity factor: outside training experts are dropless."""
    cfg = helpers.tiny_config(capacity_factor=0.25)
    apply = helpers.quick_jit(OneRec(cfg, SPEC).apply)

    def run(*args):
        return apply(*args)[:, 0]

    other = helpers.random_batch(CFG, SPEC, USERS, seed=5)
    mixed = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), BATCH_OF_8, other)
    alone = run(variables(), BATCH_OF_8)
    np.testing.assert_array_equal(alone[0], run(variables(), mixed)[0])
    np.testing.assert_allclose(alone, logits_of(BATCH_OF_8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_outside_training_are_those_of_training(remat):
    """Whose heads and dropless experts have backward passes of their own, for memory."""
    cfg = helpers.tiny_config(lifelong_length=0, encoder_layers=1, decoder_layers=1, remat=remat)
    spec = helpers.bare_spec()
    batch = helpers.random_batch(cfg, spec, USERS, targets=3)
    variables = helpers.random_variables(OneRec(cfg, spec), batch)

    @functools.partial(helpers.quick_jit, static_argnames="train")
    def slopes(variables, train):
        def loss(params):
            logits = OneRec(cfg, spec, train).apply(variables | {"params": params}, batch)
            return (jnp.sin(jnp.arange(logits.size).reshape(logits.shape)) * logits).mean()

        return jax.grad(loss)(variables["params"])

    with mock.patch.multiple(dropless, FREE_ROWS=1, COMMON_LOAD=1.0, BLOCK=4):
        found, expected = (slopes(variables, train) for train in (False, True))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-7)
    assert np.abs(found["heads"]).max() > 1e-4


def test_decode_steps_equal_teacher_forcing():
    """Beams hold different codes; each gets the logits that teacher forcing gives these codes."""
    model = OneRec(CFG, SPEC)
    codes = np.random.default_rng(4).integers(0, SPEC.codebook_size, (USERS, 3, 3)).astype(np.int32)

    @helpers.quick_jit
    def steps(variables, batch):
        cross, cache = model.apply(variables, batch, method="start")
        logits = []
        for level in range(SPEC.levels):
            code = codes[:, :, max(level - 1, 0)]
            step, cache = model.apply(variables, code, cross, cache, level, method="decode_step")
            logits.append(step)
        return jnp.stack(logits, axis=2)

    stepped = steps(variables(), BATCH_OF_8)
    for beam in range(3):
        expected = logits_of(BATCH_OF_8.replace(target=codes[:, beam : beam + 1]))
        np.testing.assert_allclose(stepped[:, beam], expected, rtol=1e-4, atol=1e-4)


EVERY_OTHER = helpers.tiny_config(
    encoder_layers=2, expert_every=2, encoder_experts=True, num_experts=4, capacity_factor=0.5
)


@functools.cache
def of_every_other():
    """Variables of the model with experts in every other block of both stacks."""
    return helpers.random_variables(OneRec(EVERY_OTHER, SPEC), BATCH_OF_8)


def test_experts_in_every_other_block():
    tree = nn.unbox(of_every_other())
    for stack in ("encoder", "decoder"):
        blocks = tree["params"][stack]["layers"]
        assert ("ff" in blocks["block_0"], "experts" in blocks["block_0"]) == (True, False)
        assert ("ff" in blocks["block_1"], "experts" in blocks["block_1"]) == (False, True)
    _, updated = helpers.quick_jit(
        functools.partial(OneRec(EVERY_OTHER, SPEC, train=True).apply, mutable=["router_stats"])
    )(tree, BATCH_OF_8)
    stats = updated["router_stats"]["encoder"]["layers"]["block_1"]["experts"]
    _, length = OneRec(EVERY_OTHER, SPEC).apply(tree, BATCH_OF_8, method="encode")
    assert stats["load"].sum() == length.sum() * 2  # real tokens only
    assert stats["dropped"].max() > 0
    poisoned = helpers.poison(BATCH_OF_8, EVERY_OTHER, SPEC)
    apply = helpers.quick_jit(OneRec(EVERY_OTHER, SPEC).apply)
    np.testing.assert_array_equal(apply(tree, BATCH_OF_8), apply(tree, poisoned))


def test_caches_of_grouped_blocks():
    """Decoding by steps equals teacher forcing where a scan step holds two blocks."""
    model, code = OneRec(EVERY_OTHER, SPEC), BATCH_OF_8.target

    @helpers.quick_jit
    def steps(variables, batch):
        cross, cache = model.apply(variables, batch, method="start")
        found = []
        for level in range(SPEC.levels):
            before = code[:, :, max(level - 1, 0)]
            logits, cache = model.apply(
                variables, before, cross, cache, level, method="decode_step"
            )
            found.append(logits)
        return jnp.stack(found, axis=2)

    expected = helpers.quick_jit(model.apply)(of_every_other(), BATCH_OF_8)
    stepped = steps(of_every_other(), BATCH_OF_8)
    np.testing.assert_allclose(stepped, expected, rtol=1e-4, atol=1e-4)


def loss_and_gradients(variables, batch, *, cfg):
    model = OneRec(cfg, SPEC, train=True)

    def loss(params):
        logits, updated = model.apply(
            {**variables, "params": params}, batch, mutable=["router_stats"]
        )
        return ntp_loss(logits, batch.target).mean(), (logits, updated["router_stats"])

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


@functools.cache
def on_one_device():
    run = helpers.quick_jit(functools.partial(loss_and_gradients, cfg=CFG))
    return jax.device_get(run(variables(), BATCH_OF_8))


class MeshTest(chex.TestCase):
    # The first mesh recomputes in the backward pass: that too may change nothing.
    @parameterized.parameters((4, 2, True), (1, 8, False))
    def test_value_and_gradients_are_those_of_one_device(self, data, expert, remat):
        mesh, cfg = make_mesh(data, expert), helpers.tiny_config(remat=remat, unroll=not remat)
        boxed = jax.eval_shape(lambda: OneRec(CFG, SPEC).init(jax.random.key(0), BATCH_OF_8))
        shardings = shardings_of(boxed, mesh)
        run = helpers.quick_jit(
            on_mesh(functools.partial(loss_and_gradients, cfg=cfg), mesh),
            in_shardings=(shardings, NamedSharding(mesh, BATCH)),
            out_shardings=replicated(mesh),
        )
        actual = jax.device_get(run(variables(), BATCH_OF_8))
        chex.assert_trees_all_close(actual, on_one_device(), rtol=1e-3, atol=1e-5, strict=True)


def test_every_weight_is_trained():
    """A gradient that is zero everywhere means a weight that nothing reads."""
    _, grads = on_one_device()
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_load_counts_every_token():
    (_, (_, stats)), _ = on_one_device()
    load = stats["decoder"]["layers"]["block_0"]["experts"]["load"]
    chex.assert_shape(load, (CFG.decoder_layers, CFG.num_experts))
    np.testing.assert_array_equal(load.sum(-1), USERS * SPEC.levels * CFG.experts_per_token)


def test_dropout_acts_in_training_only():
    cfg = helpers.tiny_config(dropout=0.5, num_experts=0, lifelong_length=0)
    batch = helpers.random_batch(cfg, SPEC, USERS, lifelong=[0] * USERS)
    model = OneRec(cfg, SPEC, train=True)
    weights = helpers.random_variables(OneRec(cfg, SPEC), batch)
    run = helpers.quick_jit(lambda key: model.apply(weights, batch, rngs={"dropout": key}))
    a, b = run(jax.random.key(0)), run(jax.random.key(1))
    chex.assert_trees_all_equal(a, run(jax.random.key(0)))
    assert (np.abs(np.asarray(a - b)).max((1, 2)) > 1e-3).all()
    jax.eval_shape(OneRec(cfg, SPEC).apply, weights, batch)  # needs no dropout key


@functools.cache
def tiny_16_bit():
    """The demo's preset in bfloat16, with its abstract state and batch."""
    cfg = PRESETS["tiny"]
    cfg = type(cfg)(**{**vars(cfg), "compute_dtype": "bfloat16", "dropout": 0.0})
    batch = helpers.random_batch(cfg, SPEC, USERS)
    abstract = jax.eval_shape(
        lambda: nn.unbox(OneRec(cfg, SPEC, train=True).init(jax.random.key(0), batch))
    )
    return cfg, batch, abstract


def test_master_weights_and_optimizer_state_are_float32():
    _, _, abstract = tiny_16_bit()
    chex.assert_type(jax.tree.leaves(abstract), jnp.float32)
    tx = make_optimizer(OptimizerConfig(), steps=10)
    state = jax.eval_shape(tx.init, abstract["params"])
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(abstract["params"]))
    chex.assert_type(moments, jnp.float32)


def as_dict(batch):
    """Plain dicts: `jax.export` cannot write `flax.struct` classes to disk."""
    values = dict(vars(batch))
    for name in ("short", "positive", "lifelong"):
        values[name] = dict(vars(values[name]))
    return values


def as_batch(values):
    pathways = {name: Pathway(**values[name]) for name in ("short", "positive", "lifelong")}
    return Batch(**{**values, **pathways})


def test_training_lowers_for_tpu():
    cfg, batch, abstract = tiny_16_bit()

    def step(variables, values):
        (loss, _), grads = loss_and_gradients(variables, as_batch(values), cfg=cfg)
        return loss, grads

    exported = jax.export.export(jax.jit(step), platforms=["tpu"])(abstract, as_dict(batch))
    assert exported.platforms == ("tpu",)
    assert "bf16" in exported.mlir_module()
    assert len(exported.serialize()) > 1000
    chex.assert_type([x.dtype for x in exported.out_avals], jnp.float32)  # loss and gradients


@pytest.mark.parametrize("masked", [True, False])
def test_beam_search_lowers_for_tpu(masked):
    cfg, batch, abstract = tiny_16_bit()
    trie = (
        build_trie(helpers.random_ids(SPEC.num_items).leaf_sids, SPEC.codebook_size)
        if masked
        else None
    )

    def search(variables, values):
        found = beam_search(OneRec(cfg, SPEC), variables, as_batch(values), width=8, trie=trie)
        return dict(vars(found))

    exported = jax.export.export(jax.jit(search), platforms=["tpu"])(abstract, as_dict(batch))
    assert exported.platforms == ("tpu",)
    assert len(exported.serialize()) > 1000


def test_resolve_dtype():
    assert resolve_dtype("auto") == jnp.float32  # the tests run on a CPU
    assert resolve_dtype("bfloat16") == jnp.bfloat16
