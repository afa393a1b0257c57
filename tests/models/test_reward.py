"""P-Score against a straightforward loop; what it must read and what it must not see."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.data.features import log_bucket
from onerec_jax.errors import InputError
from onerec_jax.inputs import RewardBatch
from onerec_jax.losses.reward import reward_loss
from onerec_jax.models.reward import PScore, RewardConfig

B, M, T = 3, 4, 9
CFG = RewardConfig(
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
    fusion_dims=(5,),
    compute_dtype="float32",
)
SPEC = helpers.full_spec()
OBJECTIVES = ("ctr", "ltr")
CONTENT = np.random.default_rng(9).standard_normal((3, 5, 4)).astype(np.float32)


def batch_of(seed=0, spec=SPEC, length=(9, 5, 0)) -> RewardBatch:
    rng = np.random.default_rng(seed)
    history = helpers.random_pathway(rng, spec, list(length), T).replace(age=None)
    target = helpers.random_pathway(rng, spec, [M] * B, M)
    seconds = np.sort(rng.integers(0, 100_000, (B, T)), axis=1).astype(np.int32)
    hidden = np.array([[0, 1, 3, 9], [0, 2, 4, 5], [0, 0, 1, 2]], np.int32)
    since = np.take_along_axis(seconds, np.maximum(hidden - 1, 0), 1)
    since = np.where(hidden > 0, since, 0).astype(np.int32)
    static = np.stack([rng.integers(0, f.size + 1, B) for f in spec.static], 1)
    return RewardBatch(
        static=static.astype(np.int32),
        history=history,
        seconds=seconds if spec.has_time else None,
        target=target.replace(age=None, playtime=None, label=None),
        hidden=hidden,
        since=since,
        label=rng.integers(-1, 2, (B, M, len(OBJECTIVES))).astype(np.int8),
    )


@functools.cache
def model(spec=SPEC, cfg=CFG, fusions=2):
    """The compiled model and random weights."""
    module = PScore(cfg, spec, OBJECTIVES, CONTENT, fusions)
    return (
        module,
        helpers.quick_jit(module.apply),
        helpers.random_variables(module, batch_of(0, spec)),
    )


def scores(batch, spec=SPEC, cfg=CFG):
    _, apply, variables = model(spec, cfg)
    return np.concatenate(jax.device_get(apply(variables, batch)), axis=-1)


def loop(params, batch, b, m):
    """Logits of item m of user b: objectives, then fusions. One item and one entry at a time."""
    params = jax.tree.map(lambda x: np.asarray(x, float), params)

    def linear(p, x):
        return x @ p["kernel"].reshape(len(x), -1) + p.get("bias", 0)

    def mlp(p, x):
        for i in range(len(p)):
            x = linear(p[f"layer_{i}"], x)
            x = np.where(x > 0, x, 0.01 * x)
        return x

    def content(sid):
        vector = sum(CONTENT[level, code].astype(float) for level, code in enumerate(sid))
        return vector / np.sqrt(vector @ vector)

    def row(p, index):
        return p[index] if index > 0 else np.zeros(p.shape[1])

    def embed(items, at):
        p, parts = params["item"], [content(items.sid[at])]
        parts.append(sum(p["sid"][5 * level + c] for level, c in enumerate(items.sid[at])))
        parts += [row(p["item"], items.item[at]), row(p["author"], items.author[at])]
        tags = [row(p["tag"], tag) for tag in items.tags[at] if tag > 0]
        parts += [np.mean(tags, 0) if tags else np.zeros(3), row(p["duration"], items.duration[at])]
        return linear(p["out"], np.concatenate(parts))

    def entry(t):
        p, history = params["entry"], batch.history
        parts = [embed(history, (b, t)), p["playtime"][history.playtime[b, t]]]
        x = linear(p["mlp"]["w_in"], np.concatenate([*parts, history.label[b, t]]))
        return linear(p["mlp"]["w_out"], np.where(x > 0, x, 0.01 * x))

    first = batch.hidden[b, m]
    seen = list(range(first, min(first + CFG.history_length, batch.history.length[b])))
    e, c = embed(batch.target, (b, m)), content(batch.target.sid[b, m])
    entries = {t: entry(t) for t in seen}
    alike = {t: c @ content(batch.history.sid[b, t]) for t in seen}
    found = sorted(seen, key=lambda t: -alike[t])[: CFG.top_k]

    def attend(p, part):
        q, heads, evidence = linear(p["q"], e).reshape(2, 4), [], []
        for h in range(2):
            total, value = 0.0, np.zeros(4)
            for t in part:
                key, v = (linear(p[name], entries[t]).reshape(2, 4)[h] for name in ("k", "v"))
                gap = log_bucket(batch.seconds[b, t] - batch.since[b, m])
                logit = q[h] @ key / 2 + p["likeness"][h] * alike[t]
                logit += p["gap"][gap, h] + p["rank"][log_bucket(t - first), h]
                total, value = total + np.exp(logit), value + np.exp(logit) * v
            heads.append(value / total if part else value)
            evidence.append(np.log(1 + total))
        return np.concatenate(heads), np.array(evidence)

    search, much = attend(params["search"], found)
    recent, more = attend(params["recent"], seen[: CFG.recent_length])
    mean = np.mean([entries[t] for t in seen], 0) if seen else np.zeros(8)
    static = [
        params["static"][f.name][i] for f, i in zip(SPEC.static, batch.static[b], strict=True)
    ]
    user = np.concatenate([search, recent, mean, much, more, *static])
    x = mlp(params["shared"], np.concatenate([user, e, search * e, recent * e, mean * e]))
    hidden = [mlp(params[name]["mlp"], x) for name in OBJECTIVES]
    logits = [linear(params[n]["logit"], h)[0] for n, h in zip(OBJECTIVES, hidden, strict=True)]
    y = np.concatenate([*hidden, user, e])
    for n in range(2):
        p = jax.tree.map(lambda x, n=n: x[n], params["fusion"])
        logits.append(linear(p["logit"], mlp(p["mlp"], y))[0])
    return logits


def test_against_a_loop():
    batch, (_, _, variables) = batch_of(), model()
    actual = scores(batch)
    for b, m in np.ndindex(B, M):
        np.testing.assert_allclose(
            actual[b, m], loop(variables["params"], batch, b, m), rtol=2e-4, atol=2e-5
        )


def visible(batch):
    """bool [B, M, T]: what each item may see."""
    rank = np.arange(T) - batch.hidden[..., None]
    inside = np.arange(T) < batch.history.length[:, None, None]
    return (rank >= 0) & (rank < CFG.history_length) & inside


def test_the_future_changes_no_score():
    """Whatever happens from an item's exposure on, its own feedback included."""
    batch = batch_of()
    before, sees = scores(batch), visible(batch)
    rng = np.random.default_rng(5)
    for t in range(T):
        other = helpers.random_pathway(rng, SPEC, batch.history.length, T).replace(age=None)
        mask = np.arange(T) == t
        history = jax.tree.map(
            lambda x, y, mask=mask: (
                x if x.ndim == 1 else np.where(mask.reshape(1, T, *[1] * (x.ndim - 2)), y, x)
            ),
            batch.history,
            other,
        )
        after = scores(batch.replace(history=history))
        same = (before == after).all(-1)
        assert same[~sees[..., t]].all(), t
        # The counterpart: what may be seen is seen, if only by the mean.
        assert not same[sees[..., t]].any(), t


def test_items_do_not_see_each_other():
    batch = batch_of()
    turned = [3, 1, 0, 2]
    change = {
        name: jax.tree.map(lambda x: x if x.ndim == 1 else x[:, turned], getattr(batch, name))
        for name in ("target", "hidden", "since")
    }
    np.testing.assert_allclose(scores(batch.replace(**change)), scores(batch)[:, turned], atol=1e-5)


def test_users_do_not_see_each_other():
    batch = batch_of()
    other = jax.tree.map(lambda x, y: np.concatenate([x[:1], y[1:]]), batch, batch_of(7))
    np.testing.assert_array_equal(scores(batch)[0], scores(other)[0])
    assert (scores(batch)[1] != scores(other)[1]).any()


@pytest.mark.parametrize("side", ["history", "target"])
@pytest.mark.parametrize(
    "field", ["sid", "item", "tags", "author", "duration", "playtime", "label"]
)
def test_every_feature_is_read(side, field):
    batch = batch_of()
    old = getattr(batch, side)
    values = getattr(old, field)
    if values is None:
        pytest.skip("no feature of an item by itself")
    values = values.copy()
    here = values[0, 0]
    turned = {"label": 1 - here, "tags": (here + 1) % 4}
    values[0, 0] = turned.get(field, np.where(here > 1, 1, 2))
    after = scores(batch.replace(**{side: old.replace(**{field: values})}))
    assert (after != scores(batch))[0, 0].all()


def test_times_and_static_features_are_read():
    batch = batch_of()
    later = batch.replace(seconds=batch.seconds + 50_000)
    other = batch.replace(static=(batch.static + 1) % 3)
    assert (scores(later)[0, 0] != scores(batch)[0, 0]).all()
    assert (scores(other)[0, 0] != scores(batch)[0, 0]).all()


def test_bare_items_without_times():
    spec = helpers.bare_spec()
    batch = batch_of(0, helpers.full_spec())
    bare = {"tags": None, "author": None, "playtime": None, "duration": None, "label": None}
    batch = batch.replace(
        history=batch.history.replace(**bare),
        target=batch.target.replace(**bare),
        seconds=None,
        static=np.zeros((B, 0), np.int32),
    )
    module = PScore(CFG, spec, OBJECTIVES, CONTENT)
    variables = helpers.random_variables(module, batch)
    found = helpers.quick_jit(module.apply)(variables, batch)
    assert all(np.isfinite(x).all() for x in found)


def test_bfloat16_stays_close_and_float32_at_the_end():
    cfg = dataclasses.replace(CFG, compute_dtype="bfloat16")
    _, _, variables = model()
    module = PScore(cfg, SPEC, OBJECTIVES, CONTENT, 2)
    towers, p = helpers.quick_jit(module.apply)(variables, batch_of())
    assert towers.dtype == p.dtype == jnp.float32
    np.testing.assert_allclose(np.concatenate([towers, p], -1), scores(batch_of()), atol=0.5)


@pytest.mark.parametrize("stop", [True, False])
def test_what_the_fusion_moves(stop):
    """Behind the stop-gradient p trains its own layers and nothing else."""
    cfg, batch = dataclasses.replace(CFG, stop_gradient=stop), batch_of()
    module, (_, _, variables) = PScore(cfg, SPEC, OBJECTIVES, CONTENT, 2), model()

    def loss(params):
        towers, p = module.apply({"params": params}, batch)
        return reward_loss(towers, p, jnp.asarray(batch.label), jnp.ones((2, 2)))[2].sum()

    slopes = helpers.quick_jit(jax.grad(loss))(variables["params"])
    moved = {name for name, tree in slopes.items() if any(x.any() for x in jax.tree.leaves(tree))}
    assert moved == ({"fusion"} if stop else set(slopes))


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--model.top-k", {"top_k": 0}),
        ("--model.num-heads", {"num_heads": 3}),
        ("--model.tower-dims", {"tower_dims": ()}),
        ("--model.item-dropout", {"item_dropout": -0.1}),
    ],
)
def test_sizes_that_cannot_be(flag, values):
    with pytest.raises(InputError, match=flag):
        RewardConfig(**values)
