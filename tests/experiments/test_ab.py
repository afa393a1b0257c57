"""`python -m experiments.ab`: the closed loop of several arms on one small platform."""

import dataclasses
import json
import shutil

import helpers
import jax
import numpy as np
import pytest
from conftest import quick_compilation

from experiments import ab
from experiments.align import AlignRun
from onerec_jax import policies
from onerec_jax.data.exposures import LabelRule
from onerec_jax.data.features import build_feature_spec, positive_actions
from onerec_jax.data.schema import load_dataset, save_dataset
from onerec_jax.data.session_lists import SessionRule
from onerec_jax.data.sources.world import read_world
from onerec_jax.data.splits import make_split
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.data.world.loop import Log, Request
from onerec_jax.data.world.response import World
from onerec_jax.errors import InputError
from onerec_jax.generation.session_generator import session_lists
from onerec_jax.inputs import PositiveRule
from onerec_jax.models.reward import RewardConfig
from onerec_jax.reward_run import RewardRun
from onerec_jax.run import Run
from onerec_jax.training.flops import generation_flops
from onerec_jax.training.step import TrainState

USERS, ITEMS = 20, 100
CONFIG = ab.AbConfig(
    ("logging", "oracle"), days=3, room=30, list_length=3, batch_size=8, resamples=50
)


def make_run(kind, folder, settings, seed=0):
    """A finished run of random weights."""
    dataset = load_dataset(folder / "data")
    ids = helpers.random_ids(ITEMS)
    ids = dataclasses.replace(
        ids, manifest=ids.manifest | {"dataset_fingerprint": dataset.fingerprint}
    )
    if not (folder / "ids").exists():
        ids.save(folder / "ids")
    run = kind.create(
        folder / f"{kind.stage}-{seed}",
        settings={"seed": seed, "train": {"steps": 1, "patience": 0}, **settings},
        command=f"python -m experiments.{kind.stage}",
        data_folder=folder / "data",
        ids_folder=folder / "ids",
        dataset=dataset,
        ids=ids,
        spec=build_feature_spec(dataset, make_split(dataset), ids, PositiveRule()),
    )
    drawn = helpers.random_variables(run.model(), run.example, seed=seed)
    params = jax.tree.map(jax.numpy.asarray, dict(drawn)["params"])
    state = TrainState(jax.numpy.int32(1), params, {}, {"count": 0})
    run.checkpoints.save(state, note={"progress": {"best_step": 1, "waited": 0}}, score=1.0)
    run.checkpoints.close()
    return run


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    """A world and a folder with runs of random weights in `pretrain-0`, `-1`, `train_reward-0`."""
    folder = tmp_path_factory.mktemp("ab")
    with quick_compilation():
        dataset = read_world(WorldConfig(users=USERS, items=ITEMS, actions=20))
        save_dataset(dataset, folder / "data")
        model = helpers.tiny_config(num_experts=0, decoder_layers=1, lifelong_length=0)
        for seed in range(2):
            settings = {"preset": "tiny", "model": dataclasses.asdict(model)}
            make_run(Run, folder, settings, seed)
        model = RewardConfig(
            d_model=8, num_heads=2, history_length=16, top_k=4, recent_length=4,
            shared_dims=(8,), tower_dims=(4,), fusion_dims=(4,),
        )  # fmt: skip
        settings = {
            "stage": RewardRun.stage,
            "model": dataclasses.asdict(model),
            "objectives": ["ctr", "lvtr"],
            "weights": [[1.0, 1.0], [1.0, 2.0]],
            "labels": dataclasses.asdict(LabelRule()),
            "share": "all",
            "judge_share": 0.0,
            "valid_fraction": 0.1,
            "test_fraction": 0.1,
        }
        make_run(RewardRun, folder, settings).choose(1)
    return World.from_meta(dataset.meta), folder


def test_missing_places_hold_popular_items():
    lists = np.array([[5, -1, -1], [0, 1, 2], [7, 5, -1]])
    seen = [np.array([7]), np.array([3]), np.array([2, 9])]
    found = policies.filled(lists, seen, np.array([7, 5, 2, 9]))
    np.testing.assert_array_equal(found, [[5, 2, 9], [0, 1, 2], [7, 5, 7]])


def test_few_users_go_through_the_smaller_program():
    parts = [(part.tolist(), len(full)) for part, full in policies.batches(25, 16)]
    assert parts == [(list(range(16)), 16), (list(range(16, 25)), 16)]
    ((part, full),) = policies.batches(3, 16)
    assert full.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [len(full) for _, full in policies.batches(3, 4)] == [4]


def test_all_arms_beside_the_oracle(platform, tmp_path, monkeypatch, capfd):
    """The oracle satisfies more than random weights; nothing is shown twice; files and costs."""
    _, folder = platform
    slates = []
    fill = policies.filled

    def noted(lists, seen, popular):
        slates.extend((row, set(known.tolist())) for row, known in zip(lists, seen, strict=True))
        return fill(lists, seen, popular)

    monkeypatch.setattr(policies, "filled", noted)
    out, reward = tmp_path / "ab.json", folder / "train_reward-0"
    arms = (
        f"ours={folder}/pretrain-*",
        "oracle",
        f"select={folder}/pretrain-0,{folder}/pretrain-1+{reward}",
        f"cascade=swing+{reward}",
    )
    cascade = ab.CascadeConfig(neighbours=5, latest=4)
    ab.main(dataclasses.replace(CONFIG, arms=arms, room=8, beam_width=8, out=out, cascade=cascade))
    record = json.loads(out.read_text())
    found, costs = record["arms"], record["costs"]
    assert list(found) == list(costs) == ["ours", "oracle", "select", "cascade"]
    assert found["oracle"]["long_view"]["difference"] > 0
    assert len(found["select"]["watch_s"]["by_seed"]) == 2
    assert found["ours"]["views"]["difference"] == 0
    assert slates
    for row, known in slates:
        listed = row[row >= 0].tolist()
        assert len(set(listed)) == len(listed)
        assert not set(listed) & known
    assert {name: cost["flops"] and set(cost["flops"]) for name, cost in costs.items()} == {
        "ours": {"generation"},
        "oracle": None,
        "select": {"generation", "scoring"},
        "cascade": {"recall", "scoring"},
    }
    assert all(cost["seconds"] > 0 for cost in costs.values())
    assert 0 < costs["cascade"]["scored"] <= 12
    assert 0 < costs["select"]["scored"] < 16
    assert out.with_suffix(".png").stat().st_size > 1000
    report = out.with_suffix(".md").read_text()
    assert "| % over ours | App Stay | Watch |" in report
    printed = capfd.readouterr().out
    assert "watch time, s" in printed
    assert "95% interval over users and 2 seeds" in printed


def test_a_reward_chooses_as_its_own_scorer_does(platform):
    """Of the items of the beams, or of what Swing finds, the best by p."""
    world, folder = platform
    arms = (f"a={folder}/pretrain-0+{folder}/train_reward-0", f"b=swing+{folder}/train_reward-0")
    made, _, dataset = ab.make_policies(dataclasses.replace(CONFIG, arms=arms, beam_width=8))
    log = log_of(dataset)
    users = np.arange(5)
    request = request_at(world, log, users)
    reward = RewardRun.open(folder / "train_reward-0")
    score = reward.scorer(users=5)
    seen = [log.history(user)["item"] for user in users]
    leaves = len(reward.ids.leaf_sids)  # as many as the items of eight IDs are, on average
    assert made["b"][0].number == round(8 * ITEMS / leaves) == 12
    for (policy,) in made.values():
        lists = policy(users, log, request)
        if hasattr(policy, "recall"):
            liked = [positive_items(reward, user)[-policy.latest :] for user in users]
            given = policy.recall(liked, seen, policy.number)
        else:
            given = policy.beams.items(users, log, request, 16)
        fresh = np.array([np.where(np.isin(x, s), -1, x) for x, s in zip(given, seen, strict=True)])
        who = helpers.examples_of(users, log.length[users])
        p = score(who, fresh, request.time_s)["p"]
        for user in users:
            order = np.argsort(np.where(fresh[user] < 0, np.inf, -p[user]), kind="stable")
            best = fresh[user][order[: min(CONFIG.list_length, (fresh[user] >= 0).sum())]]
            np.testing.assert_array_equal(lists[user][: len(best)], best)


def log_of(dataset):
    return Log.from_dataset(dataset, 5)


def request_at(world, log, users):
    time_s = log.last(users, 1, "time_s")[:, 0] + 3600
    return Request(time_s, np.full(len(users), 50), np.zeros(len(users), int), 60)


def positive_items(reward, user):
    dataset = reward.dataset
    rows = slice(dataset.offsets[user], dataset.offsets[user + 1])
    return dataset.item_rows[rows][positive_actions(dataset, reward.spec.positive)[rows]]


def test_arms_by_name_and_seed(tmp_path, monkeypatch):
    for name in ("s0", "s1"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    arms = ab.parse_arms(dataclasses.replace(CONFIG, arms=("logging", "x=s*+r", "y=b,a+q,r")))
    assert [arms["x"].of(seed) for seed in range(arms["x"].seeds)] == [("s0", "r"), ("s1", "r")]
    assert arms["y"].of(1) == ("a", "r")
    assert arms["logging"].of(1) == ("logging",)


def test_arms_that_fit_nothing(platform, tmp_path):
    _, folder = platform
    run, reward = folder / "pretrain-0", folder / "train_reward-0"
    other = shutil.copytree(folder / "pretrain-1", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    save_dataset(read_world(WorldConfig(users=USERS, items=ITEMS, seed=1)), tmp_path / "data")
    config["data"] = {
        "folder": str(tmp_path / "data"),
        "fingerprint": load_dataset(tmp_path / "data").fingerprint,
    }
    (other / "config.json").write_text(json.dumps(config))
    for message, arms in {
        "two arms or more": ("oracle",),
        "no arm is a run": ("oracle", "logging"),
        "two arms are called oracle": ("oracle", "oracle"),
        "a\\+b\\+c: an arm is logging, oracle, RUN": ("oracle", "a+b+c"),
        "is no run folder": ("oracle", str(folder / "data")),
        "there is no folder 'none\\*'": ("oracle", "none*"),
        "has 2 seeds, .* 3": (f"a={run},{run}", f"b={run},{run},{run}"),
        "experiments.train_reward": ("oracle", f"{run}+{run}"),
        "run of experiments.train_reward: give one": ("oracle", str(reward)),
        "another data set": (str(run), str(other)),
    }.items():
        with pytest.raises(InputError, match=message):
            ab.make_policies(dataclasses.replace(CONFIG, arms=arms))


@pytest.fixture(scope="module")
def lists_run(platform):
    """A run on session lists of three items, of random weights."""
    _, folder = platform
    model = helpers.tiny_config(num_experts=0, decoder_layers=1, lifelong_length=0, session_items=3)
    settings = {"preset": "tiny", "model": dataclasses.asdict(model), "targets": "sessions"}
    settings |= {"stage": "align", "sessions": dataclasses.asdict(SessionRule(items=3))}
    with quick_compilation():
        return make_run(AlignRun, folder, settings).folder


def test_a_run_of_lists_shows_its_most_probable_one(platform, lists_run):
    world, folder = platform
    arms = (f"lists={lists_run}", f"items={folder}/pretrain-0")
    made, _, dataset = ab.make_policies(dataclasses.replace(CONFIG, arms=arms, beam_width=8))
    (policy,), (items,) = made.values()
    assert isinstance(policy, policies.SessionPolicy)
    assert not isinstance(items, policies.SessionPolicy)
    log, users = log_of(dataset), np.arange(10)  # two programs: of eight users, and of two
    request, seen = request_at(world, log, users), [log.history(user)["item"] for user in users]
    run = Run.open(lists_run)
    with quick_compilation():
        shown = policy(users, log, request)
        expected = session_lists(
            policy.generator,
            run.load_best(),
            lambda user, position, rows: run.builder(user, position, request.time_s[user]),
            helpers.examples_of(users, log.length[users]),
            width=8,
            seen=seen,
        ).items[:, 0]
    found = expected >= 0  # an ID may have no unseen item left
    assert found.mean() > 0.9
    np.testing.assert_array_equal(shown[found], expected[found])
    for slate, known in zip(shown, seen, strict=True):
        assert len(set(slate)) == 3
        assert not set(slate) & set(known)
    lengths = {
        name: getattr(run.builder(users, log.length[users], request.time_s), name).length
        for name in ("short", "positive", "lifelong")
    }
    cost = generation_flops(run.model_config, run.spec, 8, lengths, items=3)
    assert policy.flops == {"generation": sum(int(np.sum(part)) for part in cost.values())}


def test_slates_are_as_long_as_lists(platform, lists_run):
    config = dataclasses.replace(CONFIG, arms=(str(lists_run), "oracle"), list_length=10)
    with pytest.raises(InputError, match=r"lists of 3 items, --list-length is 10: give --list"):
        ab.make_policies(config)
