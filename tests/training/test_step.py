"""One training step: loss, randomness, router bias, types; the same numbers on every mesh."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import bare_spec, random_batch, random_variables, tiny_config

from onerec_jax.models.onerec import OneRec
from onerec_jax.sharding import make_mesh, put_batch
from onerec_jax.training import step as step_module
from onerec_jax.training.optimizer import OptimizerConfig, make_optimizer
from onerec_jax.training.step import Trainer

SPEC = bare_spec()
USERS = 16
SMALL = {"lifelong_length": 0}
ONE = (1, 1, 1, 1)
MESHES = [ONE, (8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (4, 1, 1, 2), (1, 2, 2, 2)]
"""Devices along data, expert, fsdp and tensor."""
STEPS = 20


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling is nearly all the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def mesh_of(shape):
    data, expert, fsdp, tensor = shape
    return make_mesh(data, expert, fsdp=fsdp, tensor=tensor)


def make_trainer(mesh=ONE, *, seed=0, accumulate=1, tx=None, **changes):
    cfg = tiny_config(**SMALL, **changes)
    tx = tx or make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1), 100)
    example = random_batch(cfg, SPEC, 1)
    model = OneRec(cfg, SPEC, train=True)
    return Trainer(model, tx, mesh_of(mesh), example, seed=seed, accumulate=accumulate)


def batch_of(seed, users=USERS):
    return random_batch(tiny_config(**SMALL), SPEC, users, seed=seed, targets=3)


def copy(state):
    """The step donates its state; tests that look back need another."""
    return jax.tree.map(jnp.copy, state)


def names(tree):
    """Leaves under their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


@pytest.fixture(scope="module")
def start():
    """The host's copy of one initial state."""
    return jax.device_get(make_trainer().init(0))


@pytest.fixture(scope="module")
def histories(start):
    """Metrics of the steps on each mesh, the states after each of the first three, the traces."""
    found = {}
    true_step = step_module.train_step
    for mesh in MESHES:
        traces = []

        def counted(*args, traces=traces, **kwargs):
            traces.append(1)
            return true_step(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_module, "train_step", counted)
            trainer = make_trainer(mesh)
        state, rows, states = jax.device_put(start, trainer.shardings), [], []
        for seed in range(STEPS):
            state, metrics = trainer.step(state, put_batch(batch_of(seed), trainer.mesh))
            rows.append(jax.device_get(metrics))
            if seed < 3:
                states.append(copy(state))
        found[mesh] = rows, states, len(traces)
    return found


@pytest.fixture(scope="module")
def first(histories):
    """Metrics of the first step on one device, and the state after it."""
    rows, states, _ = histories[ONE]
    return rows[0], states[0]


def test_loss_is_the_sum_of_the_levels_by_hand(start, first):
    model = OneRec(tiny_config(**SMALL), SPEC)
    batch = batch_of(0)
    assert len(set(batch.target_count.tolist())) > 1  # some slots of targets are repeats
    logits = np.asarray(jax.jit(model.apply)(start.variables, batch), np.float64)
    expected = np.zeros(3)
    for user in range(USERS):
        for target in range(batch.target_count[user]):
            for level in range(3):
                row, code = logits[user, target, level], batch.target[user, target, level]
                expected[level] += np.log(np.exp(row).sum()) - row[code]
    expected /= batch.target_count.sum()
    np.testing.assert_allclose(first[0]["loss_level"], expected, rtol=1e-5)
    np.testing.assert_allclose(first[0]["loss"], expected.sum(), rtol=1e-5)


def test_gradient_norm_is_reported_before_the_clip(first):
    metrics, after = first
    # One step from zero moments: mu = (1 - b1) * clipped gradient, and the clip is at norm 1.
    norm = optax.tree.norm(optax.tree.get(after.opt_state, "mu")) / 0.1
    assert metrics["grad_norm"] > 1.5
    np.testing.assert_allclose(norm, 1.0, rtol=1e-4)


def test_router_bias_is_moved_by_load_alone(start, histories):
    rows, states, _ = histories[ONE]
    (bias,) = jax.tree.leaves(start.router)
    for metrics, after in zip(rows[:3], states, strict=True):
        load = metrics["load"]  # [layers, E], shares
        assert load.shape == (2, 8)
        np.testing.assert_allclose(load.sum(-1), 1.0, rtol=1e-6)
        bias = bias + tiny_config().router_bias_rate * np.sign(1 / 8 - load)
        np.testing.assert_allclose(jax.tree.leaves(after.router)[0], bias, atol=1e-7)
        assert metrics["max_violation"] == pytest.approx((load.max(-1) * 8 - 1).max(), rel=1e-5)
        assert metrics["dropped"] == 0
    assert np.any(bias != 0)


def test_router_bias_is_in_no_optimizer_leaf(start):
    (bias,) = jax.tree.leaves(start.router)
    # Nothing else has its shape, so that a leaf of that shape would be the bias or its moment.
    leaves = names((start.params, start.opt_state))
    assert [name for name, leaf in leaves.items() if leaf.shape == bias.shape] == []
    chex.assert_trees_all_equal_structs(optax.tree.get(start.opt_state, "mu"), start.params)


def test_without_warm_up_left_the_parameters_move(start, histories):
    """Step 0 has the warm-up's rate of zero; the router moves all the same."""
    states = histories[ONE][1]
    chex.assert_trees_all_equal(jax.device_get(states[0].params), start.params)
    moved, still = names(jax.device_get(states[1].params)), names(start.params)
    assert [name for name in still if np.array_equal(moved[name], still[name])] == []


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_same_losses_on_every_mesh(histories, mesh):
    (one, _, _), (many, states, _) = histories[ONE], histories[mesh]
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
        np.testing.assert_allclose(b["loss_level"], a["loss_level"], rtol=1e-5)
        np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-4)
        np.testing.assert_allclose(b["load"], a["load"], rtol=1e-6)
    assert len({float(row["loss"]) for row in one}) == STEPS
    expected = jax.device_get(histories[ONE][1][-1].router)
    chex.assert_trees_all_equal(jax.device_get(states[-1].router), expected)


@pytest.fixture(scope="module")
def losses():
    """A function: losses of STEPS steps on a mesh, of a smaller model that every axis divides.

    By plain gradient descent, which compiles faster: the optimizer's shares are seen above.
    """
    sizes, tx = {"decoder_layers": 1, "num_heads": 8, "expert_dim": 16}, optax.sgd(0.1)
    model = OneRec(tiny_config(**SMALL, **sizes), SPEC, train=True)
    variables = random_variables(model, batch_of(0))
    start = step_module.TrainState(np.int32(0), **variables, opt_state=tx.init(variables["params"]))

    def run(mesh):
        trainer, found = make_trainer(mesh, tx=tx, **sizes), []
        state = jax.device_put(start, trainer.shardings)
        for seed in range(STEPS):
            state, metrics = trainer.step(state, put_batch(batch_of(seed), trainer.mesh))
            found.append(jax.device_get(metrics["loss"]))
        return found

    return run


@pytest.fixture(scope="module")
def expected(losses):
    return losses(ONE)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("axis", range(4), ids=("data", "expert", "fsdp", "tensor"))
def test_same_losses_along_an_axis(losses, expected, axis, devices):
    """Eight devices are among MESHES."""
    mesh = [1, 1, 1, 1]
    mesh[axis] = devices
    np.testing.assert_allclose(losses(mesh), expected, rtol=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_compiled_once(histories, mesh):
    """A fresh state, a restored one and every batch share one trace."""
    assert histories[mesh][2] == 1


def shares(tree):
    """Share of each leaf that one device holds."""
    return {name: x.addressable_shards[0].data.size / x.size for name, x in names(tree).items()}


def test_what_each_axis_splits(histories):
    """Experts, rows and widths; and under `data` the moments of what is whole (ZeRO-1)."""

    def held(mesh):
        state = histories[mesh][1][-1]
        return shares(state.params), shares(optax.tree.get(state.opt_state, "mu"))

    params, moments = held((8, 1, 1, 1))
    assert set(params.values()) == {1.0}
    assert moments["encoder/layers/block_0/ff/w_in/kernel"] == moments["heads"] == 1 / 8
    params, moments = held((1, 8, 1, 1))
    experts = {name for name in params if name.endswith(("experts/w_in", "experts/w_out"))}
    assert len(experts) == 2
    for name, share in params.items():
        assert share == moments[name] == (1 / 8 if name in experts else 1.0), name
    params, moments = held((1, 1, 8, 1))
    assert params == moments
    assert params["encoder/layers/block_0/ff/w_in/kernel"] == params["heads"] == 1 / 8
    assert params["sid_embedding"] == 1.0  # 15 rows do not divide
    params, _ = held((4, 1, 1, 2))
    assert params["encoder/layers/block_0/attention/q/kernel"] == 0.5
    assert params["decoder/layers/block_0/experts/w_in"] == 0.5
    assert params["sid_embedding"] == 1.0


def test_data_parallel_experts_stay_on_their_device(histories):
    """Tokens of users must not travel to be routed: nothing as long as all tokens is gathered."""
    trainer = make_trainer((8, 1, 1, 1))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_of(0))
    text = trainer.step.lower(trainer.abstract_state, batch).compile().as_text()
    tokens = USERS * 3 * SPEC.levels
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
    assert [shape for shape in gathered if shape.split(",")[0] == str(tokens)] == []


def test_parts_add_up_to_the_whole(start):
    """Gradients, loads and losses of a step in two parts are those of the step."""
    batch, found = batch_of(0), []
    batch = batch.replace(target_count=np.resize([3, 1, 2], USERS).astype(np.int32))
    for parts in (1, 2):
        trainer = make_trainer(accumulate=parts)
        state = jax.device_put(start, trainer.shardings)
        state, metrics = trainer.step(state, put_batch(batch, trainer.mesh))
        found.append(jax.device_get((optax.tree.get(state.opt_state, "mu"), state.router, metrics)))
    chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-6)


def test_init_is_sharded_and_the_same_on_every_mesh(start):
    trainer = make_trainer((2, 4, 1, 1))
    state = trainer.init(0)
    chex.assert_trees_all_close(jax.device_get(state), start, rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, trainer.abstract_state)
    assert not np.array_equal(trainer.init(1).params["heads"], start.params["heads"])
    for leaf, wanted in zip(
        jax.tree.leaves(state), jax.tree.leaves(trainer.abstract_state), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def abstract_step(**changes):
    """State and metrics of a step, as shapes and types: nothing is compiled."""
    trainer = make_trainer(**changes)
    return jax.eval_shape(trainer.step, trainer.abstract_state, batch_of(0))


def test_masters_are_float32_under_bfloat16_compute():
    state, metrics = abstract_step(compute_dtype="bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves((state.params, state.router))} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(state.opt_state)} == {"float32", "int32"}
    assert {str(x.dtype) for x in jax.tree.leaves(metrics)} == {"float32"}
    assert state.step.dtype == jnp.int32


def test_a_dense_model_has_no_router():
    state, metrics = abstract_step(num_experts=0)
    assert jax.tree.leaves(state.router) == []
    assert set(metrics) == {"loss", "loss_level", "grad_norm"}


def test_dropout_depends_on_seed_and_step_only():
    """Seed and step name every mask: randomness needs no checkpoint."""
    cfg = tiny_config(**SMALL, decoder_layers=1, num_experts=0, dropout=0.3)
    model, tx = OneRec(cfg, SPEC, train=True), optax.sgd(0.0)
    batch = batch_of(0, users=4)
    variables = jax.jit(OneRec(cfg, SPEC).init)(jax.random.key(0), batch)
    params = nn.unbox(variables["params"])

    @jax.jit
    def loss(seed, step):
        state = step_module.TrainState(step, params, {}, tx.init(params))
        _, metrics = step_module.train_step(state, batch, model=model, tx=tx, seed=seed)
        return metrics["loss"]

    first = float(loss(0, 5))
    assert float(loss(0, 6)) != first
    assert float(loss(1, 5)) != first
    assert float(loss(0, 5)) == first  # whatever ran in between
