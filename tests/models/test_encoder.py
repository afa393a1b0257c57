"""The encoder: what is padding stays unread, and each part against a twin in NumPy."""

import dataclasses
import functools

import chex
import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.config import PATHWAYS
from onerec_jax.models.encoder import (
    Encoder,
    InteractionFeatures,
    LifelongQFormer,
    PathwayMLP,
    embed_sid,
    pack_valid_first,
)

CFG, SPEC = helpers.tiny_config(), helpers.full_spec()
CLUSTERED = helpers.full_spec(clustered=True)
USERS = 5
SID_TABLE = np.random.default_rng(3).standard_normal((15, 16)).astype(np.float32)
LENGTHS = {"short": [4, 0, 1, 2, 0], "positive": [3, 1, 0, 2, 0], "lifelong": [6, 0, 5, 1, 0]}


def batch_of(spec=SPEC, cfg=CFG, **lengths):
    return helpers.random_batch(cfg, spec, USERS, **{**LENGTHS, **lengths})


@functools.cache
def encoder(spec=SPEC, cfg=CFG):
    """The compiled encoder and random weights."""
    model = Encoder(cfg, spec, jnp.float32)
    return helpers.quick_jit(model.apply), helpers.random_variables(
        model, batch_of(spec, cfg), SID_TABLE
    )


def encode(batch, spec=SPEC, cfg=CFG):
    apply, variables = encoder(spec, cfg)
    return jax.device_get(apply(variables, batch, SID_TABLE))


def test_token_counts_and_finite_values():
    z, length = encode(batch_of())
    # Static 1, short, positive, and 2 queries where there is a lifelong history.
    np.testing.assert_array_equal(length, [1 + 4 + 3 + 2, 1 + 1, 1 + 1 + 2, 1 + 2 + 2 + 2, 1])
    chex.assert_shape(z, (USERS, CFG.encoder_length, CFG.d_model))
    chex.assert_tree_all_finite(z)


def test_content_of_padding_changes_nothing():
    batch = batch_of()
    z, length = encode(batch)
    other_z, other_length = encode(helpers.poison(batch, CFG, SPEC))
    valid = np.arange(z.shape[1]) < length[:, None]
    np.testing.assert_array_equal(other_length, length)
    np.testing.assert_array_equal(z[valid], other_z[valid])


@pytest.mark.parametrize("field", ["sid", "tags", "author", "age", "playtime", "duration", "label"])
@pytest.mark.parametrize("pathway", ["short", "positive", "lifelong"])
def test_every_feature_of_every_pathway_is_read(pathway, field):
    """The counterpart of the test above: it would pass for an encoder that reads nothing."""
    batch = batch_of()
    old = getattr(batch, pathway)
    values = getattr(old, field).copy()
    # User 0 has every slot filled.
    first = values[0, 0]
    values[0, 0] = 1 - first if field == "label" else np.where(first > 1, first - 1, first + 1)
    changed = batch.replace(**{pathway: old.replace(**{field: values})})
    z, _ = encode(batch)
    other, _ = encode(changed)
    assert np.abs(z[0] - other[0]).max() > 1e-4
    np.testing.assert_array_equal(z[1:], other[1:])  # users do not see each other


def test_static_features_are_read():
    batch = batch_of()
    z, _ = encode(batch)
    other, _ = encode(batch.replace(static=(batch.static + 1) % 3))
    assert (np.abs(z - other).max((1, 2)) > 1e-4).all()


def test_order_within_a_pathway_counts():
    batch = batch_of()
    turned = jax.tree.map(lambda x: x if x.ndim == 1 else x[:, ::-1], batch.short)
    z, _ = encode(batch)
    other, _ = encode(batch.replace(short=turned))
    assert np.abs(z[0] - other[0]).max() > 1e-4


def test_pathways_are_told_apart():
    """The same interaction as short-term and as positive history encodes differently."""
    batch = batch_of(short=[1] * USERS, positive=[0] * USERS, lifelong=[0] * USERS)
    only_positive = batch.replace(
        short=batch.short.replace(length=np.zeros(USERS, np.int32)),
        positive=jax.tree.map(
            lambda short, old: short if short.ndim == 1 else short[:, : old.shape[1]],
            batch.short,
            batch.positive,
        ),
    )
    z, length = encode(batch)
    other, other_length = encode(only_positive)
    np.testing.assert_array_equal(length, other_length)
    assert (np.abs(z[:, :2] - other[:, :2]).max((1, 2)) > 1e-4).all()


def test_a_user_without_anything():
    """No static feature and no history: no token, and nothing that is not finite."""
    spec = helpers.bare_spec()
    empty = {name: [0] * USERS for name in LENGTHS}
    z, length = encode(batch_of(spec, **empty), spec)
    np.testing.assert_array_equal(length, 0)
    chex.assert_tree_all_finite(z)


def test_positions_are_those_of_the_slot_before_packing():
    """A pathway's first position moves the users who have something there, and nobody else."""
    apply, variables = encoder()
    batch = batch_of()
    z, length = encode(batch)
    valid = np.arange(z.shape[1]) < length[:, None]
    for name in LENGTHS:
        position = variables["params"][f"position_{name}"]["embedding"].copy()
        position[0] += 1
        params = {**variables["params"], f"position_{name}": {"embedding": position}}
        other, _ = jax.device_get(apply({"params": params}, batch, SID_TABLE))
        moved = (np.abs(z - other).max(-1) * valid).max(1) > 1e-6
        np.testing.assert_array_equal(moved, np.array(LENGTHS[name]) > 0, err_msg=name)


def test_items_of_their_own_instead_of_codes():
    cfg = helpers.tiny_config(history_item="item")
    pathway, spec = batch_of().short, helpers.bare_spec()
    model = InteractionFeatures(cfg, spec, jnp.float32)
    variables = helpers.random_variables(model, {"short": pathway}, SID_TABLE)
    f = helpers.quick_jit(model.apply)(variables, {"short": pathway}, SID_TABLE)["short"]
    chex.assert_trees_all_equal(f, variables["params"]["item"][pathway.item + 1])
    chex.assert_shape(variables["params"]["item"], (spec.num_items + 1, cfg.d_model))


def test_pack_valid_first_against_a_loop():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((6, 7, 2)).astype(np.float32)
    valid = rng.random((6, 7)) < 0.5
    valid[0], valid[1] = False, True
    packed, length = jax.device_get(pack_valid_first(jnp.asarray(z), jnp.asarray(valid)))
    for user in range(6):
        expected = [z[user, t] for t in range(7) if valid[user, t]]
        assert length[user] == len(expected)
        for place, token in enumerate(expected):
            np.testing.assert_array_equal(packed[user, place], token)
    gradient = jax.grad(lambda z: (pack_valid_first(z, valid)[0][:, 0] ** 2).sum())(z)
    first = np.where(valid.any(1), valid.argmax(1), 0)
    expected = np.zeros_like(z)
    expected[np.arange(6), first] = 2 * z[np.arange(6), first]
    chex.assert_trees_all_close(gradient, expected)


def test_embed_sid_by_hand():
    table = np.arange(12, dtype=np.float32).reshape(6, 2)  # 2 levels of 3 codes
    out = embed_sid(jnp.asarray(table), jnp.array([[[2, 0], [1, 2]]]), 3, jnp.float32)
    chex.assert_trees_all_equal(out, jnp.array([[table[2] + table[3], table[1] + table[5]]]))


def leaky(x):
    return np.where(x > 0, x, 0.01 * x)


def test_features_and_mlp_of_one_pathway_in_numpy():
    batch = batch_of()
    pathway = batch.positive
    model = InteractionFeatures(CFG, SPEC, jnp.float32)
    variables = helpers.random_variables(model, {"positive": pathway}, SID_TABLE)
    f = helpers.quick_jit(model.apply)(variables, {"positive": pathway}, SID_TABLE)["positive"]
    weights = variables["params"]

    def known(name, index):
        return weights[name][index] * (index > 0)[..., None]

    tags = np.zeros((USERS, CFG.positive_length, CFG.feature_dim), np.float32)
    for b, t in np.ndindex(USERS, CFG.positive_length):
        present = [tag for tag in pathway.tags[b, t] if tag > 0]
        if present:
            tags[b, t] = np.mean([weights["tag"][tag] for tag in present], axis=0)
    parts = [
        sum(SID_TABLE[level * 5 + pathway.sid[..., level]] for level in range(3)),
        known("author", pathway.author),
        tags,
        known("age", pathway.age),
        known("playtime", pathway.playtime),
        known("duration", pathway.duration),
        pathway.label @ weights["label"]["kernel"],
    ]
    expected = np.concatenate(parts, axis=-1)
    chex.assert_shape(f, (USERS, 3, 16 + 8 + 5 * 4))
    chex.assert_trees_all_close(np.asarray(f), expected, rtol=1e-5, atol=1e-5)

    mlp = PathwayMLP(16, 16, jnp.float32)
    variables = helpers.random_variables(mlp, f)
    p, h = variables["params"], helpers.quick_jit(mlp.apply)(variables, f)
    twin = leaky(expected @ p["w_in"]["kernel"] + p["w_in"]["bias"])
    twin = twin @ p["w_out"]["kernel"] + p["w_out"]["bias"]
    chex.assert_trees_all_close(np.asarray(h), twin, rtol=1e-4, atol=1e-4)


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_qformer_one_user_at_a_time_in_numpy():
    cfg = helpers.tiny_config(lifelong_blocks=2)
    rng = np.random.default_rng(0)
    v = rng.standard_normal((3, 6, 16)).astype(np.float32)
    lengths = np.array([6, 1, 3], np.int32)
    qformer = LifelongQFormer(cfg, jnp.float32)
    variables = helpers.random_variables(qformer, v, lengths)
    p, out = variables["params"], helpers.quick_jit(qformer.apply)(variables, v, lengths)
    chex.assert_shape(out, (3, cfg.lifelong_queries, 16))
    for user, length in enumerate(lengths):
        h, memory = p["query"], rms(v[user, :length]) * p["norm_kv"]["scale"]
        for i in range(2):
            maps = p[f"attention_{i}"]
            q = np.einsum(
                "td,dhk->thk", rms(h) * p[f"norm_attention_{i}"]["scale"], maps["q"]["kernel"]
            )
            k, value = (np.einsum("td,dhk->thk", memory, maps[n]["kernel"]) for n in "kv")
            score = np.einsum("qhk,thk->hqt", q, k) / np.sqrt(8)
            weight = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
            y = np.einsum("hqt,thk->qhk", weight, value)
            h = h + np.einsum("qhk,hkd->qd", y, maps["o"]["kernel"])
            ff = p[f"ff_{i}"]
            h = (
                h
                + gelu(rms(h) * p[f"norm_ff_{i}"]["scale"] @ ff["w_in"]["kernel"])
                @ ff["w_out"]["kernel"]
            )
        chex.assert_trees_all_close(np.asarray(out[user]), h, rtol=1e-4, atol=1e-4)


def test_a_lifelong_length_of_zero_switches_the_pathway_off():
    cfg = helpers.tiny_config(lifelong_length=0)
    model, batch = Encoder(cfg, SPEC, jnp.float32), batch_of(cfg=cfg, lifelong=[0] * USERS)
    variables = helpers.random_variables(model, batch, SID_TABLE)
    assert "qformer" not in variables["params"]
    z, length = jax.eval_shape(model.apply, variables, batch, SID_TABLE)
    chex.assert_shape([z, length], [(USERS, cfg.encoder_length, cfg.d_model), (USERS,)])
    assert cfg.encoder_length == 1 + cfg.short_length + cfg.positive_length


@functools.cache
def initial(cfg):
    """The encoder's own initial parameters under their paths."""
    model = Encoder(cfg, CLUSTERED, jnp.float32)
    init = helpers.quick_jit(model.init)
    drawn = init(jax.random.key(0), batch_of(CLUSTERED), SID_TABLE)["params"]
    leaves = jax.tree_util.tree_flatten_with_path(nn.unbox(drawn))[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("off", PATHWAYS)
def test_a_pathway_switched_off_leaves_the_others_as_they_are(off):
    """Its own parameters are gone, all others are there with the same initial values."""
    whole = initial(CFG)
    rest = initial(dataclasses.replace(CFG, pathways=[name for name in PATHWAYS if name != off]))
    gone = set(whole) - set(rest)
    assert gone
    assert not set(rest) - set(whole)
    own = {off, "qformer", "count"} if off == "lifelong" else {off}
    assert all(any(word in name for word in own) for name in gone), gone
    chex.assert_trees_all_equal(rest, {name: whole[name] for name in rest})


@pytest.mark.parametrize("off", PATHWAYS)
def test_a_pathway_switched_off_is_not_read(off):
    """Its tokens are missing, and what remains is as if every user had none of it."""
    cfg = dataclasses.replace(CFG, pathways=[name for name in PATHWAYS if name != off])
    _, variables = encoder()
    batch = batch_of()
    apply = helpers.quick_jit(Encoder(cfg, SPEC, jnp.float32).apply)
    z, length = apply(variables, batch, SID_TABLE)
    if off == "static":
        assert z.shape[1] == CFG.encoder_length - 1
        return
    empty = getattr(batch, off).replace(length=np.zeros(USERS, np.int32))
    expected, expected_length = encode(batch.replace(**{off: empty}))
    np.testing.assert_array_equal(length, expected_length)
    valid = np.arange(z.shape[1]) < length[:, None]
    chex.assert_trees_all_close(z[valid], expected[:, : z.shape[1]][valid], atol=1e-5)


def test_batches_whose_lives_are_all_short_come_with_fewer_slots():
    batch = batch_of(CLUSTERED, lifelong=[2, 0, 1, 1, 0])
    apply, variables = encoder(CLUSTERED)
    cut = jax.tree.map(lambda x: x if x.ndim == 1 else x[:, :2], batch.lifelong)
    z, length = encode(batch, CLUSTERED)
    short, short_length = apply(variables, batch.replace(lifelong=cut), SID_TABLE)
    np.testing.assert_array_equal(length, short_length)
    chex.assert_trees_all_close(short, z, atol=1e-5)
    batch = batch_of(CLUSTERED, lifelong=[0] * USERS)
    none = jax.tree.map(lambda x: x if x.ndim == 1 else x[:, :0], batch.lifelong)
    z, length = encode(batch, CLUSTERED)
    empty, empty_length = apply(variables, batch.replace(lifelong=none), SID_TABLE)
    np.testing.assert_array_equal(length, empty_length)
    valid = np.arange(empty.shape[1]) < length[:, None]
    chex.assert_trees_all_close(empty[valid], z[:, : empty.shape[1]][valid], atol=1e-5)


def test_member_counts_are_read_and_unknown_ones_add_nothing():
    batch = batch_of(CLUSTERED)
    z, _ = encode(batch, CLUSTERED)
    lifelong = batch.lifelong
    more = batch.replace(lifelong=lifelong.replace(count=1 + lifelong.count % 60))
    other, _ = encode(more, CLUSTERED)
    has = np.array(LENGTHS["lifelong"]) > 0
    np.testing.assert_array_equal(np.abs(z - other).max((1, 2)) > 1e-5, has)


def test_features_switched_off():
    cfg = helpers.tiny_config(features=())
    model = InteractionFeatures(cfg, SPEC, jnp.float32)
    pathway = batch_of().short
    variables = model.init(jax.random.key(0), {"short": pathway}, SID_TABLE)
    f = model.apply(variables, {"short": pathway}, SID_TABLE)["short"]
    chex.assert_trees_all_close(f, embed_sid(jnp.asarray(SID_TABLE), pathway.sid, 5, jnp.float32))
    assert not variables
