"""`python -m experiments.train_reward` on a small world: learning, resuming, scoring, bad input."""

import contextlib
import dataclasses
import io
import json
import types

import helpers
import jax
import numpy as np
import polars as pl
import pytest
from conftest import make_data, quick_compilation, tree

from experiments import reward_source, train_reward
from onerec_jax.data.exposures import ExposureStream
from onerec_jax.data.features import positive_actions
from onerec_jax.data.schema import build_dataset, save_dataset
from onerec_jax.errors import InputError
from onerec_jax.reward_run import RewardRun, open_reward
from onerec_jax.run import Run
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer.build import TokenizerConfig, tokenize

USERS, ITEMS, ACTIONS = 80, 16, 64
STEPS = 120
MODEL = [
    *("--model.d-model", 16, "--model.num-heads", 2, "--model.history-length", 16),
    *("--model.top-k", 4, "--model.recent-length", 4, "--model.shared-dims", 32, 16),
    *("--model.tower-dims", 8, "--model.fusion-dims", 8, "--model.dropout", 0),
]
TRAIN = [
    *("--train.steps", STEPS, "--train.batch-size", 16, "--train.log-every", 10),
    *("--train.validate-every", STEPS // 4, "--train.patience", 0, "--mesh.data", 1),
    *("--optimizer.learning-rate", 0.01, "--optimizer.warmup-steps", 5),
    *("--evaluation.batch-size", 16),
]


def make_log(seed=0):
    """Users like words: red or blue, and say so by clicks, now and then by likes."""
    rng = np.random.default_rng(seed)
    n = USERS * ACTIONS
    user, item = np.repeat(np.arange(USERS), ACTIONS), rng.integers(0, ITEMS, n)
    fits = user % 2 == item % 2
    click = rng.random(n) < np.where(fits, 0.9, 0.1)
    log = pl.DataFrame(
        {
            "user_id": user,
            "item_id": item,
            "time_s": 1_000_000 + np.tile(np.arange(ACTIONS), USERS) * 600 + rng.integers(0, 60, n),
            "click": click.astype(np.int8),
            "like": (click & (rng.random(n) < 0.3)).astype(np.int8),
            "comment": np.zeros(n, np.int8),
        }
    )
    words = [f"{'red' if i % 2 else 'blue'} {'abcdefghijkl'[i // 2] * 3}" for i in range(ITEMS)]
    items = pl.DataFrame({"item_id": np.arange(ITEMS), "text": words})
    meta = {"origin": "a test", "licence": "none"}
    return build_dataset("likes", items, None, log, meta=meta, split="time")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder with a data set in `data` and its semantic IDs in `ids`."""
    folder = tmp_path_factory.mktemp("reward")
    save_dataset(make_log(), folder / "data")
    config = TokenizerConfig(codebook_size=4)
    with quick_compilation():
        made = tokenize(make_log(), config, mesh=make_mesh(1), stability=False, say=lambda _: None)
    made.save(folder / "ids")
    return folder


def flags_of(source, out, *more):
    data = ["--data", source / "data", "--semantic-ids", source / "ids", "--out", out]
    return [str(flag) for flag in (*data, *MODEL, *TRAIN, *more)]


def command(flags):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), quick_compilation():
        train_reward.run_command([str(flag) for flag in flags])
    return out.getvalue()


@pytest.fixture(scope="module")
def rewarded(source):
    """A finished run. Nobody may change it."""
    flags = flags_of(source, source / "reward")
    return source / "reward", flags, command(flags)


# --------------------------------------------------------------------------- a run from end to end


def test_it_learns(rewarded):
    folder, _, printed = rewarded
    report = json.loads((folder / "report.json").read_text())
    assert report["objectives"] == ["ctr", "ltr"]
    assert "left out, for all training labels are alike: cmtr" in printed
    checks = [row for row in helpers.logged(folder / "metrics.jsonl") if "validation" in row]
    assert checks[-1]["auc_ctr"] > 0.8  # 0.9 is what a user's habit allows
    for name in ("ctr", "ltr"):
        result = report["test"][name]
        assert result["auc"] > 0.65
        assert result["p_auc"] > 0.65
        assert 0 < result["gauc_users"] <= USERS
        assert result["calibration"]["error"] < 0.2
    assert sum(report["exposures"].values()) <= USERS * ACTIONS
    assert report["share"] == "reward"
    assert report["notes"] == []


def test_files_of_a_run(rewarded):
    folder, _, _ = rewarded
    text = (folder / "report.md").read_text()
    assert "nan" not in text
    json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    for name in ("calibration", "training"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{name}.png" in text
    report, kept = (json.loads((folder / f"{x}.json").read_text()) for x in ("report", "weights"))
    assert report["weights"] == kept["weights"]
    assert report["search"]["names"] == ["base", "by variance", "ctr x 4", "ltr x 4"]
    auc = np.array(report["search"]["auc"])
    assert (auc[report["search"]["kept"]] >= auc[0]).all()
    assert not list(folder.glob(".*"))


def test_the_same_command_shows_the_report(rewarded):
    folder, flags, _ = rewarded
    before = tree(folder)
    assert "is finished" in command(flags)
    assert tree(folder) == before


def test_stopped_and_resumed_bit_for_bit(rewarded, source, tmp_path, monkeypatch):
    folder, _, _ = rewarded
    flags = flags_of(source, tmp_path / "run")
    whole = ExposureStream.__call__

    def breaks(self, step=0):
        batches = whole(self, step)
        for number in range(step, STEPS):
            if number == 70:  # ten past a checkpoint
                raise OSError("the power is gone")
            yield next(batches)

    with monkeypatch.context() as patch:
        patch.setattr(ExposureStream, "__call__", breaks)
        with pytest.raises(OSError, match="power"):
            command(flags)
    assert not (tmp_path / "run" / "report.json").exists()
    with pytest.raises(InputError, match="not trained to its end"):
        RewardRun.open(tmp_path / "run").scorer()
    assert "resuming at step 60" in command(flags)
    ours, theirs = (helpers.logged(f / "metrics.jsonl") for f in (tmp_path / "run", folder))
    assert ours == theirs
    mine, other = (RewardRun.open(f).load_best()["params"] for f in (tmp_path / "run", folder))
    jax.tree.map(np.testing.assert_array_equal, mine, other)


# ---------------------------------------------------------------------------------------- scoring


def test_scores_are_those_of_the_test(rewarded):
    """`scorer`, one request at a time, says what the evaluation of blocks says."""
    run = RewardRun.open(rewarded[0])
    blocks = run.blocks("test")[:6]
    rows, towers, p = run.predictor(4)(run.load_best(), blocks)
    user = run.dataset.interactions["user_row"].to_numpy()[rows]
    examples = helpers.examples_of(user, rows - run.dataset.offsets[user])
    scorer = run.scorer(users=8)
    found = scorer(examples, run.dataset.item_rows[rows][:, None])
    assert set(found) == {"p", "ctr", "ltr"}
    logit = np.column_stack([p[:, run.fusion], towers])
    for i, name in enumerate(("p", "ctr", "ltr")):
        np.testing.assert_allclose(found[name][:, 0], 1 / (1 + np.exp(-logit[:, i])), atol=1e-5)

    # Whom a user is scored with, and which other items, changes nothing.
    items = np.random.default_rng(0).integers(0, ITEMS, (len(rows), 5))
    items[1, 2] = -1
    every = scorer(examples, items)["p"]
    assert np.isnan(every[1, 2])
    assert np.isnan(every).sum() == 1
    turned = np.random.default_rng(1).permutation(len(rows))
    again = scorer(
        helpers.examples_of(examples.user[turned], examples.position[turned]), items[turned]
    )
    np.testing.assert_array_equal(again["p"], every[turned])


def test_the_future_changes_no_score(rewarded):
    """Another log from the request on: other items, other feedback, the same scores."""
    run = RewardRun.open(rewarded[0])
    user, position = np.arange(6), np.full(6, ACTIONS // 2)
    log, rng = run.builder.log, np.random.default_rng(2)
    later = np.arange(len(log.item)) - np.repeat(log.offsets[:-1], ACTIONS) >= ACTIONS // 2
    other = dataclasses.replace(
        log,
        item=np.where(later, rng.integers(0, ITEMS, len(log.item)), log.item).astype(np.int32),
        label=np.where(later[:, None], 1 - log.label, log.label),
    )
    examples, items = helpers.examples_of(user, position), rng.integers(0, ITEMS, (6, 4))
    before, after = (run.scorer(users=6, log=x)(examples, items) for x in (log, other))
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name])
    earlier = helpers.examples_of(user, position + 1)  # the counterpart
    assert (run.scorer(users=6, log=other)(earlier, items)["p"] != before["p"]).all()


def test_words_are_enough_for_items_never_shown(rewarded):
    """Without its own embedding an item is still told by its content."""
    run = RewardRun.open(rewarded[0])
    run.builder.item_index = np.zeros_like(run.builder.item_index)
    users = np.arange(USERS)
    items = np.tile(np.arange(ITEMS), (USERS, 1))
    found = run.scorer(users=USERS)(helpers.examples_of(users, np.full(USERS, ACTIONS - 1)), items)
    fits = users[:, None] % 2 == items % 2
    assert found["ctr"][fits].mean() > found["ctr"][~fits].mean() + 0.1


def test_ratings_are_no_exposures():
    """A reader of the report is told so; of a log with clicks there is nothing to tell."""
    data = helpers.full_dataset()
    assert reward_source.notes(types.SimpleNamespace(dataset=data)) == []
    rated = data.interactions.drop("click", "playtime_s")
    rated = types.SimpleNamespace(dataset=dataclasses.replace(data, interactions=rated))
    (note,) = reward_source.notes(rated)
    assert "no exposures" in note


def parse(*flags):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_reward, "main", seen.append)
        train_reward.run_command([str(flag) for flag in flags])
    return seen[0]


def test_everything_else_comes_from_the_run(rewarded, tmp_path):
    """Data set, IDs, features, and what the policy is tested on; but no clusters."""
    folder, _, _ = rewarded
    source = RewardRun.open(folder)
    policy = Run.create(
        tmp_path / "policy",
        settings={"targets": "positive"},
        command="",
        data_folder=folder.parent / "data",
        ids_folder=folder.parent / "ids",
        dataset=source.dataset,
        ids=source.ids,
        spec=dataclasses.replace(source.spec, clustered=True, num_authors=0),
    )
    config = parse("--run", policy.folder, "--out", tmp_path / "reward", *MODEL, *TRAIN)
    ours = train_reward.open_run(config, reward_source.find_source(config))
    assert ours.spec == dataclasses.replace(policy.spec, clustered=False)
    for part in ("data", "semantic_ids"):
        assert ours.config[part] == policy.config[part]
    assert (ours.eligible == positive_actions(ours.dataset, policy.spec.positive)).all()
    assert open_reward(folder, policy).objectives == ("ctr", "ltr")


# -------------------------------------------------------------------------------------- bad input


def test_the_judge_is_another_model():
    flags = ["--data", "d", "--semantic-ids", "i"]
    ours, judge = parse(*flags), parse(*flags, "--judge")
    assert judge.seed != ours.seed
    assert judge.model.d_model != ours.model.d_model
    assert judge.share == "judge"
    assert ours.share == "reward"
    assert parse(*flags, "--judge", "--model.top-k", 9, "--seed", 7).model.top_k == 9


def test_flags_that_fit_nothing(source, tmp_path, refused):
    out = tmp_path / "run"
    base = flags_of(source, out)
    cases = {
        "--objectives wtr: data set 'likes' has no column follow": ["--objectives", "ctr", "wtr"],
        "--objectives cmtr: all its training labels are 0": ["--objectives", "cmtr"],
        "--objectives fun: choose among": ["--objectives", "fun"],
        "--weights has 1 numbers for the 2 objectives": ["--weights", 1],
        "--weights (1.0, 0.0)": ["--weights", 1, 0],
        "--train.batch-size 5000": ["--train.batch-size", 5000],
        "--train.accumulate": ["--train.accumulate", 2],
        "--judge-share 1.0 leaves the reward model": ["--judge-share", 1],
        "--judge-share 0.0 leaves the judge": ["--judge", "--judge-share", 0],
        "--valid-fraction 0.6": ["--valid-fraction", 0.6, "--test-fraction", 0.5],
        "--model.top-k": ["--model.top-k", 0],
        "give --run, or --data": ["--run", tmp_path],
    }
    for message, flags in cases.items():
        assert message in refused(train_reward.run_command, *base, *flags), message
        assert not out.exists(), message
    assert "belong together" in refused(train_reward.run_command, "--data", source / "data")


def test_a_run_with_other_settings_is_not_touched(rewarded, refused):
    folder, flags, _ = rewarded
    before = tree(folder)
    message = refused(train_reward.run_command, *flags, "--seed", 5)
    assert "seed: 0 there, 5 now" in message
    assert "--out" in message
    assert tree(folder) == before


def test_runs_of_other_stages(rewarded, trained, refused):
    """Neither stage takes the other's folder; and a judge of other items says so."""
    folder, _, _ = rewarded
    with pytest.raises(InputError, match="is a run of experiments.train_reward"):
        Run.open(folder)
    with pytest.raises(InputError, match="is a run of experiments.pretrain"):
        RewardRun.open(trained.folder)
    with pytest.raises(InputError, match="another item table: train the reward with --run"):
        open_reward(folder, Run.open(trained.folder))
    # The log of the trained run says nothing of how its actions went.
    message = refused(train_reward.run_command, "--run", trained.folder)
    assert "a preference score cannot be learned" in message


def test_semantic_ids_of_another_data_set(source, tmp_path, refused):
    other = make_data(tmp_path / "source", tmp_path / "other", seed=1)
    message = refused(train_reward.run_command, "--data", other, "--semantic-ids", source / "ids")
    assert "another data set" in message
