"""Parameters and FLOPs: against the real parameter tree and against what XLA counts."""

import dataclasses
import json

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import bare_spec, full_spec, random_batch, tiny_config

from onerec_jax.config import PRESETS
from onerec_jax.generation.beam import beam_search
from onerec_jax.generation.sampling import sample
from onerec_jax.models.onerec import OneRec
from onerec_jax.tokenizer.config import TokenizerConfig
from onerec_jax.training.flops import (
    VOCABULARIES,
    abstract_batch,
    count_parameters,
    forward_flops,
    generation_flops,
    nominal_spec,
    train_flops,
)


def parameters_of(cfg, spec):
    batch = random_batch(cfg, spec, 2)
    boxed = jax.eval_shape(OneRec(cfg, spec).init, jax.random.key(0), batch)
    return nn.unbox(boxed["params"])


@pytest.mark.parametrize("spec", [full_spec(), bare_spec()], ids=["full", "bare"])
@pytest.mark.parametrize("num_experts", [0, 8])
def test_parts_add_up_to_the_tree(spec, num_experts):
    cfg = tiny_config(num_experts=num_experts)
    params = parameters_of(cfg, spec)
    parts = count_parameters(params)
    assert sum(parts.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert ("experts" in parts) == bool(num_experts)


@pytest.mark.parametrize("spec", [full_spec(clustered=True), bare_spec()], ids=["full", "bare"])
def test_abstract_batch(spec):
    """The shapes of a real one."""
    cfg = tiny_config()
    abstract = abstract_batch(cfg, spec)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, random_batch(cfg, spec, 1))


def test_parts_by_hand():
    """D 16, three levels of 5 codes, two decoder layers of eight experts."""
    cfg = tiny_config()
    parts = count_parameters(parameters_of(cfg, bare_spec()))
    d, f, e, layers = 16, 12, 8, 2
    assert parts["embeddings"] == 3 * 5 * d + d  # codes and BOS
    assert parts["heads"] == 3 * (d * 5 + d)  # linear map and norm of each level
    assert parts["experts"] == layers * (e * 3 * d * f + d * e)  # SwiGLU and router
    assert parts["decoder"] == layers * (8 * d * d + 3 * d)  # two attentions, three norms
    pathway = 2 * (d * d + d)  # two maps with biases
    position = (4 + 3 + 2) * d
    qformer = 2 * d + 4 * d * d + d + 2 * d * 24 + d + d  # queries, attention, feed-forward, norms
    block = 4 * d * d + 2 * d * 24 + 2 * d
    assert parts["encoder"] == 3 * pathway + position + qformer + block + d


def dense(**changes):
    """Sizes at which matrix products outweigh what the count leaves out; one layer of each kind,
    for XLA counts the body of a scan once."""
    values = {
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "ff_dim": 128,
        "num_experts": 0,
        "short_length": 24,
        "positive_length": 16,
        "lifelong_length": 32,
        "lifelong_queries": 8,
    }
    return tiny_config(**{**values, **changes})


@pytest.mark.parametrize(
    "changes",
    [{}, {"lifelong_length": 0}, {"ff_dim": 512}, {"d_model": 128}, {"session_items": 5}],
    ids=["all", "no lifelong", "wide", "large", "lists"],
)
def test_forward_against_the_compiler(changes):
    """XLA also counts norms, softmaxes and activations: a little more, never less."""
    cfg, spec, users = dense(**changes), bare_spec(codebook_size=64), 4
    model = OneRec(cfg, spec)
    batch = random_batch(cfg, bare_spec(), users, targets=cfg.session_items)
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))
    # Counted before optimisation: no compiling, and no fusion hides a product.
    cost = jax.jit(model.apply).lower(variables, batch).cost_analysis()
    counted = sum(forward_flops(cfg, spec).values()) * users
    assert 0.85 < counted / cost["flops"] <= 1.0


def test_many_targets_a_user_against_the_compiler():
    """Teacher forcing over a group of items, as post-training does."""
    cfg, spec, users, group = dense(), bare_spec(codebook_size=64), 4, 24
    model, batch = OneRec(cfg, spec), random_batch(cfg, bare_spec(), users, targets=group)
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))
    cost = jax.jit(model.apply).lower(variables, batch).cost_analysis()
    counted = sum(forward_flops(cfg, spec, group).values()) * users
    assert 0.85 < counted / cost["flops"] <= 1.0


@pytest.mark.parametrize("method", ["beam", "sample"])
def test_rollouts_against_the_compiler(method):
    """XLA also counts what chooses codes; more of it than of models whose products are larger."""
    cfg, spec, users, group = dense(d_model=256, ff_dim=1024), bare_spec(codebook_size=32), 4, 24
    model, batch = OneRec(cfg, spec), random_batch(cfg, bare_spec(), users)
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))
    keys = jax.random.split(jax.random.key(0), users)

    def draw(variables, batch):
        if method == "beam":
            return beam_search(model, variables, batch, width=group)
        return sample(model, variables, batch, keys, count=group)

    cost = jax.jit(draw).lower(variables, batch).cost_analysis()
    parts = generation_flops(cfg, spec, group, independent=method == "sample")
    assert 0.85 < sum(parts.values()) * users / cost["flops"] <= 1.0


def test_one_layer_each_by_hand():
    """D 4, one token of history and three codes: small enough to count every product."""
    cfg = tiny_config(
        d_model=4,
        num_heads=1,
        ff_dim=5,
        num_experts=0,
        encoder_layers=1,
        decoder_layers=1,
        short_length=1,
        positive_length=0,
        lifelong_length=0,
    )
    parts = forward_flops(cfg, bare_spec(codebook_size=7))
    square, tokens, codes = 4 * 4, 1, 3
    assert parts["pathways"] == 2 * 1 * (4 * 16 + 16 * 4)
    attention = 4 * square * tokens + 2 * tokens * tokens * 4  # q, k, v, o; scores and values
    assert parts["encoder"] == 2 * (attention + tokens * 2 * 4 * 5)
    causal = 4 * square * codes + 2 * codes * codes * 4
    cross = 2 * square * codes + 2 * square * tokens + 2 * codes * tokens * 4
    assert parts["decoder"] == 2 * (causal + cross + codes * 2 * 4 * 5)
    assert parts["heads"] == 2 * codes * 4 * 7
    assert parts["lifelong QFormer"] == 0


def test_experts_by_hand():
    """Only the chosen experts count, and the router."""
    spec = full_spec()
    base = tiny_config(num_experts=0)
    d, f, levels, layers = 16, 12, 3, 2
    for experts, top in ((8, 2), (8, 1), (4, 2)):
        cfg = dataclasses.replace(base, num_experts=experts, experts_per_token=top)
        moe = d * experts + top * 3 * d * f
        extra = 2 * layers * levels * (moe - 2 * d * 24)
        difference = sum(forward_flops(cfg, spec).values()) - sum(
            forward_flops(base, spec).values()
        )
        assert difference == extra


def test_features_and_training():
    cfg = tiny_config()
    parts, bare = forward_flops(cfg, full_spec()), forward_flops(cfg, bare_spec())
    # Features widen the input of three pathway maps; static features add one pathway.
    width = 8 + 5 * 4  # author, and tag, age, playtime, duration, label
    static = 2 * 4 * 16 + 16 * 16
    assert parts["pathways"] - bare["pathways"] == 2 * ((4 + 3 + 6) * width * 16 + static)
    same = ("lifelong QFormer", "heads")
    assert [parts[name] for name in same] == [bare[name] for name in same]
    # The static token is one more for two matrices, four projections and attention to all ten.
    more = 4 * 16 * 16 + 2 * 16 * 24 + 2 * (10 * 10 - 9 * 9) * 16
    assert parts["encoder"] - bare["encoder"] == 2 * more
    assert train_flops(cfg, full_spec()) == 3 * sum(parts.values())
    counted = forward_flops(cfg, full_spec(clustered=True))
    assert counted["pathways"] - parts["pathways"] == 2 * 6 * 4 * 16  # member counts


def test_targets_share_the_encoder():
    cfg, spec = tiny_config(), full_spec()
    one, four = forward_flops(cfg, spec), forward_flops(cfg, spec, targets=4)
    for name in ("pathways", "lifelong QFormer", "encoder"):
        assert four[name] == one[name]
    assert four["heads"] == 4 * one["heads"]
    keys = 2 * 2 * 2 * 10 * 16 * 16  # of the encoder's tokens: once a user
    assert four["decoder"] - keys == 4 * (one["decoder"] - keys)


def test_lists_by_hand():
    """Five items of BOS and three codes less the last code: 19 positions that see one another."""
    one, cfg, spec = tiny_config(), tiny_config(session_items=5), full_spec()
    point, lists = forward_flops(one, spec), forward_flops(cfg, spec)
    assert lists == forward_flops(cfg, spec, 5)
    for name in ("pathways", "lifelong QFormer", "encoder"):
        assert lists[name] == point[name]
    assert lists["heads"] == 5 * point["heads"]
    d, layers, tokens = 16, 2, 10
    keys = 2 * layers * 2 * tokens * d * d
    experts = d * 8 + 2 * 3 * d * 12
    row = layers * (6 * d * d + 2 * (tokens + 19) * d + experts)
    assert lists["decoder"] == keys + 2 * 19 * row
    assert forward_flops(cfg, spec, 10)["decoder"] == keys + 2 * 38 * row
    # The beginning of a list is a shorter one: one item costs what it costs anywhere.
    assert forward_flops(cfg, spec, 1) == point
    assert train_flops(cfg, spec) == 3 * sum(lists.values())
    rows = 2 * layers * 19  # two experts each
    lost = 3 * 2 * 3 * d * 12 * rows * 0.5
    assert train_flops(cfg, spec, dropped=0.5) == 3 * sum(lists.values()) - lost


def test_generation_of_lists_by_hand():
    """Two items with four beams: 1, 4, 4, then 4 of two positions, 4, 4."""
    cfg, spec = tiny_config(session_items=2), full_spec()
    one, found = generation_flops(cfg, spec, 4), generation_flops(cfg, spec, 4, items=2)
    assert one == generation_flops(tiny_config(), spec, 4)
    assert found["heads"] - one["heads"] == 2 * (4 + 4 + 4) * 16 * 5
    d, layers, tokens = 16, 2, 10
    experts = d * 8 + 2 * 3 * d * 12
    seen = [4, 5, 6, 7]
    rows = [6 * d * d + 2 * (tokens + n) * d + experts for n in seen]
    assert found["decoder"] - one["decoder"] == 2 * layers * 4 * sum(rows)
    assert found["encoder"] == one["encoder"]


def test_a_published_list_costs_four_single_items():
    """0.935B, full histories, 128 beams, five items; the bound is six (docs/sessions.md)."""
    cfg, spec = PRESETS["v1-0.935b"], nominal_spec(TokenizerConfig())
    one, five = (sum(generation_flops(cfg, spec, 128, items=items).values()) for items in (1, 5))
    assert 3.8 < five / one < 4.1


@pytest.mark.parametrize("width", [1, 4, 100])
def test_generation_by_hand(width):
    """One row, then as many as there are beams: at most 5, then 25 codes."""
    cfg, spec = tiny_config(), full_spec()
    one, found = forward_flops(cfg, spec), generation_flops(cfg, spec, width)
    rows = [1, min(width, 5), min(width, 25)]
    for name in ("pathways", "lifelong QFormer", "encoder"):
        assert found[name] == one[name]
    assert found["heads"] == 2 * sum(rows) * 16 * 5
    d, layers, tokens = 16, 2, 10
    keys = 2 * layers * 2 * tokens * d * d
    experts = d * 8 + 2 * 3 * d * 12
    layer = [6 * d * d + 2 * tokens * d + 2 * seen * d + experts for seen in (1, 2, 3)]
    assert found["decoder"] == keys + 2 * layers * np.dot(rows, layer)
    drawn = generation_flops(cfg, spec, width, independent=True)
    assert drawn["heads"] == 2 * (1 + 2 * width) * 16 * 5
    lengths = {"short": [4, 1], "positive": [3, 0], "lifelong": [6, 0]}
    users = generation_flops(cfg, spec, width, lengths)
    assert {name: flops[0] for name, flops in users.items()} == found
    assert users["decoder"][1] < users["decoder"][0]


def test_switched_off_parts_cost_nothing():
    spec = full_spec(clustered=True)
    cfg = tiny_config(pathways=("positive",), features=())
    parts = forward_flops(cfg, spec)
    assert parts["lifelong QFormer"] == 0
    assert parts["pathways"] == 2 * 3 * (16 * 16 + 16 * 16)


@pytest.mark.parametrize("name", ["v1-0.121b", "v1-0.935b", "v1-2.633b"])
def test_published_sizes(name):
    """OneRec Technical Report, Table 1, vocabularies apart. (0.015B has 2.1M then: its name must
    count tables that the report does not list.)"""
    spec = nominal_spec(TokenizerConfig())
    init, batch = OneRec(PRESETS[name], spec).init, abstract_batch(PRESETS[name], spec)
    params = nn.unbox(jax.eval_shape(init, jax.random.key(0), batch)["params"])
    parts = count_parameters(params)
    assert sum(parts.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert spec.codebook_size == 8192
    total = sum(size for part, size in parts.items() if part not in VOCABULARIES)
    assert total == pytest.approx(float(name[3:-1]) * 1e9, rel=0.01)


def test_lengths():
    """FLOPs of users of several lengths, and of full ones as without lengths."""
    cfg, spec = tiny_config(), full_spec(clustered=True)
    lengths = {"short": [4, 1], "positive": [3, 0], "lifelong": [6, 0]}
    parts = forward_flops(cfg, spec, lengths=lengths)
    for name, flops in forward_flops(cfg, spec).items():
        assert parts[name][0] == flops
    assert parts["lifelong QFormer"][1] == 0
    only = tiny_config(pathways=("static", "short"), short_length=1)
    for name, flops in forward_flops(only, spec).items():
        assert parts[name][1] == flops


def test_dropped_rows_are_no_work():
    """Of two matrices in, one out; the router has run all the same."""
    spec, lengths = bare_spec(), {"short": [4, 1], "positive": [3, 0], "lifelong": [6, 0]}
    cfg = tiny_config(encoder_experts=True)
    tokens, codes = np.array([4 + 3 + 2, 1]), 2 * 3
    row = 3 * 2 * 3 * 16 * 12
    rows = 2 * (1 * tokens + 2 * codes)  # two experts each; layers of encoder and decoder
    whole = train_flops(cfg, spec, 2, lengths)
    np.testing.assert_allclose(train_flops(cfg, spec, 2, lengths, 0.25), whole - rows * row / 4)
    nothing = tiny_config(encoder_experts=True, expert_dim=1)
    left = train_flops(nothing, spec, 2, lengths, 1.0)
    np.testing.assert_allclose(train_flops(cfg, spec, 2, lengths, 1.0), left)
    assert train_flops(cfg, spec, 2, dropped=0.5) == whole[0] - rows[0] * row / 2
    assert json.dumps(train_flops(cfg, spec, 2)) == str(whole[0])
    assert train_flops(tiny_config(num_experts=0), spec, dropped=0.5) == train_flops(
        tiny_config(num_experts=0), spec
    )
