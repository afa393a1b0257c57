"""Lives in few clusters: the tree and its twin, no leak, replay, quality, parts, files, errors."""

import dataclasses
import functools

import numpy as np
import polars as pl
import pytest

from experiments import compress as experiment
from onerec_jax import cli
from onerec_jax.data import compress as compress_module
from onerec_jax.data import hierarchy
from onerec_jax.data.compress import compress
from onerec_jax.data.hierarchy import hierarchical_clusters
from onerec_jax.data.lifelong import (
    DAY_S,
    Actions,
    Life,
    LifelongConfig,
    Snapshots,
    chunk_ends,
    clusters_of,
    stored_ends,
)
from onerec_jax.data.schema import build_dataset, save_dataset
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.semantic_ids import SemanticIds

SMALL = LifelongConfig(max_clusters=8, max_actions=120)


def mixture(rng, n, dim, centres, noise=0.3):
    """Float32 `[n, dim]` around `centres` normal centres."""
    mean = rng.normal(size=(centres, dim))
    x = mean[rng.integers(centres, size=n)] + noise * rng.normal(size=(n, dim))
    return x.astype(np.float32)


def make_log(seed=0, lengths=(0, 1, 7, 30, 100, 250, 60), items=50, days=True):
    """A data set of users with so many actions (0: the user is known, but idle) and vectors."""
    rng, n = np.random.default_rng(seed), sum(lengths)
    columns = {
        "user_id": np.repeat(np.arange(len(lengths)), lengths),
        "item_id": rng.integers(items, size=n),
    }
    if days:
        columns["time_s"] = 10 * DAY_S + rng.integers(40 * DAY_S, size=n)
        columns["playtime_s"] = rng.random(n).astype(np.float32)
    dataset = build_dataset(
        "made",
        pl.DataFrame({"item_id": np.arange(items), "duration_s": rng.random(items)}),
        pl.DataFrame({"user_id": np.arange(len(lengths))}),
        pl.DataFrame(columns),
        meta={"origin": "a test", "licence": "none"},
        split="leave-one-out",
    )
    return dataset, rng.normal(size=(items, 4)).astype(np.float32)


def equal(a: Snapshots, b: Snapshots) -> bool:
    """Bit for bit, all arrays."""
    return a.arrays.keys() == b.arrays.keys() and all(
        a.arrays[name].dtype == b.arrays[name].dtype and a.arrays[name].tobytes() == array.tobytes()
        for name, array in b.arrays.items()
    )


# ---------------------------------------------------------------------------------------- the tree


def twin(x, weight, max_clusters, seed):
    """Clusters as sets of rows: each M tried, each node split alone. Of distinct `x`."""
    order = np.random.default_rng(seed).permutation(len(x))
    x1, weights = hierarchy.centred(x), weight.astype(np.float32)

    @functools.cache
    def children(members):
        """k-means of a node alone, whatever the threshold."""
        n, k = int(weight[list(members)].sum()), 2
        while (k + 1) ** 3 <= n:
            k += 1
        k, rows = min(k, len(members)), np.array(members)
        one = np.array([0]), np.array([len(rows)]), np.array([k])
        sizes = hierarchy.split_nodes(x1, weights, rows, *one)
        assert len(sizes) == k
        assert sizes.min() > 0
        return [tuple(part.tolist()) for part in np.split(rows, np.cumsum(sizes)[:-1])]

    def leaves(members, threshold):
        if len(members) == 1 or weight[list(members)].sum() <= threshold:
            return [frozenset(members)]
        return [leaf for part in children(members) for leaf in leaves(part, threshold)]

    for threshold in range(weight.sum() + 1):
        found = leaves(tuple(order.tolist()), threshold)
        if len(found) <= max_clusters:
            return set(found), threshold
    raise AssertionError


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_clusters", [1, 2, 5, 30, 99, 150])
@pytest.mark.parametrize("weighted", [False, True])
def test_same_as_twin(seed, max_clusters, weighted):
    rng = np.random.default_rng(seed)
    x = mixture(rng, 150, 6, 12)
    weight = rng.integers(1, 20, 150) if weighted else np.ones(150, np.int64)
    wanted, threshold = twin(x, weight, max_clusters, seed)
    label, found = hierarchy.grow_tree(x, max_clusters, weight, seed)
    assert found == threshold
    members = [np.flatnonzero(label == c).tolist() for c in range(label.max() + 1)]
    assert set(map(frozenset, members)) == wanted


@pytest.mark.parametrize("kind", ["isotropic", "line", "near", "doubled", "huge"])
def test_every_split_makes_progress(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5)).astype(np.float32)
    if kind == "line":
        x = np.arange(400, dtype=np.float32)[:, None] ** 3
    elif kind == "near":  # distinct, but not to a product in float32
        x = np.float32(1000) + np.arange(400, dtype=np.float32)[:, None] * np.float32(2**-13)
    elif kind == "doubled":
        x = x[rng.integers(50, size=400)]
    elif kind == "huge":
        x *= 1e18
    for max_clusters in (1, 10, 45, 399):
        label = hierarchical_clusters(x, max_clusters, seed=1)
        distinct = len(np.unique(x, axis=0))
        assert len(np.unique(label)) == label.max() + 1 <= max_clusters
        assert label.max() + 1 >= min(distinct, max_clusters) / 8
        same = hierarchy.first_equal(x)
        assert (label == label[same]).all()  # equal vectors stay together


def test_simple_cases():
    x = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    assert len(hierarchical_clusters(x[:0], 5, seed=0)) == 0
    assert hierarchical_clusters(x[:1], 5, seed=0).tolist() == [0]
    assert len(set(hierarchical_clusters(x, 30, seed=0).tolist())) == 30
    assert set(hierarchical_clusters(np.ones((40, 3)), 5, seed=0)) == {0}
    # Equal vectors outweigh every M, and still the others are told apart.
    heavy = np.concatenate([np.repeat(x[:1], 100, axis=0), x])
    assert len(set(hierarchical_clusters(heavy, 20, seed=0).tolist())) > 10
    assert hierarchy.first_equal(np.array([[0.0, 1], [2, 3], [-0.0, 1]])).tolist() == [0, 1, 0]
    mass, points = np.array([8, 26, 27, 63, 64, 10**5, 10**5]), np.array([9, 9, 9, 9, 9, 99, 20])
    assert hierarchy.fan_out(mass, points).tolist() == [2, 2, 3, 3, 4, 46, 20]


def test_weight_is_as_good_as_copies():
    rng = np.random.default_rng(3)
    x, weight = mixture(rng, 120, 5, 9), rng.integers(1, 9, 120)
    alone = hierarchical_clusters(x, 20, weight=weight, seed=4)
    copied = hierarchical_clusters(np.repeat(x, weight, axis=0), 20, seed=4)
    np.testing.assert_array_equal(np.repeat(alone, weight), copied)


def test_finds_the_mixture():
    x = mixture(np.random.default_rng(0), 2000, 8, 40, noise=0.01)
    label = hierarchical_clusters(x, 300, seed=0)
    spread = [np.ptp(x[label == c], axis=0).max() for c in range(label.max() + 1)]
    assert np.mean(np.array(spread) < 0.2) > 0.95


# --------------------------------------------------------------------------------- one snapshot


def test_representative_order_and_means():
    rng = np.random.default_rng(0)
    vectors, n = mixture(rng, 40, 4, 6), 300
    vectors[20:] = vectors[:20]  # equal vectors: the latest of equally near ones
    actions = Actions(
        rng.integers(40, size=n).astype(np.int32),
        np.arange(n) * 1000,
        np.where(rng.random(n) < 0.5, np.nan, rng.random(n)).astype(np.float32),
        None,
    )
    config = LifelongConfig(max_clusters=10, chunk_actions=n)
    [shot] = Life(vectors, config).append(actions)
    label, representative = clusters_of(actions.item, vectors, config)
    x = vectors[actions.item].astype(np.float64)
    assert shot.representative.tolist() == representative.tolist()
    assert shot.duration_s is None
    latest = []
    for c in range(len(shot.count)):
        members = np.flatnonzero(label == c)
        latest.append(members[-1])
        distance = ((x[members] - x[members].mean(0)) ** 2).sum(1)
        best = members[distance <= distance.min() + 1e-12]
        assert representative[c] == best[-1]
        assert shot.count[c] == len(members)
        assert shot.time_s[c] == np.rint(actions.time_s[members].mean())
        played = actions.playtime_s[members].astype(np.float64)
        if np.isnan(played).all():
            assert np.isnan(shot.playtime_s[c])
        else:
            assert shot.playtime_s[c] == np.float32(np.nanmean(played))
    assert latest == sorted(latest, reverse=True)


def test_window_of_latest_actions():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 4)).astype(np.float32)
    actions = Actions(np.arange(500, dtype=np.int32))
    config = LifelongConfig(max_clusters=20, max_actions=100, chunk_actions=500)
    [shot] = Life(vectors, config).append(actions)
    assert shot.count.sum() == 100
    assert shot.representative.min() >= 400
    # As if the older ones had never been, but for the positions.
    [alone] = Life(vectors, dataclasses.replace(config, chunk_actions=100)).append(
        actions.part(400, 500)
    )
    np.testing.assert_array_equal(shot.representative, alone.representative + 400)


@pytest.mark.parametrize("kind", ["isotropic", "mixture"])
def test_days_are_as_good_as_one_clustering(kind):
    """A life that came day by day: within 5% of the distances of one tree of all its actions.

    Of other seeds, for with the same one they are equal.
    """
    rng = np.random.default_rng(0)
    n, day, clusters = 6000, 100, 300
    x = rng.normal(size=(n, 16)) if kind == "isotropic" else mixture(rng, n, 16, 60)
    x, item = x.astype(np.float32), np.arange(n, dtype=np.int32)
    life = Life(x, LifelongConfig(max_clusters=clusters, growth=0.5))
    shots = []
    for start in range(0, n, day):
        today = item[start : start + day]
        shots += life.append(Actions(today, today // day * DAY_S))

    def mean_distance(covered, **kwargs):
        config = LifelongConfig(max_clusters=clusters, **kwargs)
        label, representative = clusters_of(item[:covered], x, config)
        return np.linalg.norm(x[:covered] - x[representative[label]], axis=1).mean(), representative

    for shot in [shot for shot in shots if shot.covered > 5 * clusters]:
        distance, representative = mean_distance(shot.covered)
        assert representative.tolist() == shot.representative.tolist()
        others = [mean_distance(shot.covered, seed=seed)[0] for seed in (1, 2, 3)]
        assert distance < 1.05 * np.mean(others)
    assert shots[-1].covered > 4000


def test_hundred_thousand_actions():
    rng, n = np.random.default_rng(0), 100_000
    vectors = mixture(rng, 30_000, 8, 500)
    actions = Actions(rng.integers(30_000, size=n).astype(np.int32), np.arange(n) * 864)
    config = LifelongConfig(growth=1.0)
    shots = [shot for shot in Life(vectors, config).append(actions) if shot.covered > 2000]
    assert [len(shot.count) <= 2000 and shot.count.sum() for shot in shots] == [
        shot.covered for shot in shots
    ]
    assert len(shots[-1].count) > 1500


# ------------------------------------------------------------------------------- which snapshots


def test_chunks():
    time_s = np.array([0, 5, DAY_S - 1, DAY_S, DAY_S, 5 * DAY_S, 6 * DAY_S])
    assert chunk_ends(time_s, 7, SMALL).tolist() == [3, 5, 6]  # the last day is not over
    assert chunk_ends(time_s[:0], 0, SMALL).tolist() == []
    assert chunk_ends(time_s[:1], 1, SMALL).tolist() == []
    by_three = dataclasses.replace(SMALL, chunk_actions=3)
    assert [chunk_ends(None, n, by_three).tolist() for n in (2, 3, 7)] == [[], [3], [3, 6]]


def test_growth_thins_clustered_snapshots_only():
    ends = np.arange(1, 30)
    config = LifelongConfig(max_clusters=8, growth=0.5)
    assert stored_ends(ends, config) == [*range(1, 9), 12, 18, 27]
    assert stored_ends(ends[19:], config, 18) == [27]
    assert stored_ends(ends, dataclasses.replace(config, growth=0)) == ends.tolist()


@pytest.mark.parametrize("chunk_actions", [0, 7])
def test_replay_is_the_same(tmp_path, chunk_actions):
    dataset, vectors = make_log()
    config = dataclasses.replace(SMALL, chunk_actions=chunk_actions)
    whole = compress(dataset, vectors, config, tmp_path / "out")
    lives = compress_module.Lives.of(dataset)
    for step in (1, 13):
        shots = []
        for user in range(dataset.num_users):
            actions, life = lives.of_user(user), Life(vectors, config)
            for start in range(0, len(actions.item), step):
                shots += life.append(actions.part(start, start + step))
        assert [shot.covered for shot in shots] == whole.covered.tolist()
        sizes = np.diff(whole.cluster_offsets)
        assert [len(shot.count) for shot in shots] == sizes.tolist()
        for name in shots[0]._fields[1:]:
            joined = np.concatenate([getattr(shot, name) for shot in shots])
            assert joined.tobytes() == getattr(whole, name).tobytes()


def test_find(tmp_path):
    dataset, vectors = make_log()
    found = compress(dataset, vectors, SMALL, tmp_path / "out")
    for user in range(dataset.num_users):
        mine = range(found.user_offsets[user], found.user_offsets[user + 1])
        for position in range(dataset.offsets[user + 1] - dataset.offsets[user] + 2):
            seen = [s for s in mine if found.covered[s] <= position]
            assert found.find([user], [position]).tolist() == [seen[-1] if seen else -1]
    sizes = np.diff(found.cluster_offsets)
    assert ((sizes == 0) == (found.covered <= SMALL.max_clusters)).all()
    assert sizes.max() <= SMALL.max_clusters
    assert found.representative.max() < 250


def visible(found: Snapshots, user, position):
    """All that targets at positions up to `position` see."""
    seen = []
    for target in range(position + 1):
        s = found.find([user], [target])[0]
        clusters = slice(found.cluster_offsets[s], found.cluster_offsets[s + 1])
        fields = ("representative", "count", "time_s", "playtime_s", "duration_s")
        values = [getattr(found, name)[clusters].tobytes() for name in fields]
        seen.append((found.covered[s], *values) if s >= 0 else None)
    return seen


@pytest.mark.parametrize("chunk_actions", [0, 11])
def test_no_leak(tmp_path, chunk_actions):
    """Whatever happens from a target on, it sees the same; of itself its day counts alone."""
    rng = np.random.default_rng(5)
    dataset, vectors = make_log(lengths=(200,))
    config = dataclasses.replace(SMALL, chunk_actions=chunk_actions)
    before = compress(dataset, vectors, config, tmp_path / "before")
    log, time_s = dataset.interactions, dataset.column("time_s")
    for trial, position in enumerate([1, 9, 50, *rng.integers(2, 198, 8), 199]):
        # Any later times: the target keeps its day, or moves too and only earlier ones must not
        # notice, or it is the only one to change.
        first = position + (trial % 3 == 0)
        moved, changes = time_s.copy(), np.arange(200) >= position
        if trial % 3 == 2:
            changes = np.arange(200) == position
        else:
            moved[first:] = time_s[first - 1] + np.sort(rng.integers(9 * DAY_S, size=200 - first))
        items = np.where(changes, rng.integers(50, size=200), log["item_row"])
        changed = log.with_columns(
            pl.Series("item_row", items, pl.Int32),
            pl.Series("time_s", moved),
            pl.Series("playtime_s", np.where(changes, -1, log["playtime_s"]), pl.Float32),
        )
        other = dataclasses.replace(dataset, interactions=changed)
        after = compress(other, vectors, config, tmp_path / f"after-{trial}")
        last = position - (trial % 3 == 1)
        assert visible(after, 0, last) == visible(before, 0, last)


def test_since_leaves_out_what_nobody_sees(tmp_path):
    dataset, vectors = make_log()
    since = np.array([0, 0, 3, 10, 90, 100, 59])
    whole = compress(dataset, vectors, SMALL, tmp_path / "whole")
    late = compress(dataset, vectors, SMALL, tmp_path / "late", since=since)
    assert len(late.covered) < len(whole.covered)
    for user, first in enumerate(since):
        length = dataset.offsets[user + 1] - dataset.offsets[user]
        assert visible(late, user, length)[first:] == visible(whole, user, length)[first:]


# ----------------------------------------------------------------------- parts, processes, files


@pytest.fixture
def many_blocks(monkeypatch):
    monkeypatch.setattr(compress_module, "BLOCK_WORK", 300)


def test_parallel_is_serial_and_a_killed_job_goes_on(tmp_path, many_blocks, monkeypatch):
    dataset, vectors = make_log()
    since = np.zeros(dataset.num_users, np.int64)
    lines = []
    kwargs = {"since": since, "say": lines.append}
    serial = compress(dataset, vectors, SMALL, tmp_path / "serial", **kwargs)
    assert "users 7 / 7" in lines[-1]
    made, run = [], compress_module.Job.run

    def killed(job, block):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(block)
        run(job, block)

    with monkeypatch.context() as patch:
        patch.setattr(compress_module.Job, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(dataset, vectors, SMALL, tmp_path / "out", **kwargs)
    assert not (tmp_path / "out").exists()
    parts = tmp_path / "out.parts"
    assert len(list(parts.glob("users-*.npz"))) == 2
    (parts / ".half.npz.tmp").write_bytes(b"half")  # what a kill may leave
    stamp = {path: path.stat().st_mtime_ns for path in parts.glob("users-*.npz")}

    with pytest.raises(InputError, match="other settings"):
        compress(dataset, vectors + 1, SMALL, tmp_path / "out", **kwargs)
    with pytest.raises(InputError, match="other settings"):
        compress(dataset, vectors, SMALL, tmp_path / "out")
    assert stamp == {path: path.stat().st_mtime_ns for path in parts.glob("users-*.npz")}

    again = compress(dataset, vectors, SMALL, tmp_path / "out", workers=2, **kwargs)
    assert any("2 of" in line for line in lines)
    assert equal(serial, again)
    assert serial.fingerprint == again.fingerprint
    assert not parts.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "serial"]


def test_overwrite(tmp_path, many_blocks):
    dataset, vectors = make_log()
    out = tmp_path / "out"
    first = compress(dataset, vectors, SMALL, out)
    with pytest.raises(InputError, match="--overwrite"):
        compress(dataset, vectors, SMALL, out)
    other = dataclasses.replace(SMALL, max_clusters=5)
    second = compress(dataset, vectors, other, out, overwrite=True)
    assert second.fingerprint != first.fingerprint
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="no snapshots"):
        compress(dataset, vectors, SMALL, tmp_path / "mine", overwrite=True)


def test_save_and_load(tmp_path):
    dataset, vectors = make_log()
    made = compress(dataset, vectors, SMALL, tmp_path / "out")
    made.save(tmp_path / "copy")
    copy = Snapshots.load(tmp_path / "copy", dataset, made.manifest["vectors"])
    assert equal(made, copy)
    assert copy.manifest == made.manifest
    assert copy.fingerprint == made.fingerprint
    assert isinstance(copy.count, np.memmap)
    other = make_log(seed=1)[0]
    with pytest.raises(InputError, match="another data set"):
        Snapshots.load(tmp_path / "copy", other)
    with pytest.raises(InputError, match="other item vectors"):
        Snapshots.load(tmp_path / "copy", vectors="0" * 16)
    with pytest.raises(InputError, match="holds no lifelong snapshots"):
        Snapshots.load(tmp_path)
    np.save(tmp_path / "copy" / "count.npy", np.zeros(3, np.int32))
    with pytest.raises(InputError, match="count.npy"):
        Snapshots.load(tmp_path / "copy")
    (tmp_path / "copy" / "lifelong.json").write_text('{"format": "old"}')
    with pytest.raises(InputError, match="format 'old'"):
        Snapshots.load(tmp_path / "copy")


@pytest.mark.parametrize("lengths", [(1,), (3, 1), (40, 1)])
def test_short_lives_and_no_time(tmp_path, lengths):
    """Lives that need no clusters; columns that the source lacks are lacking."""
    dataset, vectors = make_log(lengths=lengths, days=False)
    config = LifelongConfig(max_clusters=50, chunk_actions=2)
    found = compress(dataset, vectors, config, tmp_path / "out")
    assert np.diff(found.user_offsets).tolist() == [length // 2 for length in lengths]
    assert len(found.count) == len(found.duration_s) == 0
    assert found.time_s is None
    assert found.playtime_s is None
    assert found.find([0], [1]).tolist() == [-1]


def test_older_actions_are_counted(tmp_path):
    dataset, vectors = make_log(lengths=(300, 20))
    config = dataclasses.replace(SMALL, chunk_actions=10)
    counts = compress(dataset, vectors, config, tmp_path / "out").manifest["counts"]
    assert 0 < counts["actions_left_out"] <= 300 - SMALL.max_actions
    assert counts["users"] == 2


# ------------------------------------------------------------------------------------------ errors


def test_refuses(tmp_path):
    dataset, vectors = make_log()
    out = tmp_path / "out"
    with pytest.raises(InputError, match="50 items"):
        compress(dataset, vectors[:-1], SMALL, out)
    broken = vectors.copy()
    broken[3, 1] = np.nan
    with pytest.raises(InputError, match="row 3 is not finite"):
        compress(dataset, broken, SMALL, out)
    with pytest.raises(InputError, match="one position a user"):
        compress(dataset, vectors, SMALL, out, since=np.zeros(3))
    timeless, _ = make_log(days=False)
    with pytest.raises(InputError, match="--compression.chunk-actions"):
        compress(timeless, vectors, SMALL, out)
    with pytest.raises(InputError, match="sort the actions"):
        Life(vectors, SMALL).append(Actions(np.zeros(2, np.int32), np.array([DAY_S, 0])))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings",
    [{"max_clusters": 0}, {"growth": -0.1}, {"growth": np.nan}, {"chunk_actions": -1}],
)
def test_refuses_settings(settings):
    with pytest.raises(InputError, match="--compression."):
        LifelongConfig(**settings)
    with pytest.raises(InputError, match="at least as many"):
        LifelongConfig(max_actions=100)


def test_command(tmp_path, capsys):
    dataset, vectors = make_log()
    save_dataset(dataset, tmp_path / "data")
    flags = ["--data", tmp_path / "data", "--workers", 1, "--compression.max-clusters", 8]

    def command(*more):
        argv = [str(flag) for flag in (*flags, *more)]
        cli.run(experiment.main, experiment.CompressConfig, argv=argv)

    def refused(*more):
        with pytest.raises(SystemExit, match="2"):
            command(*more)
        return capsys.readouterr().err

    # The vectors that codes stand for, given as such and as semantic IDs.
    codes = np.stack([np.arange(50) // 8, np.arange(50) % 8], axis=1).astype(np.int32)
    codebooks = np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", codebooks[0][codes[:, 0]] + codebooks[1][codes[:, 1]])
    manifest = {"dataset_fingerprint": dataset.fingerprint}
    SemanticIds(codes, codebooks, manifest, codes).save(tmp_path / "ids")
    SemanticIds(codes, codebooks, {}, codes).save(tmp_path / "foreign")
    command("--out", tmp_path / "a", "--vectors", tmp_path / "vectors.npy")
    printed = capsys.readouterr().out
    for words in ("users", "448", "clusters", "mean members", "bytes", "actions/s", "written to"):
        assert words in printed
    command("--out", tmp_path / "b", "--semantic-ids", tmp_path / "ids")
    a, b = Snapshots.load(tmp_path / "a", dataset), Snapshots.load(tmp_path / "b", dataset)
    assert equal(a, b)
    assert a.fingerprint == b.fingerprint

    assert "either --semantic-ids or --vectors" in refused("--out", tmp_path / "c")
    ids = ("--semantic-ids", tmp_path / "ids")
    assert "--overwrite" in refused("--out", tmp_path / "a", *ids)
    foreign = ("--semantic-ids", tmp_path / "foreign")
    assert "another data set" in refused("--out", tmp_path / "c", *foreign)
