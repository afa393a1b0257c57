"""Meshes, what they refuse, and where parameters and batches lie on them."""

import chex
import flax.linen as nn
import helpers
import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from onerec_jax.errors import InputError
from onerec_jax.models.onerec import OneRec
from onerec_jax.sharding import RULES, check_mesh, make_mesh, put_batch, shardings_of


@pytest.mark.parametrize(
    ("flags", "shape"),
    [((1, 1), (1, 1)), ((4, 2), (4, 2)), ((0, 1), (8, 1)), ((0, 2), (4, 2)), ((2, 1), (2, 1))],
)
def test_make_mesh(flags, shape):
    mesh = make_mesh(*flags)
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor")
    assert mesh.devices.shape == (shape[0], 1, shape[1], 1)
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert len({device.id for device in mesh.devices.flat}) == mesh.devices.size


@pytest.mark.parametrize("flags", [(9, 1), (8, 2), (0, 16), (-1, 1), (1, 0), (1, -2)])
def test_a_mesh_that_cannot_be(flags):
    with pytest.raises(InputError, match=r"--mesh\.(data|expert) ") as caught:
        make_mesh(*flags)
    assert "\n" not in str(caught.value)


def test_check_mesh():
    mesh, cfg = make_mesh(4, 2), helpers.tiny_config()
    check_mesh(mesh, cfg, batch_size=16)
    check_mesh(mesh, helpers.tiny_config(num_experts=0), batch_size=8)  # a dense model
    with pytest.raises(InputError, match=r"--train.batch-size 20 .*use 16"):
        check_mesh(mesh, cfg, batch_size=20)
    for size in (3, 0):
        with pytest.raises(InputError, match=rf"--train.batch-size {size} .*use 8"):
            check_mesh(mesh, cfg, batch_size=size)
    with pytest.raises(InputError, match=r"--train.batch-size 24 .*in 2 parts: use 16"):
        check_mesh(mesh, cfg, batch_size=24, accumulate=2)
    for other, changes, words in (
        (mesh, {"num_experts": 5}, "--mesh.expert 2 .*--model.num-experts 5"),
        (make_mesh(tensor=4), {}, "--mesh.tensor 4 .*--model.num-heads 2"),
        (make_mesh(tensor=2), {"expert_dim": 7}, "--mesh.tensor 2 .*--model.expert-dim 7"),
        (make_mesh(fsdp=8), {"d_model": 12}, "--mesh.fsdp 8 .*--model.d-model 12"),
    ):
        with pytest.raises(InputError, match=words):
            check_mesh(other, helpers.tiny_config(**changes), batch_size=16)


def test_where_parameters_lie():
    """Experts on the expert axis, all else everywhere; every axis name is in the table."""
    cfg, spec = helpers.tiny_config(), helpers.full_spec()
    batch, mesh = helpers.random_batch(cfg, spec, 8), make_mesh(4, 2)
    boxed = jax.eval_shape(lambda: OneRec(cfg, spec).init(jax.random.key(0), batch))
    known = {name for name, _ in RULES}
    specs = jax.tree.leaves(nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, P))
    assert {name for spec in specs for name in spec if name} <= known
    split = []
    leaves = jax.tree_util.tree_leaves_with_path(shardings_of(boxed, mesh))
    for path, sharding in leaves:
        if not sharding.is_fully_replicated:
            split.append(path[-1].key)
            assert sharding.spec[:2] == (None, "expert")  # layers, experts
    assert sorted(split) == ["w_in", "w_out"]
    # Every parameter is boxed: a leaf without names would be replicated by accident.
    unboxed = jax.tree_util.tree_leaves_with_path(
        boxed["params"], is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
    for path, leaf in unboxed:
        assert isinstance(leaf, nn.Partitioned), jax.tree_util.keystr(path)


@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (1, 8)])
def test_put_batch_splits_users_over_both_axes(shape):
    cfg, spec = helpers.tiny_config(), helpers.full_spec()
    batch, mesh = helpers.random_batch(cfg, spec, 8), make_mesh(*shape)
    placed = put_batch(batch, mesh)
    chex.assert_trees_all_equal(jax.device_get(placed), batch)
    for leaf in jax.tree.leaves(placed):
        assert isinstance(leaf, jax.Array)
        shards = leaf.addressable_shards
        assert len(shards) == mesh.devices.size
        assert {shard.data.shape[0] for shard in shards} == {8 // mesh.devices.size}
    assert placed.short.tags is not None
    bare = put_batch(helpers.random_batch(cfg, helpers.bare_spec(), 8), mesh)
    assert bare.short.tags is None
    np.testing.assert_array_equal(bare.static.shape, (8, 0))
