"""Sampling against forward passes, plain Python and frequencies."""

import functools

import chex
import helpers
import jax
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.generation.filters import FilterBuilder
from onerec_jax.generation.sampling import sample, sample_without_replacement
from onerec_jax.generation.trie import build_trie
from onerec_jax.models.onerec import OneRec

CODES, LEVELS = 4, 2
TOY = helpers.ToyModel(LEVELS, CODES)
SIDS = np.array([[0, 1], [0, 2], [1, 0], [1, 3], [2, 2], [3, 0], [3, 1], [3, 3]], np.int32)
TRIE = build_trie(SIDS, CODES)
WITHOUT = FilterBuilder(TRIE, np.arange(len(SIDS)))


def keys_of(users, seed=0):
    return jax.random.split(jax.random.key(seed), users)


def run(function, batch, keys, model=TOY, variables=None, **options):
    arrays = {name: options.pop(name, None) for name in ("trie", "filter")}
    program = helpers.quick_jit(functools.partial(function, model, **options))
    return jax.device_get(program(variables, batch, keys, **arrays))


def distribution(user, *, temperature=1.0, top_k=CODES, top_p=1.0, legal=None):
    """Probability of every ID under the sampling rules, in plain Python: `{ID: p}`."""
    legal = {(a, b) for a in range(CODES) for b in range(CODES)} if legal is None else legal
    result = {}

    def walk(prefix, p):
        if len(prefix) == LEVELS:
            result[prefix] = p
            return
        known = np.array(prefix, int).reshape(1, 1, -1)
        logits = TOY.continuations(user[None], known)[0, 0] / temperature
        codes = [
            c for c in range(CODES) if any(s[: len(prefix) + 1] == (*prefix, c) for s in legal)
        ]
        codes = sorted(codes, key=lambda c: -logits[c])[:top_k]
        weight = np.exp(logits[codes])
        weight = weight / weight.sum()
        inside = np.cumsum(weight) - weight < top_p
        weight = weight * inside / (weight * inside).sum()
        for code, share in zip(codes, weight, strict=True):
            if share:
                walk((*prefix, code), p * share)

    walk((), 1.0)
    return result


@pytest.mark.parametrize(
    ("masked", "rules"),
    [
        (False, {}),
        (True, {"temperature": 0.5}),
        (False, {"top_k": 2}),
        (False, {"top_p": 0.7}),
        (True, {"temperature": 2.0, "top_k": 3, "top_p": 0.8}),
    ],
)
def test_draws_follow_the_distribution_they_report(masked, rules):
    user = TOY.users(1)
    n = 20_000
    options = {"trie": TRIE} if masked else {}
    found = run(sample, user, keys_of(1), count=n, **rules, **options)
    legal = {tuple(sid) for sid in SIDS.tolist()} if masked else None
    expected = distribution(user[0], legal=legal, **rules)
    drawn, first, count = np.unique(found.sid[0], axis=0, return_index=True, return_counts=True)
    assert {tuple(sid) for sid in drawn.tolist()} <= set(expected)
    for sid, at, times in zip(drawn.tolist(), first, count, strict=True):
        p = expected[tuple(sid)]
        np.testing.assert_allclose(found.sampling_logp[0, at].sum(), np.log(p), atol=1e-4)
        np.testing.assert_allclose(times / n, p, atol=4.5 * (p * (1 - p) / n) ** 0.5)
    np.testing.assert_allclose(found.logp, TOY.logp(user, found.sid), rtol=1e-4, atol=1e-4)
    places = {tuple(sid): leaf for leaf, sid in enumerate(SIDS.tolist())}
    leaves = [places[tuple(sid)] if masked else -1 for sid in found.sid[0].tolist()]
    np.testing.assert_array_equal(found.leaf[0], leaves)


def test_log_probabilities_are_those_of_teacher_forcing():
    """Of the real model, by its forward pass over the IDs drawn."""
    cfg = helpers.tiny_config(num_experts=0, decoder_layers=1)
    spec = helpers.bare_spec(codebook_size=7)
    model, batch = OneRec(cfg, spec), helpers.random_batch(cfg, spec, 3)
    variables = helpers.random_variables(model, batch)
    found = run(sample, batch, keys_of(3), model, variables, count=6, temperature=1.5)
    forward = helpers.quick_jit(model.apply)
    logits = np.asarray(forward(variables, batch.replace(target=found.sid)), np.float64)
    for scale, reported in ((1.0, found.logp), (1.5, found.sampling_logp)):
        logp = logits / scale - np.log(np.exp(logits / scale).sum(-1, keepdims=True))
        expected = np.take_along_axis(logp, found.sid[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(reported, expected, rtol=1e-4, atol=1e-4)


def test_log_probabilities_without_replacement():
    users = TOY.users(3)
    found = run(sample_without_replacement, users, keys_of(3), count=6, trie=TRIE)
    np.testing.assert_allclose(found.logp, TOY.logp(users, found.sid), rtol=1e-4, atol=1e-4)
    legal = {tuple(sid) for sid in SIDS.tolist()}
    for user in range(3):
        expected = distribution(users[user], legal=legal)
        p = [expected[tuple(sid)] for sid in found.sid[user].tolist()]
        np.testing.assert_allclose(found.sampling_logp[user].sum(-1), np.log(p), atol=1e-4)


@pytest.mark.parametrize("function", [sample, sample_without_replacement])
def test_draws_depend_on_the_key_and_not_on_others(function):
    users, keys = TOY.users(3), keys_of(3)
    together = run(function, users, keys, count=5, trie=TRIE)
    alone = run(function, users[1:2], keys[1:2], count=5, trie=TRIE)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1:2], together), alone, atol=1e-6)
    other = run(function, users, keys_of(3, seed=1), count=5, trie=TRIE)
    assert (together.sid != other.sid).any()


@pytest.mark.parametrize("function", [sample, sample_without_replacement])
def test_filters_leave_the_rest_and_may_leave_nothing(function):
    gone = [[0, 1, 2], range(8), range(7)]
    options = {"trie": TRIE, "filter": WITHOUT(gone)}
    found = run(function, TOY.users(3), keys_of(3), count=9, **options)
    assert not {0, 1, 2} & set(found.leaf[0].tolist())
    np.testing.assert_array_equal(found.leaf[1], -1)
    np.testing.assert_array_equal(found.sid[1], -1)
    for values in (found.logp, found.sampling_logp):
        assert np.isneginf(values[1]).all()
        assert not np.isnan(values).any()
    assert set(found.leaf[2].tolist()) - {-1} == {7}
    np.testing.assert_allclose(found.sampling_logp[2, 0], 0, atol=1e-6)


def test_without_replacement_all_ids_come_once_and_in_order():
    found = run(sample_without_replacement, TOY.users(5), keys_of(5), count=30, trie=TRIE)
    for user in range(5):
        assert sorted(found.leaf[user, :8].tolist()) == list(range(8))
        assert (np.diff(found.perturbed[user, :8]) <= 0).all()
    np.testing.assert_array_equal(found.sid[:, 8:], -1)
    assert np.isneginf(found.perturbed[:, 8:]).all()
    assert not np.isnan(found.perturbed).any()


@pytest.mark.parametrize("count", [2, 16])
def test_without_replacement_is_drawing_one_by_one(count):
    """Frequencies of the first and of pairs, over many keys of one user, however wide the beam."""
    n = 20_000
    user = TOY.users(1)
    many = np.repeat(user, n, axis=0)
    found = run(sample_without_replacement, many, keys_of(n), count=count)
    p = distribution(user[0])
    pairs, times = np.unique(found.sid[:, :2].reshape(n, -1), axis=0, return_counts=True)
    seen = {(tuple(pair[:2]), tuple(pair[2:])): t / n for pair, t in zip(pairs, times, strict=True)}
    for first in p:
        share = sum(value for pair, value in seen.items() if pair[0] == first)
        np.testing.assert_allclose(share, p[first], atol=4.5 * (p[first] / n) ** 0.5)
        for second in p:
            expected = 0 if first == second else p[first] * p[second] / (1 - p[first])
            actual = seen.get((first, second), 0)
            np.testing.assert_allclose(
                actual, expected, atol=5 * (expected / n) ** 0.5 + (expected > 0) * 4 / n
            )
    # The largest of all perturbed values is a standard Gumbel variable: mean 0.577, variance 1.645.
    np.testing.assert_allclose(found.perturbed[:, 0].mean(), 0.5772, atol=0.04)
    np.testing.assert_allclose(found.perturbed[:, 0].var(), np.pi**2 / 6, atol=0.1)


def test_the_stated_weights_estimate_an_expectation():
    """sum over draws of p / q(kappa) f is f's mean, kappa's draw left out."""
    n, user = 20_000, TOY.users(1)
    found = run(sample_without_replacement, np.repeat(user, n, axis=0), keys_of(n), count=4)
    logp = found.sampling_logp.sum(-1)[:, :-1]
    kappa = found.perturbed[:, -1:]
    weight = np.exp(logp) / -np.expm1(-np.exp(logp - kappa))
    value = (found.sid[:, :-1] * [1, 10]).sum(-1)
    expected = sum(p * (sid[0] + 10 * sid[1]) for sid, p in distribution(user[0]).items())
    estimates = (weight * value).sum(1)
    error = estimates.std() / n**0.5
    np.testing.assert_allclose(estimates.mean(), expected, atol=4 * error)
    assert error < 0.02 * expected


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}]
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        sample(TOY, None, TOY.users(1), keys_of(1), count=2, **options)
