"""Which two of the proposed sessions make a pair, and what is judged and kept of them."""

import types

import helpers
import numpy as np
import polars as pl
import pytest

from onerec_jax.errors import InputError
from onerec_jax.generation.session_beam import SessionBeams
from onerec_jax.posttraining.pairs import BeamConfig, PairFiles, PairMaker, best_and_worst
from onerec_jax.posttraining.preference_step import PairBatch

NAN = np.nan


def test_by_hand():
    reward = [
        [0.2, 0.9, NAN, 0.1, 0.5],
        [0.3, 0.3, 0.1, 0.1, 0.3],  # the more probable is chosen, the less probable rejected
        [0.4, 0.4, 0.4, 0.4, 0.4],
        [0.7, NAN, NAN, NAN, NAN],
        [NAN, NAN, NAN, NAN, NAN],
    ]
    places, valid = best_and_worst(reward)
    np.testing.assert_array_equal(valid, [True, True, False, False, False])
    np.testing.assert_array_equal(places, [[1, 3], [0, 3], [0, 0], [0, 0], [0, 0]])
    places, valid = best_and_worst(reward, 3)  # three that are worse; only the first user has them
    np.testing.assert_array_equal(valid, [True, False, False, False, False])
    np.testing.assert_array_equal(places[0], [1, 3, 0, 4])
    places, valid = best_and_worst(reward, 2)
    np.testing.assert_array_equal(places[1], [0, 3, 2])
    assert not best_and_worst(reward, 5)[1].any()


def test_rewards_that_hardly_differ():
    """The same items in another order: rounding is no preference."""
    reward = [[1.0, 1.0 - 1e-5], [1.0, 0.9]]
    np.testing.assert_array_equal(best_and_worst(reward)[1], [True, True])
    np.testing.assert_array_equal(best_and_worst(reward, 1, 1e-3)[1], [False, True])


def test_against_a_loop():
    rng = np.random.default_rng(0)
    reward = rng.integers(0, 4, (200, 6)).astype(float)
    reward[rng.random(reward.shape) < 0.2] = NAN
    places, valid = best_and_worst(reward, 2)
    for row, found, ok in zip(reward, places, valid, strict=True):
        known = [i for i in range(6) if np.isfinite(row[i])]
        ranked = sorted(known, key=lambda i: (row[i], -i))
        best = max(known, key=lambda i: (row[i], -i), default=None)
        good = len(ranked) > 2 and row[ranked[1]] < row[best]
        assert ok == good
        assert list(found) == ([best, *ranked[:2]] if good else [0, 0, 0])


@pytest.fixture(scope="module")
def run():
    data, ids = helpers.full_dataset(users=4, items=12), helpers.random_ids(12)
    return types.SimpleNamespace(dataset=data, ids=ids, tie_order=np.arange(12))


def drawn_of(run, items, dead=()):
    """`SessionBeams` of item rows `[R, W, m]`; -1: codes that no item has."""
    items = np.array(items)
    sid = np.where(items[..., None] < 0, run.ids.codebook_size - 1, run.ids.sids[items])
    logp = np.tile(-np.arange(1.0, 1 + items.shape[1]), (len(items), 1)).astype(np.float32)
    for place in dead:
        sid[place], logp[place] = -1, -np.inf
    return SessionBeams(sid.astype(np.int32), logp, np.zeros(items.shape, np.int32))


def score(examples, items):
    """The sum of the rows, NaN where one is missing."""
    reward = items.sum(-1).astype(np.float32)
    return {"reward": np.where((items < 0).any(-1), NAN, reward)}


def test_judged_and_kept(run, tmp_path):
    """The best and the worst of the lists that can be judged; a list with no item is neither."""
    none = (run.ids.find(np.full((1, run.ids.sids.shape[1]), run.ids.codebook_size - 1)) < 0).all()
    assert none  # else the test's illegal codes are an item's
    first = run.ids.items_by_leaf(run.tie_order)
    serving = first[1][first[0][:-1]][run.ids.leaf_of_item]  # of items with one ID the first
    shown = [[[1, 2], [7, 8], [-1, 11], [0, 1]], [[3, 4]] * 4]
    drawn = drawn_of(run, shown, dead=[(1, 3)])
    maker = PairMaker(run, score, 1, 1e-3)
    user, position = np.array([0, 2]), np.array([1, 2])
    reward, places, parts, found = maker(user, position, drawn)
    wanted = [serving[x].sum() for x in ([1, 2], [7, 8], [0, 1])]
    np.testing.assert_array_equal(reward[0], [wanted[0], wanted[1], NAN, wanted[2]])
    assert np.isnan(reward[1, 3])
    best, worst = np.argmax(wanted), np.argmin(wanted)
    assert [(0, 1, 3)[i] for i in (best, worst)] == list(places[0])
    np.testing.assert_array_equal(parts["valid"], [True, False])
    np.testing.assert_array_equal(parts["sid"][0], drawn.sid[0][places[0]])
    assert found["skipped"] == 1
    assert found["reward"] == pytest.approx(np.nanmean(reward))
    assert found["best_reward"] == pytest.approx((max(wanted) + np.nanmax(reward[1])) / 2)
    assert found["worst_reward"] == pytest.approx((min(wanted) + np.nanmin(reward[1])) / 2)
    assert found["legality"][-1] == pytest.approx(13 / 14)  # of the codes that are alive

    batch = PairBatch(None, None, user, position)
    files = PairFiles(tmp_path / "pairs", 5, maker)
    files(4, batch, drawn, reward, places, parts["valid"])
    assert not (tmp_path / "pairs").exists()
    files(5, batch, drawn, reward, places, parts["valid"])
    frame = pl.read_parquet(tmp_path / "pairs" / "step-0000005.parquet")
    assert frame.height == 7  # the dead one is left out
    mine = frame.filter(pl.col("user_id") == run.dataset.users["user_id"][0])
    for name, place in zip(("chosen", "rejected"), places[0], strict=True):
        (row,) = mine.filter(pl.col("pair") == name).rows(named=True)
        assert row["place"] == place
        assert row["item_ids"] == serving[shown[0][place]].tolist()  # ids are rows here
    assert frame["pair"].null_count() == 5
    (unjudged,) = mine.filter(pl.col("reward").is_null()).rows(named=True)
    assert unjudged["item_ids"][0] is None


def test_without_a_single_judged_list(run):
    drawn = drawn_of(run, [[[-1, 2], [-1, 3]]])
    _, _, parts, found = PairMaker(run, score)(np.zeros(1, int), np.ones(1, int), drawn)
    assert not parts["valid"].any()
    assert np.isnan(found["reward"])
    assert found["skipped"] == 1


def test_a_reward_that_is_no_number(run):
    def broken(examples, items):
        return {"reward": np.full(items.shape[:2], np.inf, np.float32)}

    drawn = drawn_of(run, [[[-1, 2], [1, 3]]])
    with pytest.raises(InputError, match="the rewards of 1 of 2 proposed lists are no numbers"):
        PairMaker(run, broken)(np.zeros(1, int), np.ones(1, int), drawn)


def test_too_few_sessions():
    with pytest.raises(InputError, match="--beams.width 1: a pair takes 2"):
        BeamConfig(width=1)
