"""Legality of all that is generated, beside a search in plain Python and draws counted one by
one."""

import helpers
import jax
import numpy as np
import pytest

from onerec_jax.generation.legality import legality_by_level
from onerec_jax.generation.sampling import sample
from onerec_jax.sharding import make_mesh

USERS, GROUP = 5, 6
MODEL = helpers.ToyModel(levels=3, codebook_size=4)
IDS = helpers.random_ids(12, levels=3, codebook_size=4)
VECTORS = MODEL.users(USERS)
EXAMPLES = helpers.examples_of(np.arange(USERS), np.zeros(USERS))


def measured(method, count=GROUP, batch_size=2):
    def builder(users, positions, rows=None):
        return VECTORS[users]

    return legality_by_level(
        MODEL, {}, IDS, builder, EXAMPLES, make_mesh(1),
        method=method, count=count, batch_size=batch_size,
    )  # fmt: skip


def shares(generated):
    """Share of legal prefixes of each user's IDs, counted."""
    known = {tuple(sid[:level]) for sid in IDS.sids.tolist() for level in (1, 2, 3)}
    return [
        [np.mean([tuple(sid[:level]) in known for sid in sids]) for level in (1, 2, 3)]
        for sids in generated
    ]


def test_beams():
    searched = MODEL.plain_search(VECTORS, GROUP, [None] * USERS)
    expected = shares([[sid for sid, _ in beams] for beams in searched])
    found = measured("beam")
    np.testing.assert_allclose(found, expected)
    assert 0 < found[:, -1].mean() < 1


def test_draws_belong_to_the_user():
    keys = [jax.random.fold_in(jax.random.key(0), user) for user in range(USERS)]
    drawn = sample(MODEL, {}, VECTORS, jax.numpy.stack(keys), count=GROUP).sid
    expected = shares(np.asarray(drawn).tolist())
    np.testing.assert_allclose(measured("sample"), expected)


@pytest.mark.parametrize("method", ["beam", "sample"])
def test_no_id_is_more_legal_than_its_prefix(method):
    found = measured(method, count=9, batch_size=5)
    assert (np.diff(found, axis=1) <= 0).all()
