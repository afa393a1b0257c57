"""The contrastive loss against loops and numbers computed by hand."""

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.losses.contrastive import contrastive_loss, unit_rows

B, Q, D = 5, 2, 3
EXCLUDE = np.array(
    [
        [1, 1, 0, 0, 0],  # the diagonal must not count
        [0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0],
        [1, 1, 1, 0, 1],  # no negative left: costs nothing
        [0, 0, 0, 1, 0],
    ],
    bool,
)


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((2, B, Q, D)).astype(np.float32))


def loops(first, second, temperature, exclude, symmetric):
    """Loss of each pair, in float64."""

    def cosine(a, b):
        a, b = a.ravel().astype(float), b.ravel().astype(float)
        return a @ b / np.sqrt((a @ a) * (b @ b))

    def one_way(i, towards):
        pairs = [(i, j) if towards == "second" else (j, i) for j in range(B)]
        odds = {
            pair: np.exp(cosine(first[pair[0]], second[pair[1]]) / temperature)
            for pair in pairs
            if pair == (i, i) or not exclude[pair]
        }
        return -np.log(odds[i, i] / sum(odds.values()))

    loss = np.array([one_way(i, "second") for i in range(B)])
    if symmetric:
        loss = (loss + [one_way(i, "first") for i in range(B)]) / 2
    return loss


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("exclude", [np.zeros((B, B), bool), EXCLUDE], ids=["all", "masked"])
def test_value_and_gradient_against_loops(exclude, symmetric):
    first, second = inputs()

    def loss(first, second, temperature):
        return contrastive_loss(
            first, second, temperature, exclude_bb=exclude, symmetric=symmetric
        )[0]

    expected = loops(first, second, 0.3, exclude, symmetric)
    np.testing.assert_allclose(helpers.quick_jit(loss)(first, second, 0.3), expected, rtol=1e-5)
    weight = np.arange(1, B + 1)  # so that every pair's gradient counts by itself
    grads = helpers.quick_jit(jax.grad(lambda *x: loss(*x) @ weight, argnums=(0, 1, 2)))(
        first, second, 0.3
    )
    eps = 1e-5
    arguments = [first.astype(float), second.astype(float), np.array(0.3)]
    for number, grad in enumerate(grads):
        numeric = np.zeros(arguments[number].shape)
        for place in np.ndindex(numeric.shape):
            sides = []
            for sign in (1, -1):
                moved = [x.copy() for x in arguments]
                moved[number][place] += sign * eps
                sides.append(loops(*moved, exclude, symmetric) @ weight)
            numeric[place] = (sides[0] - sides[1]) / (2 * eps)
        np.testing.assert_allclose(grad, numeric, rtol=2e-3, atol=2e-4)


def test_by_hand():
    """Cosines 1 and 0 at temperature 1 / ln 3: odds 3 to 1; the second pair has them reversed."""
    first, second = jnp.array([[2.0, 0.0], [5.0, 0.0]]), jnp.array([[1.0, 0.0], [0.0, 4.0]])
    loss, aux = contrastive_loss(first, second, 1 / np.log(3))
    np.testing.assert_allclose(loss, [np.log(4 / 3), np.log(4)], rtol=1e-6)
    assert float(aux["accuracy"]) == 0.5
    assert float(aux["negatives"]) == 1


def test_excluded_candidates_do_not_matter():
    first, second = inputs()
    exclude = np.zeros((B, B), bool)
    exclude[:, 3] = True  # the second of pair 3 is a negative of nobody
    _, other = inputs(1)
    changed = np.where(np.arange(B)[:, None, None] == 3, other, second)
    loss, aux = contrastive_loss(first, second, 0.1, exclude_bb=exclude)
    moved, _ = contrastive_loss(first, changed, 0.1, exclude_bb=exclude)
    same = np.arange(B) != 3
    np.testing.assert_array_equal(loss[same], moved[same])
    assert loss[3] != moved[3]
    np.testing.assert_allclose(aux["negatives"], ((B - 1) * (B - 2) + B - 1) / B, rtol=1e-6)


def test_zero_rows_and_extremes_stay_finite():
    first, second = inputs()
    first[0], second[1], second[2] = 0, 0, 1e18

    def total(first, second):
        return contrastive_loss(first, second, 0.01, symmetric=True)[0].sum()

    value, grads = jax.value_and_grad(total, argnums=(0, 1))(
        jnp.asarray(first), jnp.asarray(second)
    )
    chex.assert_tree_all_finite((value, grads))
    opposite, _ = contrastive_loss(jnp.array([[1.0], [-1.0]]), jnp.array([[-1.0], [1.0]]), 0.01)
    np.testing.assert_allclose(opposite, 200, rtol=1e-6)


def test_16_bit_inputs_give_float32():
    first, second = (jnp.asarray(x, jnp.bfloat16) for x in inputs())
    loss, _ = contrastive_loss(first, second, 0.07)
    chex.assert_type(loss, jnp.float32)
    rows = unit_rows(first)
    chex.assert_type(rows, jnp.float32)
    np.testing.assert_allclose(jnp.linalg.norm(rows, axis=1), 1, rtol=1e-6)
