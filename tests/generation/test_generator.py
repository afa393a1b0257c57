"""From beams to item lists, ranks and legality."""

import functools
import types

import helpers
import jax
import numpy as np
import pytest

from onerec_jax.data.batches import BatchBuilder, log_from_histories
from onerec_jax.data.examples import Examples
from onerec_jax.data.features import ItemFeatures
from onerec_jax.evaluation.ranking import NOT_RANKED, tie_order
from onerec_jax.generation.beam import Beams
from onerec_jax.generation.generator import (
    Generator,
    compute_copy,
    drop_seen,
    expand_leaves,
)
from onerec_jax.models.onerec import OneRec
from onerec_jax.sharding import make_mesh, put_batch
from onerec_jax.tokenizer.semantic_ids import SemanticIds


def expand_by_loops(leaf_bw, offsets, items, n):
    lists = []
    for leaves in leaf_bw:
        found = []
        for leaf in leaves:
            if leaf >= 0:
                found += items[offsets[leaf] : offsets[leaf + 1]].tolist()
        lists.append((found + [-1] * n)[:n])
    return np.array(lists)


@pytest.mark.parametrize("n", [1, 4, 9, 60])
def test_expand_leaves_against_loops(n):
    rng = np.random.default_rng(n)
    ids = helpers.random_ids(40, codebook_size=3)  # 27 IDs at most: collisions everywhere
    offsets, items = ids.items_by_leaf(rng.permutation(40))
    assert np.diff(offsets).max() > 1
    leaves = len(ids.leaf_sids)
    leaf = np.stack([rng.permutation(leaves)[:6] for _ in range(20)])
    leaf[rng.random(leaf.shape) < 0.3] = -1  # dead beams, in the middle too
    leaf[0] = -1
    lists = expand_leaves(leaf, offsets, items, n)
    assert lists.dtype == np.int32
    np.testing.assert_array_equal(lists, expand_by_loops(leaf, offsets, items, n))


def test_items_on_one_id_come_by_popularity_then_row():
    """The stated tie rule, end to end: popularity descending, then the lower item row."""
    sids = np.array([[1, 1], [0, 0], [1, 1], [1, 1], [1, 1]], np.int32)
    ids = SemanticIds(sids, np.zeros((2, 2, 1), np.float32), {})
    offsets, items = ids.items_by_leaf(tie_order(np.array([3, 0, 7, 3, 9])))
    lists = expand_leaves(np.array([[1, 0]]), offsets, items, 5)
    np.testing.assert_array_equal(lists, [[4, 2, 0, 3, 1]])


def test_drop_seen_closes_the_gaps():
    lists = np.array([[5, 3, 9, 1], [2, 4, -1, -1], [7, 8, 6, 0]], np.int32)
    seen = [np.array([3, 9]), np.array([], int), np.array([7, 8, 6, 0])]
    np.testing.assert_array_equal(drop_seen(lists, seen, 3), [[5, 1, -1], [2, 4, -1], [-1] * 3])


# Items 0 to 4; items 0, 2 and 3 share the ID (1, 1), so that leaves are 0: (0, 0), 1: (0, 2),
# 2: (1, 1). Popularity puts item 3 before 0 before 2.
IDS = SemanticIds(
    np.array([[1, 1], [0, 0], [1, 1], [1, 1], [0, 2]], np.int32),
    np.zeros((2, 3, 1), np.float32),
    {},
)
TIES = tie_order(np.array([5, 1, 5, 6, 0]))
HISTORIES = [[0, 1, 2], [3, 4], [1, 0, 4]]
EXAMPLES = Examples(np.array([0, 1, 2], np.int32), np.array([2, 1, 2], np.int32))  # items 2, 4, 4


@functools.cache
def builder_and_generator():
    spec = helpers.bare_spec(num_items=5, levels=2, codebook_size=3)
    cfg = helpers.tiny_config(num_experts=0)
    log = log_from_histories(HISTORIES, spec)
    builder = BatchBuilder(log, ItemFeatures(IDS.sids, None, None, None), cfg)
    generator = Generator(OneRec(cfg, spec), IDS, TIES, make_mesh(2), beam_width=4, batch_size=1)
    return builder, generator


@pytest.fixture
def generator():
    """A generator whose search finds given beams instead of the model's."""
    _, made = builder_and_generator()
    assert made.batch_size == 2  # rounded up to the devices of the mesh

    def finds(leaf, sid=None):
        calls = []

        def search(variables, batch, trie):
            start = made.batch_size * len(calls)
            calls.append(trie)
            rows = np.minimum(np.arange(start, start + made.batch_size), len(leaf) - 1)
            sids = np.array(sid if sid is not None else np.zeros((*leaf.shape, 2)))[rows]
            logp = np.where(sids[..., 0] < 0, -np.inf, -1.0)
            return Beams(sid=sids, logp=logp, leaf=leaf[rows])

        fake = types.SimpleNamespace(**vars(made), calls=calls)
        fake.search = search
        for name in ("beams", "rank", "legality", "legal_share", "_legal", "_batches"):
            setattr(fake, name, types.MethodType(getattr(Generator, name), fake))
        return fake

    return finds


def test_ranks_of_items_and_of_ids(generator):
    builder, _ = builder_and_generator()
    leaf = np.array([[2, 0, -1, -1], [1, 2, 0, -1], [0, 2, -1, -1]])
    found = generator(leaf).rank(None, builder, EXAMPLES, n=3)
    # A hit on the ID (rank 0 of user 0) is a hit on the item only at its place in the tie.
    np.testing.assert_array_equal(found.lists, [[3, 0, 2], [4, 3, 0], [1, 3, 0]])
    np.testing.assert_array_equal(found.item_ranks, [2, 0, NOT_RANKED])
    np.testing.assert_array_equal(found.id_ranks, [0, 0, NOT_RANKED])
    short = generator(leaf).rank(None, builder, EXAMPLES, n=2)
    np.testing.assert_array_equal(short.item_ranks, [NOT_RANKED, 0, NOT_RANKED])
    np.testing.assert_array_equal(short.id_ranks, [0, 0, NOT_RANKED])


def test_rank_without_seen_items(generator):
    builder, _ = builder_and_generator()
    leaf = np.array([[2, 0, -1, -1], [1, 2, 0, -1], [0, 2, -1, -1]])
    seen = [np.array([0, 1]), np.array([3]), np.array([0, 1])]
    found = generator(leaf).rank(None, builder, EXAMPLES, n=3, seen=seen)
    np.testing.assert_array_equal(found.lists, [[3, 2, -1], [4, 0, 2], [3, 2, -1]])
    np.testing.assert_array_equal(found.item_ranks, [1, 0, NOT_RANKED])


def test_legality_by_hand(generator):
    builder, _ = builder_and_generator()
    sid = [
        [[0, 0], [0, 1], [-1, -1], [-1, -1]],  # legal, not, dead, dead
        [[1, 1], [0, 2], [2, 2], [1, 0]],  # legal, legal, not, not
        [[2, 0], [-1, -1], [-1, -1], [-1, -1]],  # not
    ]
    fake = generator(np.full((3, 4), -1), np.array(sid))
    assert fake.legality(None, builder, EXAMPLES) == pytest.approx(3 / 7)
    assert fake.calls == [None, None]  # searched without the trie
    fake = generator(np.full((3, 4), -1), np.array(sid))
    np.testing.assert_allclose(fake.legal_share(None, builder, EXAMPLES), [1 / 2, 2 / 4, 0])


def test_the_real_search_ranks_and_scores_every_example():
    builder, generator = builder_and_generator()
    batch = builder(EXAMPLES.user, EXAMPLES.position)
    variables = helpers.random_variables(generator.model, batch)
    found = generator.rank(variables, builder, EXAMPLES, n=5)
    # Three IDs and four beams: every list holds the whole catalogue.
    np.testing.assert_array_equal(np.sort(found.lists), np.tile(np.arange(5), (3, 1)))
    assert set(found.id_ranks) <= {0, 1, 2}
    place = [list(row).index(target) for row, target in zip(found.lists, [2, 4, 4], strict=True)]
    np.testing.assert_array_equal(found.item_ranks, place)
    (together,) = [
        np.concatenate(parts)
        for parts in zip(
            *[(b.logp,) for b in generator.beams(variables, builder, EXAMPLES)], strict=True
        )
    ]
    loss = generator.loss(variables, builder, EXAMPLES)
    assert loss.shape == (3, 2)
    # The loss of the target is minus the score of its beam.
    for user in range(3):
        score = together[user, found.id_ranks[user]]
        np.testing.assert_allclose(loss[user].sum(), -score, rtol=1e-4)


def test_a_model_in_training_mode_is_refused():
    cfg, spec = helpers.tiny_config(), helpers.bare_spec(num_items=5, levels=2, codebook_size=3)
    with pytest.raises(AssertionError, match="dropless"):
        Generator(
            OneRec(cfg, spec, train=True), IDS, TIES, make_mesh(1), beam_width=2, batch_size=1
        )


def test_searches_of_every_bucket_are_compiled_before_the_first_request():
    builder, generator = builder_and_generator()
    batch = builder(EXAMPLES.user, EXAMPLES.position)
    variables = helpers.random_variables(generator.model, batch)
    generator.warm_up(variables, batch, users=(1,), widths=(3,), filters=(64,))
    compiled = generator._search._cache_size()
    two = jax.tree.map(lambda x: x[:2], batch)
    filter = generator.filters([[1], []])
    placed = put_batch(two, generator.mesh)
    found = generator.search(variables, placed, trie=generator.trie, filter=filter, width=3)
    generator.search(variables, placed, trie=generator.trie, width=3)
    assert generator._search._cache_size() == compiled
    leaf = np.asarray(found.leaf)
    assert sorted(leaf[0].tolist()) == [-1, 1, 2]  # item 1 has an ID of its own, which is gone
    assert sorted(leaf[1].tolist()) == [0, 1, 2]


def test_another_catalogue_takes_the_place_of_the_first():
    builder, generator = builder_and_generator()
    batch = builder(EXAMPLES.user, EXAMPLES.position)
    variables = helpers.random_variables(generator.model, batch)
    generator.rank(variables, builder, EXAMPLES, n=5)
    compiled = generator._search._cache_size()
    sids = np.array([[1, 1], [0, 1], [1, 1], [1, 1], [1, 0]], np.int32)
    generator.use(SemanticIds(sids, IDS.codebooks, {}), TIES)
    (beams,) = [b for b in generator.beams(variables, builder, EXAMPLES)][:1]
    found = {tuple(sid) for sid in beams.sid.reshape(-1, 2).tolist()} - {(-1, -1)}
    assert found == {(0, 1), (1, 0), (1, 1)}
    assert generator._search._cache_size() == compiled
    generator.use(IDS, TIES)


def test_a_compute_copy_changes_no_bit():
    cfg = helpers.tiny_config(
        compute_dtype="bfloat16", num_experts=2, decoder_layers=1, pathways=("static", "short")
    )
    spec = helpers.full_spec()
    model, batch = OneRec(cfg, spec), helpers.random_batch(cfg, spec, 2)
    variables = helpers.random_variables(model, batch)
    copy = compute_copy(model, variables)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(v["params"])) for v in (variables, copy)]
    assert sizes[1] < 0.6 * sizes[0]
    run = helpers.quick_jit(model.apply)
    np.testing.assert_array_equal(run(variables, batch), run(copy, batch))
