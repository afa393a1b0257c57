"""Lists of items for users: what session beams find, and point-wise lists beside them."""

import helpers
import numpy as np
import pytest

from onerec_jax.data.batches import BatchBuilder, log_from_histories
from onerec_jax.data.examples import Examples
from onerec_jax.data.features import ItemFeatures
from onerec_jax.generation.generator import Generator
from onerec_jax.generation.session_generator import (
    drawn_lists,
    item_candidates,
    items_of_leaves,
    point_wise_lists,
    session_lists,
)
from onerec_jax.models.onerec import OneRec
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer.semantic_ids import SemanticIds

# Items 0, 2 and 3 share the ID (1, 1); they are served in the order 3, 0, 2.
SIDS = np.array([[1, 1], [0, 0], [1, 1], [1, 1], [0, 2], [2, 2]], np.int32)
IDS = SemanticIds(SIDS, np.zeros((2, 3, 1), np.float32), {})
TIES = np.array([1, 3, 2, 0, 4, 5])
EXAMPLES = Examples(
    np.array([0, 1, 2], np.int32),
    np.array([2, 1, 2], np.int32),
    np.array([[2, 1, 0], [4, 3, 5], [5, 7, 6]]),
)
SEEN = [np.array([0, 3]), np.array([1]), np.array([0, 2, 3])]


@pytest.fixture(scope="module")
def parts():
    """Builder, generator, variables, and the lists of all users."""
    spec = helpers.bare_spec(num_items=6, levels=2, codebook_size=3)
    cfg = helpers.tiny_config(num_experts=0, decoder_layers=1, pathways=("short",), session_items=3)
    log = log_from_histories([[0, 1, 2], [3, 4], [1, 0, 4]], spec)
    builder = BatchBuilder(log, ItemFeatures(IDS.sids, None, None, None), cfg)
    model = OneRec(cfg, spec)
    generator = Generator(model, IDS, TIES, make_mesh(2), beam_width=4, batch_size=1)
    variables = helpers.random_variables(model, builder(EXAMPLES.user, EXAMPLES.position))
    return builder, generator, variables


def test_lists_of_items(parts):
    """Four IDs: 24 lists of three. The list that is most probable by the loss of all lists."""
    builder, generator, variables = parts
    found = session_lists(generator, variables, builder, EXAMPLES, width=24, n=24)
    assert found.items.shape == (3, 24, 3)
    assert (np.diff(found.logp) <= 0).all()
    np.testing.assert_array_equal(SIDS[found.items], found.sid)
    assert set(found.items.reshape(-1)) == {3, 1, 4, 5}
    assert len(np.unique(found.items[0], axis=0)) == 24
    # The log holds the items as rows: the loss of a list is the mean over its items.
    row_of = {3: 3, 1: 1, 4: 4}
    listed = next(x for x in found.items[0] if 5 not in x)
    rows = np.array([[row_of[item] for item in listed]])
    loss = generator.loss(
        variables, builder, Examples(EXAMPLES.user[:1], EXAMPLES.position[:1], rows)
    )
    place = np.flatnonzero((found.items[0] == listed).all(1))[0]
    np.testing.assert_allclose(-3 * loss.sum(), found.logp[0, place], rtol=1e-4)
    ranked = generator.rank(variables, builder, EXAMPLES)
    targets = builder.log.item[EXAMPLES.rows[:, 0]]
    assert [row[rank] for row, rank in zip(ranked.lists, ranked.item_ranks, strict=True)] == list(
        targets
    )


def test_lists_without_seen_items(parts):
    """An ID stays while one of its items is left; the third user has three IDs: six lists."""
    builder, generator, variables = parts
    found = session_lists(generator, variables, builder, EXAMPLES, width=24, n=24, seen=SEEN)
    items = [
        set(user[logp > -np.inf].reshape(-1))
        for user, logp in zip(found.items, found.logp, strict=True)
    ]
    assert items == [{2, 1, 4, 5}, {3, 4, 5}, {1, 4, 5}]
    np.testing.assert_array_equal(np.isfinite(found.logp).sum(1), [24, 6, 6])
    assert (found.items[2, 6:] == -1).all()


def test_items_of_leaves():
    offsets, items = IDS.items_by_leaf(TIES)
    leaf = np.array([[[2, 0], [-1, 1]], [[3, 2], [2, -1]]])
    found = items_of_leaves(leaf, offsets, items)
    np.testing.assert_array_equal(found, [[[3, 1], [-1, 4]], [[5, 3], [3, -1]]])
    seen = [np.array([3, 1]), np.array([3, 0, 2])]
    found = items_of_leaves(leaf, offsets, items, seen)
    np.testing.assert_array_equal(found, [[[0, -1], [-1, 4]], [[5, -1], [-1, -1]]])


def test_point_wise_lists(parts):
    builder, generator, variables = parts
    whole = generator.rank(variables, builder, EXAMPLES, n=6).lists
    plain = point_wise_lists(generator, variables, builder, EXAMPLES, 3)
    np.testing.assert_array_equal(plain, whole[:, :3])
    wide = point_wise_lists(generator, variables, builder, EXAMPLES, 3, at_most=1)
    assert (np.sort(SIDS[wide, 0], axis=1) == [0, 1, 2]).all()
    np.testing.assert_array_equal(wide[:, 0], plain[:, 0])
    unseen = point_wise_lists(generator, variables, builder, EXAMPLES, 4, seen=SEEN)
    for user, known in zip(unseen, SEEN, strict=True):
        assert not set(user) & set(known)
    assert (unseen[2] == -1).sum() == 1


def test_candidates_share_the_probability_of_their_id(parts):
    builder, generator, variables = parts
    items, logp = item_candidates(generator, variables, builder, EXAMPLES, seen=SEEN)
    np.testing.assert_array_equal(
        items[:, :3],
        point_wise_lists(generator, variables, builder, EXAMPLES, 3, seen=SEEN),
    )
    beams = list(generator.beams(variables, builder, EXAMPLES))
    sid, beam_logp = (np.concatenate([getattr(x, name) for x in beams]) for name in ("sid", "logp"))
    for user in range(3):
        of_id = dict(zip(map(tuple, sid[user]), beam_logp[user], strict=True))
        known = set(SEEN[user].tolist())
        assert set(items[user].tolist()) - {-1} == set(range(6)) - known
        for item, value in zip(items[user], logp[user], strict=True):
            sharing = (SIDS[item] == SIDS).all(1).sum()
            expected = -np.inf if item < 0 else of_id[tuple(SIDS[item])] - np.log(sharing)
            assert value == pytest.approx(expected)


def test_lists_are_drawn_as_probable_as_their_items():
    """First items, and second ones given the first, against the probabilities themselves."""
    p, users = np.array([0.5, 0.3, 0.2]), np.array([4, 7])
    items = np.array([[5, 1, 3, -1]] * 2)
    logp = np.append(np.log(p) + 2, -np.inf)[None].repeat(2, 0)
    found = drawn_lists(items, logp, users, SIDS, number=4001, items=2)
    assert found.shape == (2, 4001, 2)
    np.testing.assert_array_equal(found[:, 0], items[:, :2])
    assert (found[0] != found[1]).any()
    drawn = found[0, 1:]
    assert (drawn[:, 0] != drawn[:, 1]).all()
    for i, first in enumerate([5, 1, 3]):
        mine = drawn[drawn[:, 0] == first]
        assert len(mine) / 4000 == pytest.approx(p[i], abs=0.03)
        for j, second in enumerate([5, 1, 3]):
            share = (mine[:, 1] == second).mean()
            assert share == pytest.approx(0 if i == j else p[j] / (1 - p[i]), abs=0.06)


def test_models_draw_with_the_same_noise():
    """Another order and more candidates, the same probabilities: the same lists."""
    a = drawn_lists(np.array([[1, 4]]), np.zeros((1, 2)), [3], SIDS, number=9, items=2)
    order, logp = np.array([[4, 5, 1]]), np.array([[0, -50.0, 0]])
    b = drawn_lists(order, logp, [3], SIDS, number=9, items=2)
    np.testing.assert_array_equal(a[0, 1:], b[0, 1:])
    other = drawn_lists(np.array([[1, 4]]), np.zeros((1, 2)), [3], SIDS, number=9, items=2, seed=1)
    assert (a != other).any()


def test_drawn_lists_follow_the_rule_and_may_come_short():
    items, logp = np.array([[1, 4, 0, -1]]), np.array([[0, 0, -9.0, -np.inf]])
    (found,) = drawn_lists(items, logp, [0], SIDS, number=6, items=2, at_most=1)
    assert {tuple(sorted(row)) for row in found.tolist()} <= {(0, 1), (0, 4)}  # 1, 4 share a code
    (short,) = drawn_lists(items, logp, [0], SIDS, number=3, items=5)
    assert (np.sort(short, axis=1) == [-1, -1, 0, 1, 4]).all()
