"""Session reward against a loop over items; who sees whom."""

import dataclasses
import functools

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_reward import CONTENT, SPEC, B, M, batch_of

from onerec_jax.models.session_reward import SessionReward, SessionRewardConfig
from onerec_jax.models.target import target_aware

CFG = SessionRewardConfig(
    d_model=8,
    num_heads=2,
    history_length=6,
    top_k=2,
    recent_length=3,
    author_dim=4,
    feature_dim=3,
    static_dim=2,
    shared_dims=(12, 6),
    tower_dims=(5,),
    compute_dtype="float32",
)
HEADS, LENGTH = ("swt", "ltr"), 2  # M = 4 items are two sessions


class Items(nn.Module):
    """What the session reward sees of each item: tested beside the preference score."""

    @nn.compact
    def __call__(self, batch):
        return target_aware(CFG, SPEC, CONTENT, batch, jnp.float32, train=False)[2]


@functools.cache
def model(cfg=CFG, objectives=("ctr",)):
    """The compiled model and random weights."""
    module = SessionReward(cfg, SPEC, HEADS, CONTENT, LENGTH, objectives)
    return helpers.quick_jit(module.apply), helpers.random_variables(module, batch_of())


def scores(batch, cfg=CFG):
    apply, variables = model(cfg)
    return np.asarray(apply(variables, batch)[0])


@functools.cache
def hidden():
    _, variables = model()
    params = {k: v for k, v in variables["params"].items() if k not in (*HEADS, "item_ctr")}
    for name in ("e", "attention", "norm"):
        params.pop(name)
    return np.asarray(helpers.quick_jit(Items().apply)({"params": params}, batch_of()), float)


def linear(p, x):
    return x @ p["kernel"].reshape(len(x), -1) + p.get("bias", 0)


def tower(p, x):
    for i in range(len(p["mlp"])):
        x = linear(p["mlp"][f"layer_{i}"], x)
        x = np.where(x > 0, x, 0.01 * x)
    return linear(p["logit"], x)[0]


def loop(params, x_sd, residual):
    """Logits of one session, item by item."""
    params = jax.tree.map(lambda x: np.asarray(x, float), params)
    items = [linear(params["e"], x) for x in x_sd]
    read = items
    if residual:
        scale = params["norm"]["scale"]
        read = [e / np.sqrt((e * e).mean() + 1e-6) * scale for e in items]
    p, total = params["attention"], np.zeros(8)
    for i, asks in enumerate(read):
        q = linear(p["q"], asks).reshape(2, 4)
        answer = []
        for h in range(2):
            keys = [linear(p["k"], x).reshape(2, 4)[h] for x in read]
            values = [linear(p["v"], x).reshape(2, 4)[h] for x in read]
            weight = np.exp([q[h] @ key / 2 for key in keys])
            answer.append(sum(w * v for w, v in zip(weight, values, strict=True)) / weight.sum())
        answer = np.concatenate(answer) @ p["o"]["kernel"].reshape(8, 8)
        total += answer + (items[i] if residual else 0)
    return [tower(params[name], total) for name in HEADS]


@pytest.mark.parametrize("residual", [True, False])
def test_against_a_loop(residual):
    cfg = dataclasses.replace(CFG, residual=residual)
    module = SessionReward(cfg, SPEC, HEADS, CONTENT, LENGTH, ("ctr",))
    _, variables = model()
    found, items = helpers.quick_jit(module.apply)(variables, batch_of())
    assert found.shape == (B, M // LENGTH, len(HEADS))
    assert found.dtype == items.dtype == jnp.float32
    for b, w in np.ndindex(B, M // LENGTH):
        x = hidden()[b, w * LENGTH : (w + 1) * LENGTH]
        expected = loop(variables["params"], x, residual)
        np.testing.assert_allclose(found[b, w], expected, rtol=2e-4, atol=2e-5)
    params = jax.tree.map(lambda x: np.asarray(x, float), variables["params"]["item_ctr"])
    for b, m in np.ndindex(B, M):
        np.testing.assert_allclose(items[b, m, 0], tower(params, hidden()[b, m]), rtol=2e-4)


def turned(batch, order):
    change = {
        name: jax.tree.map(lambda x: x if x.ndim == 1 else x[:, order], getattr(batch, name))
        for name in ("target", "hidden", "since")
    }
    return batch.replace(**change)


def test_a_session_is_a_set():
    before = scores(batch_of())
    np.testing.assert_allclose(scores(turned(batch_of(), [1, 0, 3, 2])), before, atol=1e-5)
    np.testing.assert_allclose(scores(turned(batch_of(), [2, 3, 0, 1])), before[:, ::-1], atol=1e-5)


def test_sessions_do_not_see_each_other_and_items_do():
    batch = batch_of()
    other = batch.target.replace(item=batch.target.item.copy())
    other.item[:, 3] = 1 + other.item[:, 3] % 20
    after, before = scores(batch.replace(target=other)), scores(batch)
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    assert (after[:, 1] != before[:, 1]).all()


def test_no_history_at_all():
    """A user's first session: a batch without a single entry."""
    batch = batch_of(length=(0, 0, 0))
    empty = jax.tree.map(lambda x: x if x.ndim == 1 else x[:, :0], batch.history)
    short = batch.replace(
        history=empty,
        seconds=batch.seconds[:, :0],
        hidden=np.zeros_like(batch.hidden),
        since=np.zeros_like(batch.since),
    )
    long = short.replace(history=batch.history, seconds=batch.seconds)
    np.testing.assert_allclose(scores(short), scores(long), rtol=1e-5, atol=1e-6)


def test_nothing_of_single_items():
    module = SessionReward(CFG, SPEC, HEADS, CONTENT, LENGTH)
    shapes = jax.eval_shape(module.init, jax.random.key(0), batch_of())
    assert "item_ctr" not in shapes["params"]
    found = jax.eval_shape(module.apply, shapes, batch_of())
    assert found[1] is None
