"""The simulated world: answers, logs, the closed loop, and what may not be seen."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from onerec_jax.data.schema import load_dataset, save_dataset
from onerec_jax.data.sources.world import read_world
from onerec_jax.data.splits import make_split
from onerec_jax.data.world.constants import (
    DAY_S,
    START_S,
    WORLDS,
    WorldConfig,
    check_config,
    fingerprint,
)
from onerec_jax.data.world.content import pseudo_words, tag_words
from onerec_jax.data.world.latents import ItemLatents, UserLatents, interest_weights
from onerec_jax.data.world.loop import COLUMNS, Log, Loop
from onerec_jax.data.world.plots import rates, world_plots
from onerec_jax.data.world.policy import LoggingPolicy
from onerec_jax.data.world.response import Feedback, Response, World, satisfaction
from onerec_jax.errors import InputError

CONFIG = WorldConfig(users=120, items=600, actions=60, days=20)
FEEDBACK = ("click", "long_view", "like", "comment", "forward", "follow", "hate")


@pytest.fixture(scope="module")
def dataset():
    return read_world(CONFIG)


@pytest.fixture(scope="module")
def world():
    return World(CONFIG)


def questions(n, seed=0):
    """Random arguments of `World.expected`."""
    rng = np.random.default_rng(seed)
    return {
        "user": rng.integers(0, CONFIG.users, n),
        "item": rng.integers(0, CONFIG.items, n),
        "session": rng.integers(0, 40, n),
        "slot": rng.integers(0, 30, n),
        "time_s": START_S + rng.integers(0, 30 * DAY_S, n),
    }


def take(query, rows):
    return {name: values[rows] for name, values in query.items()}


def logged(log_table):
    """The questions that a log's answers belong to."""
    return {name: log_table[name] for name in ("user", "item", "session", "slot", "time_s")}


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("ask", ["expected", "respond"])
def test_answers_depend_on_the_question_alone(world, ask):
    ask, query = getattr(world, ask), questions(700)
    whole = ask(**query)
    order = np.random.default_rng(1).permutation(700)
    assert equal(ask(**take(query, order)), [x[order] for x in whole])
    for rows in (slice(0, 1), slice(3, 10), slice(5, 134), slice(699, 700)):
        assert equal(ask(**take(query, rows)), [x[rows] for x in whole])
    assert all(x.shape == (0,) for x in ask(**take(query, slice(0, 0))))
    assert equal(ask(1, 2, 3, 4, START_S + 5), ask([1], [2], [3], [4], [START_S + 5]))


def test_types(world):
    query = questions(5)
    assert {x.dtype for x in world.expected(**query)} == {np.dtype("float32")}
    drawn = world.respond(**query)
    assert [x.dtype for x in drawn] == [np.float32] * 2 + [np.int8] * 8


@pytest.mark.parametrize(
    "wrong", [{"user": 120}, {"item": -1}, {"time_s": START_S - 1}, {"time_s": START_S + 2**31}]
)
def test_questions_out_of_range(world, wrong):
    good = {"user": 0, "item": 0, "session": 0, "slot": 0, "time_s": START_S}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        world.expected(**{**good, **wrong})


def test_the_log_is_what_the_world_answers(world, dataset):
    frame = dataset.interactions
    query = {name: frame[name].to_numpy() for name in ("session", "slot", "time_s")}
    query |= {"user": frame["user_row"].to_numpy(), "item": frame["item_row"].to_numpy()}
    answers = world.respond(**query)
    assert np.array_equal(answers.watch_s, frame["playtime_s"].to_numpy())
    for name in FEEDBACK:
        assert np.array_equal(getattr(answers, name), frame[name].to_numpy()), name


def test_seeds(world, dataset):
    again = Loop(world, LoggingPolicy(world)).run()
    assert again.frame().equals(dataset.table("interactions").select(again.frame().columns))
    short = dataclasses.replace(CONFIG, users=20, actions=5, seed=1)
    other = World(short)
    assert other.fingerprint != world.fingerprint
    for name in ("z", "quality"):
        mine, theirs = (getattr(w.latents.items, name) for w in (world, other))
        assert not np.allclose(mine, theirs)


def test_a_user_is_the_same_in_a_larger_world(world):
    larger = World(dataclasses.replace(CONFIG, users=150))
    for small, large in zip(world.latents.users, larger.latents.users, strict=True):
        np.testing.assert_allclose(small, large[: CONFIG.users], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("user", [0, 3])
def test_the_mean_answer_is_the_expected_one(world, user):
    n = 20_000
    item = np.arange(n) % 20
    query = {"user": user, "item": item, "session": 2, "slot": 1}
    query["time_s"] = START_S + 5 * DAY_S + np.arange(n)
    mean, drawn = world.expected(**query), world.respond(**query)
    for name in Response._fields:
        expected, got = getattr(mean, name), getattr(drawn, name).astype(float)
        error = got.std() / n**0.5
        assert abs(got.mean() - expected.mean()) < 4.5 * error + 1e-4, name
    # Item by item too, where the counts allow it: 1000 draws each.
    for name in ("watch_s", "click", "long_view"):
        expected, got = (getattr(x, name).astype(float) for x in (mean, drawn))
        expected, got = expected.reshape(-1, 20), got.reshape(-1, 20)
        error = got.std(0) / len(got) ** 0.5
        assert (abs(got.mean(0) - expected.mean(0)) < 4.5 * error + 2e-3).all(), name


def test_long_view_rule(world):
    query = questions(2000)
    drawn = world.respond(**query)
    duration = np.exp(np.asarray(world.latents.items.log_duration))[query["item"]]
    clear = abs(drawn.watch_s - np.minimum(duration, 18)) > 1e-3
    rule = drawn.watch_s >= np.minimum(duration, 18)
    assert np.array_equal(drawn.long_view[clear], rule[clear])
    assert drawn.watch_ratio.max() <= world.constants.watch_max_ratio
    assert (drawn.watch_ratio > 1).any()
    assert not (drawn.like & ~drawn.long_view & 1).any()


def test_no_latents_in_the_tables(world, dataset):
    assert dataset.items.columns == [
        *("item_id", "title", "text", "tags", "author_id", "duration_s", "viral_farm")
    ]
    assert dataset.users.columns == ["user_id", "gender", "age_band", "city_tier"]
    assert set(dataset.table("interactions").columns) == {
        *("user_id", "item_id", "position"),
        *(set(COLUMNS) - {"item"}),
    }
    columns = {c for t in ("items", "users", "interactions") for c in dataset.table(t).columns}
    assert not columns & {*ItemLatents._fields, *UserLatents._fields, "leave", "watch_ratio"}
    assert not {"z", "topic", "quality"} & set(dataset.meta["world"]["config"])


def test_content_tells_topics_apart(world, dataset):
    """Items of a topic share more words than others, yet no word or tag gives a topic away."""
    topic = np.asarray(world.latents.items.topic)
    same = topic[:, None] == topic[None]
    np.fill_diagonal(same, False)
    words = [set(text.split(". ")[0].split()) for text in dataset.items["text"]]
    assert 8 < np.mean([len(w) for w in words]) < 16
    tags = [set(t) for t in dataset.items["tags"]]
    assert {len(t) for t in tags} <= {1, 2, 3}
    for sets, least in ((words, 2.0), (tags, 5.0)):
        shared = np.array([[len(a & b) for b in sets] for a in sets[:200]])
        near, far = shared[same[:200]].mean(), shared[~same[:200]].mean()
        assert near > least * far
    first = np.array([min(t) for t in tags])
    agree = np.mean([np.unique(first[topic == k], return_counts=True)[1].max() for k in set(topic)])
    assert agree / np.bincount(topic)[np.bincount(topic) > 0].mean() < 0.95


def test_words_are_distinct():
    for c in WORLDS.values():
        words = pseudo_words(c.vocabulary) + tag_words(c)
        assert len(set(words)) == c.vocabulary + c.topics


def test_rates_and_shapes(dataset):
    limits = {
        "click": (0.4, 0.65),
        "long_view": (0.2, 0.4),
        "like": (0.02, 0.06),
        "follow": (0.002, 0.012),
        "comment": (0.003, 0.015),
        "forward": (0.001, 0.008),
        "hate": (0.0005, 0.006),
        "is_rand": (0.01, 0.03),
        "watch_ratio": (0.4, 0.8),
    }
    found = rates(dataset)
    for name, (low, high) in limits.items():
        assert low < found[name] < high, (name, found[name])
    counts = dataset.counts
    assert counts["actions_per_user_min"] >= 5
    assert 0.8 < counts["interactions"] / CONFIG.users / CONFIG.actions < 1.25
    make_split(dataset)
    first = np.diff(dataset.offsets).cumsum()[:-1]
    assert (np.delete(np.diff(dataset.column("time_s")), first - 1) > 0).all()
    shown = np.sort(np.bincount(dataset.item_rows, minlength=CONFIG.items))[::-1]
    assert shown[:60].sum() > 2.5 * shown.sum() / 10  # the first tenth of the items


def test_position_bias(dataset):
    """Within a request earlier slots suit better; the random ones suit least."""
    frame = dataset.interactions.filter(pl.col("slot") < 8)
    by_half = frame.group_by(pl.col("slot") < 4).agg(pl.col("long_view").mean()).sort("slot")
    late, early = by_half["long_view"]
    assert early > late
    by_rand = dataset.interactions.group_by("is_rand").agg(pl.col("long_view").mean())
    chosen, random = by_rand.sort("is_rand")["long_view"]
    assert random < 0.6 * chosen


def test_farms_are_clicked_more_and_watched_less(world):
    """At equal exposure: everyone is shown every item once."""
    user, item = np.divmod(np.arange(40 * CONFIG.items), CONFIG.items)
    expected = world.expected(user, item, 0, 0, START_S)
    farm = np.asarray(world.latents.items.farm)[item] > 0
    assert 0.03 < farm.mean() < 0.2
    assert expected.click[farm].mean() > 1.1 * expected.click[~farm].mean()
    assert expected.watch_s[farm].mean() < 0.7 * expected.watch_s[~farm].mean()
    assert expected.hate[farm].mean() > 2 * expected.hate[~farm].mean()


def test_interests_return(world):
    users = world.latents.users
    user = np.arange(CONFIG.users)
    period = np.asarray(users.period)

    def drive(day):
        """Periodic part of every interest logit, by hand, [U, K]."""
        return np.asarray(users.swing) * np.sin(2 * np.pi * day / period + np.asarray(users.phase))

    weights = np.asarray(interest_weights(users, user, np.full(CONFIG.users, 3.0, np.float32)))
    logits = np.asarray(users.base) + drive(3.0)
    by_hand = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(weights, by_hand, rtol=2e-4)
    # Of a user's strongest interest: gone half a period later, back after a whole one.
    k = np.argmax(drive(3.0), 1)
    own = period[user, k]
    assert (own >= 10).all()
    assert (own <= 90).all()

    def share(day):
        return np.asarray(interest_weights(users, user, day.astype(np.float32)))[user, k]

    now, half, whole = share(3 + 0 * own), share(3 + own / 2), share(3 + own)
    assert half.mean() < 0.4 * now.mean()
    assert whole.mean() > 0.7 * now.mean()


def test_a_mood_lasts_a_session(world):
    """Affinity to one item, and so the click, hardly moves within a session but does between."""
    n = 60
    user, time_s = np.repeat(np.arange(20), n), START_S + 3 * DAY_S + 40_000
    within = world.expected(user, 7, 4, 0, time_s + np.tile(np.arange(n), 20) * 5).click
    between = world.expected(user, 7, np.tile(np.arange(n), 20), 0, time_s).click
    assert within.reshape(20, n).std(1).max() < 1e-3
    assert np.median(between.reshape(20, n).std(1)) > 0.01


def test_satisfied_users_return(world):
    user = np.arange(CONFIG.users)
    happy, sad = (world.return_within_7_days(user, s) for s in (0.8, 0.1))
    assert (happy >= sad).all()
    assert (happy <= 1).all()
    assert happy.mean() > sad.mean() + 0.001
    session = np.arange(4000)
    for satisfied in (0.1, 0.8):
        least = int(np.argmin(world.quota))
        back = world.gap_s(least, session, satisfied) <= 7 * DAY_S
        expected = world.return_within_7_days(least, satisfied)
        assert abs(back.mean() - expected) < 4.5 * (0.5 / 4000**0.5)
    feedback = Feedback(*np.zeros((10, 1)))._replace(long_view=np.ones(1), hate=np.ones(1))
    assert satisfaction(feedback).tolist() == [-2]


def test_closed_loop(world, dataset):
    """A policy gets users, log and clock; only what it chose is shown, and histories grow."""
    allowed, asked = np.array([5, 9, 17, 30]), []

    def policy(users, log, request):
        assert isinstance(log, Log)
        assert not any(isinstance(v, World | ItemLatents) for v in vars(log).values())
        assert request._fields == ("time_s", "session", "slot", "day")
        assert (log.last(users, 3, "time_s")[:, 0] < request.time_s).all()
        asked.append((len(users), log.length.sum()))
        return np.tile(allowed, (len(users), 1))

    log = Loop(world, policy, log=Log.from_dataset(dataset, 12)).run()
    before = np.diff(dataset.offsets)
    assert np.array_equal(log.length, before + 12)
    assert len(asked) > 3
    assert (np.diff([length for _, length in asked]) > 0).all()
    for user in (0, 17):
        history = log.history(user)
        old = dataset.item_rows[dataset.offsets[user] : dataset.offsets[user + 1]]
        assert np.array_equal(history["item"][:-12], old)
        assert set(history["item"][-12:]) <= set(allowed)
        assert (np.diff(history["time_s"]) > 0).all()
        assert history["session"][-12] == history["session"][-13] + 1
        assert np.array_equal(log.last(np.array([user]), 2)[0], history["item"][:-3:-1])
    table = log.table()
    assert np.array_equal(np.bincount(table["item"], minlength=CONFIG.items), log.counts)
    answers = world.respond(**logged(table))
    assert np.array_equal(answers.watch_s, table["playtime_s"])
    # A day's end stops every clock.
    half = Loop(world, policy, log=Log(np.full(CONFIG.users, 50), CONFIG.items))
    table = half.run(START_S + 2 * DAY_S).table()
    assert 0 < len(table["user"]) < 50 * CONFIG.users
    assert (half.clock_s[half.log.length < 50] >= START_S + 2 * DAY_S).all()


@pytest.mark.parametrize("slate", [np.zeros((3, 4), int), np.zeros((120, 0), int)])
def test_a_slate_of_the_wrong_shape(world, slate):
    with pytest.raises(ValueError, match="slate"):
        Loop(world, lambda *_: slate).run()


def test_who_knows_the_world_is_watched_longer(world):
    rng = np.random.default_rng(0)

    def anything(users, log, request):
        return rng.integers(0, CONFIG.items, (len(users), 6))

    def knowing(users, log, request):
        candidates = np.stack([rng.choice(CONFIG.items, 60, replace=False) for _ in users])
        asked = [np.repeat(x, 60) for x in (users, request.session, request.slot, request.time_s)]
        watch = world.expected(asked[0], candidates.ravel(), *asked[1:]).watch_s
        best = np.argsort(-watch.reshape(candidates.shape), axis=1)[:, :6]
        return np.take_along_axis(candidates, best, axis=1)

    watched = []
    for policy in (anything, LoggingPolicy(world), knowing):
        log = Loop(world, policy, log=Log(np.full(CONFIG.users, 20), CONFIG.items)).run()
        watched.append(log.table()["playtime_s"].mean())
    assert watched[0] < 0.8 * watched[1]
    assert watched[1] < 0.8 * watched[2]


def test_the_world_comes_back_from_the_data_set(world, dataset, tmp_path):
    save_dataset(dataset, tmp_path / "data")
    loaded = load_dataset(tmp_path / "data")
    again = World.from_meta(loaded.meta)
    assert (again.config, again.fingerprint) == (CONFIG, world.fingerprint)
    query = questions(10)
    assert equal(again.respond(**query), world.respond(**query))
    with pytest.raises(InputError, match="no world"):
        World.from_meta({"source": "movielens"})
    changed = {"world": {**world.meta, "fingerprint": "0" * 16}}
    with pytest.raises(InputError, match="0000"):
        World.from_meta(changed)


def test_two_worlds_share_no_constant():
    a, b = (dataclasses.asdict(WORLDS[name]) for name in "ab")
    assert [name for name in a if a[name] == b[name]] == []
    configs = [CONFIG, dataclasses.replace(CONFIG, name="b"), dataclasses.replace(CONFIG, seed=1)]
    assert len({fingerprint(config) for config in configs}) == 3


def test_world_b_runs():
    dataset = read_world(WorldConfig(users=60, items=300, actions=40, days=20, name="b"))
    found = rates(dataset)
    assert 0.35 < found["click"] < 0.7
    assert 0.2 < found["long_view"] < 0.45
    assert dataset.meta["world"]["config"]["name"] == "b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": 0}, "--world.users"),
        ({"items": 99}, "--world.items"),
        ({"actions": 4}, "--world.actions"),
        ({"actions": 100_001, "days": 365}, "at most 100000"),
        ({"actions": 50_000, "days": 10}, "do not fit"),
        ({"days": 0}, "--world.days"),
        ({"spread": -0.1}, "--world.spread"),
        ({"spread": float("nan")}, "--world.spread"),
        ({"seed": -1}, "--world.seed"),
        ({"seed": 2**31}, "--world.seed"),
        ({"name": "c"}, "--world.name"),
    ],
)
def test_worlds_that_cannot_be(change, message):
    with pytest.raises(InputError, match=message):
        check_config(dataclasses.replace(CONFIG, **change))


def test_plots(dataset, tmp_path):
    bare = dataclasses.replace(
        dataset,
        name="bare",
        items=dataset.items.drop("duration_s"),
        interactions=dataset.interactions.drop("session", "click", "playtime_s"),
    )
    found = world_plots(dataset, tmp_path / "deep" / "world.png", bare)
    assert (tmp_path / "deep" / "world.png").stat().st_size > 10_000
    assert set(found) == {"world-a", "bare"}
    assert set(found["world-a"]) - set(found["bare"]) == {"click", "playtime_s", "watch_ratio"}
