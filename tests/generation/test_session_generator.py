"""Lists of items for users: what session beams find, and point-wise lists beside them."""

import helpers
import numpy as np
import pytest

from onerec_jax.data.batches import BatchBuilder, log_from_histories
from onerec_jax.data.examples import Examples
from onerec_jax.data.features import ItemFeatures
from onerec_jax.generation.generator import Generator
from onerec_jax.generation.session_generator import (
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
