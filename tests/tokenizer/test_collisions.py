"""Items that share their codes: kept, counted or spread, against loops and by hand."""

import collections

import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.tokenizer import collisions
from onerec_jax.tokenizer.collisions import resolve
from onerec_jax.tokenizer.rq_kmeans import encode


def world(items=60, levels=3, size=4, dim=5, seed=0):
    """Vectors, random codebooks that shrink by level, and nearest codes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((items, dim)).astype(np.float32)
    codebooks = rng.standard_normal((levels, size, dim)) / 2.0 ** np.arange(levels)[:, None, None]
    codebooks = codebooks.astype(np.float32)
    return x, encode(x, codebooks), codebooks


def squared(x, sid, codebooks):
    """Distance of a vector to what an ID stands for, in float64."""
    rest = x.astype(np.float64)
    for level, code in enumerate(sid):
        rest = rest - codebooks[level][code]
    return (rest**2).sum()


def by_turns(priority, fixed=None):
    """Rows in the order in which items choose."""
    fixed = np.zeros(len(priority), bool) if fixed is None else fixed
    return sorted(range(len(priority)), key=lambda row: (not fixed[row], priority[row], row))


def distinct(sids) -> int:
    return len(np.unique(sids, axis=0))


# ------------------------------------------------------------------------------------------ keep


def test_keep_changes_nothing():
    x, codes, codebooks = world()
    np.testing.assert_array_equal(resolve("keep", x, codes, codebooks, np.arange(60)), codes)


# ---------------------------------------------------------------------------------------- append


def append_by_loops(codes, priority):
    count = collections.Counter()
    last = {}
    for row in by_turns(priority):
        sid = tuple(codes[row])
        last[row] = count[sid]
        count[sid] += 1
    return [[*codes[row], last[row]] for row in range(len(codes))]


@pytest.mark.parametrize(("levels", "size"), [(1, 20), (2, 12), (3, 8)])
def test_append_against_loops(levels, size):
    x, codes, codebooks = world(levels=levels, size=size, seed=3)
    priority = np.random.default_rng(1).integers(0, 4, 60)  # with ties, which go by row
    before = codes.copy()
    sids = resolve("append", x, codes, codebooks, priority)
    assert sids.dtype == np.int32
    assert sids.tolist() == append_by_loops(codes, priority)
    assert distinct(sids) == 60
    assert distinct(codes) < 60
    np.testing.assert_array_equal(codes, before)  # the argument is left alone


def test_append_counts_by_priority():
    codes = np.array([[1, 2], [1, 2], [0, 2], [1, 2]], np.int32)
    codebooks = np.zeros((2, 4, 3), np.float32)
    sids = resolve("append", None, codes, codebooks, np.array([5, -1, 9, 2]))
    np.testing.assert_array_equal(sids, [[1, 2, 2], [1, 2, 0], [0, 2, 0], [1, 2, 1]])


def test_append_goes_on_after_fixed_numbers():
    """Also where fixed numbers have gaps, and for items that come first by priority."""
    codes = np.array([[1, 0], [1, 3], [1, 0], [1, 0], [2, 0], [0, 1]], np.int32)
    fixed = np.array([True, True, False, False, False, True])
    codebooks = np.zeros((1, 8, 2), np.float32)
    sids = resolve("append", None, codes, codebooks, np.array([9, 9, 1, 0, 0, 9]), fixed)
    np.testing.assert_array_equal(sids, [[1, 0], [1, 3], [1, 5], [1, 4], [2, 0], [0, 1]])


@pytest.mark.parametrize(("items", "fits"), [(4, True), (5, False)])
def test_append_has_no_more_numbers_than_codes(items, fits):
    codes, codebooks = np.zeros((items, 2), np.int32), np.zeros((2, 4, 3), np.float32)
    if fits:
        sids = resolve("append", None, codes, codebooks, np.zeros(items))
        assert sids[:, 2].tolist() == [0, 1, 2, 3]
        return
    with pytest.raises(InputError, match="^5 items share one ID.* 4 codes") as caught:
        resolve("append", None, codes, codebooks, np.zeros(items))
    assert "--tokenizer.collisions spread" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------- spread


def spread_by_loops(x, codes, codebooks, priority, fixed=None, branches=collisions.FREE_BRANCHES):
    """One item after the other: the nearest free code of its prefix; then other branches."""
    out, groups = [list(map(int, sid)) for sid in codes], collections.defaultdict(list)
    turns = by_turns(priority, fixed)
    for row in turns:
        groups[tuple(out[row][:-1])].append(row)
    homeless = []
    for prefix, rows in groups.items():
        if len({out[row][-1] for row in rows}) == len(rows):
            continue  # nobody has to move
        taken = set()
        for row in rows:
            if fixed is not None and fixed[row]:
                taken.add(out[row][-1])
                continue
            size = codebooks.shape[1]
            order = sorted(range(size), key=lambda c: squared(x[row], (*prefix, c), codebooks))
            free = [code for code in order if code not in taken]
            if free:
                out[row][-1] = free[0]
                taken.add(free[0])
            else:
                homeless.append(row)
    if codebooks.shape[0] == 1:
        return np.array(out)
    taken = {tuple(sid) for sid in out}
    for row in sorted(homeless, key=turns.index):
        start = tuple(out[row][:-2])
        size = range(codebooks.shape[1])
        near = sorted(size, key=lambda c: squared(x[row], (*start, c), codebooks))[:branches]
        wishes = [(*start, branch, last) for branch in near for last in size]
        free = [sid for sid in wishes if sid not in taken]
        if free:
            out[row] = list(min(free, key=lambda sid: squared(x[row], sid, codebooks)))
            taken.add(tuple(out[row]))
    return np.array(out)


@pytest.mark.parametrize(
    ("levels", "size"), [(1, 4), (1, 64), (2, 8), (2, 7), (3, 3), (3, 4), (3, 8)]
)
@pytest.mark.parametrize("some_fixed", [False, True])
def test_spread_against_loops(levels, size, some_fixed):
    """From room in most prefixes to more items than IDs."""
    x, codes, codebooks = world(levels=levels, size=size)
    rng = np.random.default_rng(5)
    priority = rng.integers(0, 4, 60)  # with ties
    fixed = rng.random(60) < 0.4 if some_fixed else None
    before = codes.copy()
    sids = resolve("spread", x, codes, codebooks, priority, fixed)
    np.testing.assert_array_equal(codes, before)  # the argument is left alone
    assert sids.dtype == np.int32
    expected = spread_by_loops(x, codes, codebooks, priority, fixed)
    np.testing.assert_array_equal(sids, expected)
    assert distinct(sids) >= distinct(codes)
    if some_fixed:
        np.testing.assert_array_equal(sids[fixed], codes[fixed])
    elif size**2 >= 60 or levels == 1:  # all branches of a first code are within reach
        assert distinct(sids) == min(60, size**levels)


def test_few_branches_are_tried(monkeypatch):
    monkeypatch.setattr(collisions, "FREE_BRANCHES", 2)
    x, codes, codebooks = world(levels=2, size=8)
    sids = resolve("spread", x, codes, codebooks, np.arange(60))
    expected = spread_by_loops(x, codes, codebooks, np.arange(60), branches=2)
    np.testing.assert_array_equal(sids, expected)
    assert distinct(codes) < distinct(sids) < 60


def test_prefixes_stay_where_there_is_room():
    x, codes, codebooks = world(levels=2, size=16)
    sids = resolve("spread", x, codes, codebooks, np.arange(60))
    assert distinct(codes) < 60 == distinct(sids)
    np.testing.assert_array_equal(sids[:, :-1], codes[:, :-1])
    _, group, count = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    rooms = np.unique(codes[count[group.reshape(-1)] > 1, :-1], axis=0)
    crowded = (codes[:, None, :-1] == rooms).all(-1).any(1)
    assert crowded.any()
    assert not crowded.all()
    np.testing.assert_array_equal(sids[~crowded], codes[~crowded])  # they shared with nobody


def test_the_highest_priority_keeps_the_nearest_code():
    x = np.array([[0.0], [0.1], [0.2], [0.3]], np.float32)
    codebooks = np.zeros((2, 4, 1), np.float32)
    codebooks[1, :, 0] = [0.0, 1.0, 5.0, 3.0]
    sids = resolve("spread", x, np.zeros((4, 2), np.int32), codebooks, np.array([2, 0, 1, 3]))
    np.testing.assert_array_equal(sids, [[0, 3], [0, 0], [0, 1], [0, 2]])


def test_a_full_prefix_overflows_into_the_nearest_free_branch():
    """Two codes a level: three items want (0, 0); the third finds (0, ·) full and goes next door.

    IDs stand for 0, 1 (branch 0) and 10, 11 (branch 1); 10 is taken by the last item.
    """
    codebooks = np.array([[[0.0], [10.0]], [[0.0], [1.0]]], np.float32)
    x = np.array([[0.1], [0.0], [0.2], [10.0]], np.float32)
    codes = encode(x, codebooks)
    np.testing.assert_array_equal(codes, [[0, 0], [0, 0], [0, 0], [1, 0]])
    sids = resolve("spread", x, codes, codebooks, np.array([1, 0, 2, 3]))
    np.testing.assert_array_equal(sids, [[0, 1], [0, 0], [1, 1], [1, 0]])


def test_one_item_more_than_ids_stays_where_it_was():
    codebooks = np.array([[[0.0], [10.0]], [[0.0], [1.0]]], np.float32)
    x = np.linspace(0, 0.4, 5)[:, None].astype(np.float32)
    codes = np.zeros((5, 2), np.int32)
    sids = resolve("spread", x, codes, codebooks, np.arange(5))
    assert distinct(sids[:4]) == 4
    np.testing.assert_array_equal(sids[4], [0, 0])


def test_one_level_spreads_too():
    x = np.array([[0.0], [0.1], [5.0], [0.2]], np.float32)
    codebooks = np.array([[[0.0], [1.0], [5.0]]], np.float32)
    sids = resolve("spread", x, encode(x, codebooks), codebooks, np.arange(4))
    np.testing.assert_array_equal(sids, [[0], [1], [2], [0]])  # the fourth has nowhere to go


def test_fixed_items_stay_though_they_share_an_id():
    """Nobody gets their ID, and they count as taken before anybody chooses."""
    codebooks = np.zeros((2, 4, 1), np.float32)
    codebooks[1, :, 0] = [0.0, 1.0, 2.0, 3.0]
    x = np.array([[0.0], [0.0], [0.0], [0.0]], np.float32)
    codes = np.array([[0, 0], [0, 1], [0, 1], [0, 0]], np.int32)
    fixed = np.array([False, True, True, False])
    sids = resolve("spread", x, codes, codebooks, np.array([0, 5, 6, 1]), fixed)
    np.testing.assert_array_equal(sids, [[0, 0], [0, 1], [0, 1], [0, 2]])


def test_a_memory_map_in_half_precision_will_do(tmp_path):
    x, codes, codebooks = world(levels=2, size=7)
    np.save(tmp_path / "x.npy", x.astype(np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    sids = resolve("spread", mapped, codes, codebooks, np.arange(60))
    expected = resolve("spread", np.asarray(mapped, np.float32), codes, codebooks, np.arange(60))
    np.testing.assert_array_equal(sids, expected)
