"""The feature specification on disk, and the batch as a tree of arrays."""

import json

import helpers
import jax
import pytest

from onerec_jax.inputs import FeatureSpec, PositiveRule


@pytest.mark.parametrize(
    "spec",
    [
        helpers.bare_spec(),
        helpers.full_spec(),
        helpers.full_spec(
            tags=("Ä, ö", '"quoted"'),
            positive=PositiveRule(min_rating=3.5, min_watch_ratio=0.25, actions=("like",)),
        ),
    ],
)
def test_spec_round_trip(spec):
    text = spec.to_json()
    loaded = FeatureSpec.from_json(text)
    assert loaded == spec
    assert hash(loaded) == hash(spec)  # tuples, not lists: a spec is a static argument of jit
    assert json.loads(text)["num_items"] == 30


def test_a_missing_feature_is_no_leaf():
    cfg = helpers.tiny_config()
    bare = helpers.random_batch(cfg, helpers.bare_spec(), 2)
    full = helpers.random_batch(cfg, helpers.full_spec(), 2)
    clustered = helpers.random_batch(cfg, helpers.full_spec(clustered=True), 2)
    assert len(jax.tree.leaves(bare)) == 3 + 3 * 3
    assert len(jax.tree.leaves(full)) == 3 + 3 * 9
    assert len(jax.tree.leaves(clustered)) == 3 + 3 * 9 + 1
