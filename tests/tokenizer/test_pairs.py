"""Item pairs: both kinds against loops, look-up, files, and no look at later actions."""

import collections
import itertools

import helpers
import numpy as np
import polars as pl
import pytest

from onerec_jax.data.features import positive_actions
from onerec_jax.data.schema import build_dataset
from onerec_jax.data.splits import make_split, train_mask
from onerec_jax.errors import InputError
from onerec_jax.inputs import PositiveRule
from onerec_jax.tokenizer import pairs as module
from onerec_jax.tokenizer.item_pairs import KINDS, ItemPairs
from onerec_jax.tokenizer.pairs import (
    PairConfig,
    collaborative_vectors,
    mine_pairs,
    swing,
    user_to_item,
)

ITEMS = 25
EVERYTHING = {"top_k": ITEMS, "max_user_items": 1000, "max_item_users": 1000}


def quiet(line):
    pass


def random_log(seed, users=30, items=ITEMS):
    """Users with 1 to 20 actions, popular items and repetitions; user row, item row."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rng.integers(1, 21, users))
    return user, (items * rng.random(len(user)) ** 2).astype(np.int32)


def as_dict(pairs):
    """(first, second) -> score; the pairs must be distinct."""
    keys = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, pairs.score.tolist(), strict=True))


def swing_by_loops(user, item, alpha, weight):
    """(i, j) -> (score, common users), as the formula reads."""
    items_of, users_of = collections.defaultdict(set), collections.defaultdict(set)
    for u, i in zip(user.tolist(), item.tolist(), strict=True):
        items_of[u].add(i)
        users_of[i].add(u)
    w = {u: len(own) ** -0.5 if weight == "inverse-sqrt" else 1.0 for u, own in items_of.items()}
    result = {}
    for i, j in itertools.permutations(users_of, 2):
        common = users_of[i] & users_of[j]
        score = 0.0
        for u, v in itertools.permutations(common, 2):
            score += w[u] * w[v] / (alpha + len(items_of[u] & items_of[v]))
        if score:
            result[i, j] = (score, len(common))
    return result


@pytest.mark.parametrize("weight", ["inverse-sqrt", "none"])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 15.0])
def test_swing_against_loops(weight, alpha):
    user, item = random_log(0)
    cfg = PairConfig(user_weight=weight, alpha=alpha, **EVERYTHING)
    pairs = swing(user, item, ITEMS, cfg, quiet)
    expected = swing_by_loops(user, item, alpha, weight)
    found = as_dict(pairs)
    assert len(found) > 100
    assert found == {pair: pytest.approx(score, rel=1e-6) for pair, (score, _) in expected.items()}
    assert [a.dtype for a in (pairs.first, pairs.second, pairs.score, pairs.kind)] == [
        np.int32,
        np.int32,
        np.float32,
        np.uint8,
    ]
    assert {KINDS[kind] for kind in pairs.kind} == {"swing"}


@pytest.mark.parametrize(("block", "scores"), [(40, 10**9), (10**9, 60), (300, 100), (1, 300)])
def test_swing_in_small_blocks_is_the_same(monkeypatch, block, scores):
    user, item = random_log(1)
    cfg = PairConfig(top_k=4, min_support=3)
    whole = swing(user, item, ITEMS, cfg, quiet)
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "SCORES", scores)
    parts = swing(user, item, ITEMS, cfg, quiet)
    np.testing.assert_array_equal(parts.first, whole.first)
    np.testing.assert_array_equal(parts.second, whole.second)
    np.testing.assert_allclose(parts.score, whole.score, rtol=1e-6)


def test_swing_does_not_mind_the_order_of_users():
    user, item = random_log(2)
    mixed = np.argsort(np.random.default_rng(0).random(30)[user], kind="stable")
    cfg = PairConfig(max_user_items=5, max_item_users=6)
    assert as_dict(swing(user[mixed], item[mixed], ITEMS, cfg, quiet)) == as_dict(
        swing(user, item, ITEMS, cfg, quiet)
    )


@pytest.mark.parametrize("support", [2, 3, 5])
def test_min_support(support):
    user, item = random_log(3)
    cfg = PairConfig(min_support=support, **EVERYTHING)
    expected = swing_by_loops(user, item, cfg.alpha, cfg.user_weight)
    found = as_dict(swing(user, item, ITEMS, cfg, quiet))
    assert set(found) == {pair for pair, (_, common) in expected.items() if common >= support}


def test_top_k_ties_by_lower_row():
    # Users 0 and 1 have items 0 to 3 in common; users 2 and 3 have items 0 and 4, more telling.
    user = np.array([0] * 4 + [1] * 4 + [2] * 2 + [3] * 2)
    item = np.array([0, 1, 2, 3, 3, 2, 1, 0, 0, 4, 4, 0])
    pairs = swing(user, item, 6, PairConfig(top_k=2), quiet)
    assert pairs.first.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert pairs.second.tolist() == [4, 1, 0, 2, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k_against_loops(top_k):
    user, item = random_log(4)
    cfg = PairConfig(top_k=top_k)
    pairs = swing(user, item, ITEMS, cfg, quiet)
    expected = swing_by_loops(user, item, cfg.alpha, cfg.user_weight)
    for i in range(ITEMS):
        scores = {j: np.float32(score) for (a, j), (score, _) in expected.items() if a == i}
        best = sorted(scores, key=lambda j: (-scores[j], j))[:top_k]
        assert pairs.second[pairs.first == i].tolist() == best


def test_caps_bound_the_log_and_the_seed_decides():
    user, item = random_log(5)
    cfg = PairConfig(max_user_items=6, max_item_users=7, top_k=ITEMS)
    log = module._thinned(user.astype(np.int64), item.astype(np.int64), ITEMS, cfg)
    assert log.sum(1).max() <= 6
    assert log.sum(0).max() == 7
    # The formula holds for what is left.
    left_user, left_item = log.nonzero()
    expected = swing_by_loops(left_user, left_item, cfg.alpha, cfg.user_weight)
    found = as_dict(swing(user, item, ITEMS, cfg, quiet))
    assert found == {pair: pytest.approx(score, rel=1e-6) for pair, (score, _) in expected.items()}
    assert as_dict(swing(user, item, ITEMS, cfg, quiet)) == found
    other = PairConfig(max_user_items=6, max_item_users=7, top_k=ITEMS, seed=1)
    assert as_dict(swing(user, item, ITEMS, other, quiet)) != found


def test_the_latest_items_of_a_user_are_kept():
    user, item = random_log(6)
    cfg = PairConfig(max_user_items=4, max_item_users=1000)
    log = module._thinned(user.astype(np.int64), item.astype(np.int64), ITEMS, cfg)
    for u in range(30):
        latest = list(dict.fromkeys(item[user == u].tolist()[::-1]))[:4]
        assert sorted(log[[u]].indices.tolist()) == sorted(latest)


def test_capped_items_keep_users_in_common():
    """A draw of its own for every item would leave two in a hundred of these 1,000 users twice."""
    user = np.repeat(np.arange(1000), 2)
    log = module._thinned(user, np.tile([0, 1], 1000), 2, PairConfig(max_item_users=20))
    assert (log.sum(1) == 2).sum() == 20


@pytest.mark.parametrize("latest", [1, 3, 50])
@pytest.mark.parametrize("tile", [1, 4_000_000])
def test_user_to_item_against_loops(monkeypatch, latest, tile):
    monkeypatch.setattr(module, "TILE", tile)
    user, item = random_log(7)
    vectors = np.random.default_rng(7).standard_normal((ITEMS, 5))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = {}
    for u in range(30):
        own = item[user == u].tolist()
        for t, target in enumerate(own):
            others = [other for other in own[max(0, t - latest) : t] if other != target]
            cosines = [float(unit[target] @ unit[other]) for other in others]
            if others and max(cosines) > 0:
                best = int(np.argmax(cosines))
                expected[target, others[best]] = pytest.approx(cosines[best], abs=1e-6)
    pairs = user_to_item(user, item, ITEMS, PairConfig(latest=latest), vectors, quiet)
    assert as_dict(pairs) == expected
    assert len(expected) > 20
    assert (np.diff(pairs.first * ITEMS + pairs.second) > 0).all()
    assert {KINDS[kind] for kind in pairs.kind} == {"user-to-item"}


def test_the_last_target_is_paired_once():
    """Four actions fill one group of three and a third of the next."""
    vectors = np.array([[0.0, 1.0], [1.0, 0.1], [1.0, 0.9], [1.0, 0.0]])
    pairs = user_to_item([0] * 4, range(4), 4, PairConfig(latest=3), vectors, quiet)
    assert pairs.first.tolist() == [1, 2, 3]
    assert pairs.second.tolist() == [0, 1, 1]


def test_collaborative_vectors():
    # Two groups of users who share nothing; item 6 belongs to nobody.
    user = np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3])
    item = np.array([0, 1, 2, 2, 1, 0, 3, 4, 3, 4, 5, 5])
    vectors = collaborative_vectors(user, item, 7, 64, 0)
    assert vectors.dtype == np.float32
    assert (vectors[6] == 0).all()
    cosine = vectors @ vectors.T
    assert cosine[0, 1] > 0.1
    assert cosine[3, 4] > 0.1
    assert np.abs(cosine[:3, 3:6]).max() < 1e-5
    np.testing.assert_array_equal(collaborative_vectors(user, item, 7, 64, 0), vectors)
    # At full width, dot products are those of the scaled columns.
    columns = np.zeros((4, 7))
    columns[user, item] = 1
    columns /= np.sqrt(columns.sum(1, keepdims=True) * np.maximum(columns.sum(0), 1))
    np.testing.assert_allclose(cosine, columns.T @ columns, atol=0.1)


def test_logs_without_pairs():
    empty = np.zeros(0, np.int32)
    one = np.zeros(1, np.int32)
    for user, item in ((empty, empty), (one, one), (one.repeat(3), one.repeat(3))):
        assert len(swing(user, item, 3, PairConfig(), quiet)) == 0
        assert len(user_to_item(user, item, 3, PairConfig(), say=quiet)) == 0


def random_pairs(seed, size=80):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 20, size)
    second = (first + rng.integers(1, 20, size)) % 20
    return ItemPairs(
        first.astype(np.int32),
        second.astype(np.int32),
        rng.random(size).astype(np.float32),
        rng.integers(0, 2, size).astype(np.uint8),
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_contains_against_a_set(symmetric):
    pairs = random_pairs(8)
    known = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    if symmetric:
        known |= {(j, i) for i, j in known}
    rng = np.random.default_rng(8)
    i, j = rng.integers(-2, 30, 40), rng.integers(-2, 30, 50)
    expected = np.array([[(a, b) in known for b in j.tolist()] for a in i.tolist()])
    assert 0 < expected.sum() < expected.size
    quick = pairs.contains(i[:, None], j[None, :], symmetric=symmetric)
    slow = pairs.contains(*np.broadcast_arrays(i[:, None], j[None, :]), symmetric=symmetric)
    for found in (quick, slow):
        assert found.dtype == bool
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(
        pairs.contains(i[:, None].astype(np.int32), 3, symmetric=symmetric)[:, 0],
        [(a, 3) in known for a in i.tolist()],
    )
    assert pairs.contains(pairs.first, pairs.second, symmetric=symmetric).all()


def test_contains_of_no_pairs():
    nothing = swing(np.zeros(1, int), np.zeros(1, int), 3, PairConfig(), quiet)
    assert not nothing.contains(np.arange(3)[:, None], np.arange(3)[None, :]).any()
    assert not nothing.contains(0, 1)


def test_mining_takes_positive_training_actions():
    dataset = helpers.full_dataset(users=40)
    split, cfg = make_split(dataset), PairConfig(top_k=5)
    for rule in (PositiveRule(), PositiveRule(min_rating=3.0)):
        keep = train_mask(dataset, split) & positive_actions(dataset, rule)
        log = (
            dataset.interactions["user_row"].to_numpy()[keep],
            dataset.item_rows[keep],
            dataset.num_items,
            cfg,
        )
        expected = [swing(*log, quiet), user_to_item(*log, say=quiet)]
        pairs = mine_pairs(dataset, split, cfg, rule, quiet)
        for field in ("first", "second", "score", "kind"):
            both = np.concatenate([getattr(part, field) for part in expected])
            np.testing.assert_array_equal(getattr(pairs, field), both)
        assert set(pairs.kind) == {0, 1}
        assert (pairs.first != pairs.second).all()


def test_mining_one_kind():
    dataset = helpers.full_dataset(users=40)
    split = make_split(dataset)
    kinds = [
        set(mine_pairs(dataset, split, PairConfig(**{off: False}), say=quiet).kind)
        for off in ("swing", "user_to_item")
    ]
    assert kinds == [{1}, {0}]


@pytest.mark.parametrize("kind", ["leave-one-out", "time"])
def test_later_actions_change_nothing(kind):
    dataset = helpers.full_dataset(users=40, split=kind)
    split = make_split(dataset)
    later = pl.Series(~train_mask(dataset, split))
    assert later.any()
    # What follows the training part happens to other items, with other feedback. The times stay,
    # for they say where the training part ends.
    other = {"item_id": 11 - pl.col("item_id"), "rating": 6 - pl.col("rating")}
    other |= {"like": 1 - pl.col("like"), "playtime_s": 90 - pl.col("playtime_s")}
    frame = dataset.interactions.with_columns(
        pl.when(later).then(value).otherwise(name).alias(name) for name, value in other.items()
    )
    changed = build_dataset(
        "toy",
        dataset.items,
        dataset.users.select("user_id"),
        frame.select("user_id", "item_id", "time_s", "rating", "playtime_s", "like", "click"),
        meta={"origin": "", "licence": ""},
        split=kind,
    )
    assert changed.fingerprint != dataset.fingerprint
    before = mine_pairs(dataset, split, PairConfig(), say=quiet)
    after = mine_pairs(changed, make_split(changed), PairConfig(), say=quiet)
    for field in ("first", "second", "score", "kind"):
        np.testing.assert_array_equal(getattr(after, field), getattr(before, field))


def toy_dataset(ids):
    """Three items under these ids; two users who touch each once, in opposite order."""
    return build_dataset(
        "toy",
        pl.DataFrame({"item_id": ids}),
        None,
        pl.DataFrame({"user_id": [1] * 3 + [2] * 3, "item_id": [*ids, *ids[::-1]]}),
        meta={"origin": "", "licence": ""},
        split="leave-one-out",
    )


def test_mining_nothing_is_refused():
    dataset = toy_dataset([1, 2, 3])  # the one training action of each user
    with pytest.raises(
        InputError, match=r"toy: no item pairs in 2 positive.*--tokenizer.pairs.min-support"
    ):
        mine_pairs(dataset, make_split(dataset), PairConfig(), say=quiet)


@pytest.mark.parametrize("ids", [[7, 40, 5], ["b", "a", "ä"]])
def test_round_trip(tmp_path, ids):
    dataset = toy_dataset(ids)
    pairs = ItemPairs(
        np.array([0, 2, 1], np.int32),
        np.array([1, 0, 2], np.int32),
        np.array([0.25, 1e-9, 3], np.float32),
        np.array([0, 1, 1], np.uint8),
    )
    path = tmp_path / "new" / "toy.pairs.parquet"
    pairs.save(path, dataset)
    frame = pl.read_parquet(path)
    assert frame.columns == ["item_id", "other_id", "score", "kind"]
    assert frame.row(0) == (sorted(ids)[0], sorted(ids)[1], 0.25, "swing")
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    loaded = ItemPairs.load(path, dataset)
    for field in ("first", "second", "score", "kind"):
        np.testing.assert_array_equal(getattr(loaded, field), getattr(pairs, field))
        assert getattr(loaded, field).dtype == getattr(pairs, field).dtype


def test_ids_of_narrow_types_are_welcome(tmp_path):
    frame = pl.DataFrame(
        {"item_id": [5], "other_id": [40], "score": [2], "kind": ["swing"]},
        schema_overrides={"item_id": pl.UInt8, "other_id": pl.Int32, "kind": pl.Categorical},
    )
    frame.write_parquet(tmp_path / "own.parquet")
    loaded = ItemPairs.load(tmp_path / "own.parquet", toy_dataset([7, 40, 5]))
    assert (loaded.first.tolist(), loaded.second.tolist()) == ([0], [2])
    assert loaded.score.tolist() == [2.0]


GOOD = {"item_id": [5, 7], "other_id": [7, 40], "score": [1.0, 0.5], "kind": ["swing"] * 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other_id": [7, 41]}, r"row 2, column other_id: 41 is no item of data set 'toy'"),
        ({"item_id": [None, 7]}, r"row 1, column item_id: an empty value is no item"),
        ({"item_id": ["5", "7"]}, r"column item_id: ids are String, but Int64 in data set 'toy'"),
        ({"other_id": [7.0, 40.0]}, r"column other_id: ids are Float64, but Int64"),
        ({"other_id": [7, 7]}, r"row 2, item 7 is paired with itself"),
        ({"score": None}, r"column score is missing"),
        ({"kind": None}, r"column kind is missing"),
        ({"item_id": None}, r"column item_id is missing"),
        ({"score": ["1", "2"]}, r"column score: must be numbers, not String"),
        ({"score": [float("nan"), 1.0]}, r"row 1, column score: nan is no finite number"),
        ({"score": [1.0, None]}, r"row 2, column score: an empty value is no finite number"),
        ({"kind": ["swing", "friend"]}, r"row 2, column kind: 'friend' is none of swing, user-to"),
        ({"kind": [None, "swing"]}, r"row 1, column kind: an empty value is none of"),
        ({"kind": [0, 1]}, r"column kind: must be strings, not Int64"),
    ],
)
def test_bad_files_are_refused(tmp_path, change, message):
    path = tmp_path / "toy.pairs.parquet"
    columns = {name: values for name, values in {**GOOD, **change}.items() if values is not None}
    pl.DataFrame(columns).write_parquet(path)
    with pytest.raises(InputError, match=message) as caught:
        ItemPairs.load(path, toy_dataset([7, 40, 5]))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path):
    dataset, path = toy_dataset([7, 40, 5]), tmp_path / "toy.pairs.parquet"
    with pytest.raises(InputError, match="no such file"):
        ItemPairs.load(path, dataset)
    with pytest.raises(InputError, match="no such file"):
        ItemPairs.load(tmp_path, dataset)
    path.write_text("item_id,other_id\n")
    with pytest.raises(InputError, match="unreadable Parquet"):
        ItemPairs.load(path, dataset)
    pl.DataFrame(GOOD).clear().write_parquet(path)
    with pytest.raises(InputError, match="holds no pairs"):
        ItemPairs.load(path, dataset)
    with pytest.raises(InputError, match="cannot be written"):
        random_pairs(0).save(path / "below-a-file", helpers.full_dataset(items=20))


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"alpha": -1}, "--tokenizer.pairs.alpha"),
        ({"alpha": float("nan")}, "--tokenizer.pairs.alpha"),
        ({"max_user_items": 1}, "--tokenizer.pairs.max-user-items"),
        ({"max_item_users": 1}, "--tokenizer.pairs.max-item-users"),
        ({"min_support": 1}, "--tokenizer.pairs.min-support"),
        ({"top_k": 0}, "--tokenizer.pairs.top-k"),
        ({"latest": 0}, "--tokenizer.pairs.latest"),
        ({"vector_dim": 0}, "--tokenizer.pairs.vector-dim"),
        ({"seed": -1}, "--tokenizer.pairs.seed"),
        ({"user_weight": "log"}, "--tokenizer.pairs.user-weight log"),
        ({"swing": False, "user_to_item": False}, "--tokenizer.pairs.no-swing"),
    ],
)
def test_settings_out_of_range(changes, flag):
    with pytest.raises(InputError, match=flag):
        PairConfig(**changes)


def test_progress_is_said(monkeypatch):
    lines, now = [], itertools.count(step=100)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    user, item = random_log(9)
    swing(user, item, ITEMS, PairConfig(), lines.append)
    user_to_item(user, item, ITEMS, PairConfig(), say=lines.append)
    assert any(line.startswith("swing: 0% of the users") for line in lines)
    assert any(line.startswith("user-to-item: 0% of the actions") for line in lines)
