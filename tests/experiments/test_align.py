"""`experiments.train_session_reward` and `experiments.align` on a small world: rewards rise, files,
resuming, bad input.

Blue items are watched, red ones are not; sessions show both alike.
"""

import json
import shutil
import types

import helpers
import jax
import numpy as np
import polars as pl
import pytest
from conftest import MODEL_FLAGS, quick_compilation, tree
from test_posttrain import TESTS, command, make_log, no_validation
from test_train_reward import MODEL

from experiments import align, evaluate, posttrain, pretrain, train_session_reward
from onerec_jax.data.examples import Examples
from onerec_jax.data.exposures import share_of
from onerec_jax.data.schema import save_dataset
from onerec_jax.errors import InputError
from onerec_jax.posttraining.trainer import PolicyStream
from onerec_jax.reward_run import RewardRun
from onerec_jax.run import Run
from onerec_jax.session_reward_run import SessionRewardRun, open_session_reward
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer.build import TokenizerConfig, tokenize

STEPS = 12
TRAIN = [
    *("--train.batch-size", 16, "--train.log-every", 10, "--train.patience", 0, "--mesh.data", 1),
    *("--optimizer.learning-rate", 0.01, "--optimizer.warmup-steps", 5),
]
FUSION = MODEL.index("--model.fusion-dims")
SESSION_MODEL = MODEL[:FUSION] + MODEL[FUSION + 2 :]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of a run on lists of two items `pre` and a session reward `reward`. Nobody may change
    it."""
    source = tmp_path_factory.mktemp("align")
    save_dataset(make_log(), source / "data")
    config = TokenizerConfig(codebook_size=8, levels=2)
    with quick_compilation():
        made = tokenize(make_log(), config, mesh=make_mesh(1), stability=False, say=lambda _: None)
    made.save(source / "ids")
    data = ["--data", source / "data", "--semantic-ids", source / "ids"]
    lists = [
        *("--targets", "sessions", "--sessions.items", 2, "--sessions.min-watched", 2),
        *("--sessions.listed", "shown", "--sessions.combine", "none"),
        *("--train.steps", 20, "--train.validate-every", 20, "--model.dropout", 0),
        # Experts are tested with the step; here only the time to compile counts.
        *("--model.num-experts", 0, "--model.decoder-layers", 1, "--model.lifelong-length", 0),
    ]
    with pytest.MonkeyPatch.context() as patch:  # its test and what it shows are tested elsewhere
        for owner, name in TESTS:
            patch.setattr(owner, name, lambda *_: None)
        patch.setattr(pretrain, "make_validation", no_validation)
        flags = [*data, "--run", source / "pre", *MODEL_FLAGS, *TRAIN, *lists]
        command(pretrain.run_command, flags)
    flags = reward_flags(source, source / "reward")
    (source / "printed").write_text(command(train_session_reward.run_command, flags))
    return source


def reward_flags(source, out, *more):
    return [
        *("--run", source / "pre", "--out", out, "--items", 2, *SESSION_MODEL, *TRAIN),
        *("--train.steps", 40, "--train.validate-every", 40, "--evaluation.batch-size", 16, *more),
    ]


def flags_of(runs, out, *more):
    return [
        *(runs / "pre", "--reward", runs / "reward", "--judge", runs / "reward", "--out", out),
        *("--dpo-share", 0.5, "--beams.width", 12, "--refresh-every", 4, "--keep-pairs", 4),
        *("--train.batch-size", 16, "--train.steps", STEPS, "--mesh.data", 1),
        *("--train.log-every", 3, "--train.validate-every", 6, "--optimizer.learning-rate", 0.01),
        *("--optimizer.warmup-steps", 0, "--preference-weight", 3, "--beta", 1),
        *("--validate-users", 20, "--lists", 4, "--evaluation.batch-size", 16),
        *("--evaluation.beam-width", 16, "--evaluation.resamples", 100, *more),
    ]


@pytest.fixture(scope="module")
def aligned(runs):
    """A finished run. Nobody may change it."""
    flags = flags_of(runs, runs / "aligned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "evaluate_run", lambda *_: None)
        return runs / "aligned", flags, command(align.run_command, flags)


# ------------------------------------------------------------------------------ the session reward


def test_it_learns(runs):
    report = json.loads((runs / "reward" / "report.json").read_text())
    assert report["objectives"] == ["swt", "vtr"]
    assert report["sessions"]["train"] > 100
    for name in ("swt", "vtr"):
        assert report["test"][name]["auc"] > 0.75
        assert report["test"][name]["p_auc"] > 0.75
    text = (runs / "reward" / "report.md").read_text()
    assert "nan" not in text
    assert f"swt: at least {report['watch_s']:.1f} s watched" in text
    for name in ("calibration", "training"):
        assert (runs / "reward" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "test lists of 2 items" in (runs / "printed").read_text()
    scale = json.loads((runs / "reward" / "scale.json").read_text())
    assert set(scale["mean"]) == set(scale["deviation"]) == {"swt", "vtr"}
    assert min(scale["deviation"].values()) > 0


def test_a_list_of_watched_items_is_worth_more(runs):
    """Blue items have even rows; who else is asked about, and in which order, changes nothing."""
    run = SessionRewardRun.open(runs / "reward")
    scorer = run.scorer(users=4)
    users = np.arange(8, dtype=np.int32)
    asked = Examples(users, np.full(8, 12, np.int32))
    lists = np.tile([[2, 8], [3, 9], [2, 9], [8, 2], [2, -1]], (8, 1, 1))
    found = scorer(asked, lists)
    assert set(found) == {"reward", "swt", "vtr"}
    for score in found.values():
        assert score[:, 0].mean() > score[:, 1].mean() + score[:, :2].std() / 2
        assert np.isnan(score[:, 4]).all()
        np.testing.assert_allclose(score[:, 3], score[:, 0], rtol=1e-4)
    alone = scorer(asked[np.array([5])], lists[:1, ::-1])
    np.testing.assert_allclose(alone["reward"][0, 3], found["reward"][5, 1], rtol=1e-3)
    scale, rates = run.scale, (found["swt"], found["vtr"])
    parts = [(x - m) / d for x, m, d in zip(rates, scale.mean, scale.deviation, strict=True)]
    np.testing.assert_allclose(found["reward"], sum(parts), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="--head-weights has 1 numbers for the 2 heads"):
        run.scorer(weights=(1.0,))


def test_a_reward_without_its_scale(runs, tmp_path):
    """Killed after its last step and before its test."""
    copy = shutil.copytree(runs / "reward", tmp_path / "reward")
    (copy / "scale.json").unlink()
    with pytest.raises(InputError, match="not trained to its end"):
        SessionRewardRun.open(copy).scorer()


# --------------------------------------------------------------------------------------- alignment


def test_rewards_rise(aligned):
    folder, _, printed = aligned
    rows = [row for row in helpers.logged(folder / "metrics.jsonl") if "validation" not in row]
    assert rows[-1]["reward"] > rows[0]["reward"]
    assert rows[0]["margin"] > 0
    wanted = {
        *("loss", "loss_level", "loss_preference", "grad_norm", "grad_norm_preference", "margin"),
        *("preferred", "chosen_change", "rejected_change", "pairs", "skipped", "reward"),
        *("best_reward", "worst_reward", "legality"),
    }
    assert all(wanted <= set(row) for row in rows)
    assert all(row["pairs"] + row["skipped"] == 8 for row in rows)
    result = json.loads((folder / "comparison.json").read_text())["metrics"]
    for who in ("reward", "judge"):
        assert result[f"reward by the {who}, mean"]["ci95"][0] > 0, who
        best, mean = (result[f"swt by the {who}, {kind}"]["after"] for kind in ("max", "mean"))
        assert best >= mean
    assert "legality" in result
    assert "8 of 16 users a step with 12 proposed lists, iterations of 4 steps" in printed
    assert "4 lists of unseen items each" in printed


def test_pairs_are_kept_as_they_were_judged(aligned):
    folder, _, _ = aligned
    files = sorted((folder / "pairs").iterdir())
    assert [path.name for path in files] == [f"step-{n:07}.parquet" for n in (4, 8, 12)]
    frame = pl.read_parquet(files[1])
    assert frame.height == 8 * 12
    for _, beams in frame.group_by("user_id", "position"):
        rewards = beams["reward"].to_numpy()
        (chosen,) = beams.filter(pl.col("pair") == "chosen")["reward"]
        (rejected,) = beams.filter(pl.col("pair") == "rejected")["reward"]
        assert (chosen, rejected) == (rewards.max(), rewards.min())
        assert (np.diff(beams.sort("place")["logp"]) <= 0).all()
    run = Run.open(folder)
    sids = run.ids.sids[np.array(frame["item_ids"].to_list())]  # ids are rows here
    np.testing.assert_array_equal(sids, np.array(frame["semantic_ids"].to_list()))


def test_the_result_opens_as_any_run(aligned):
    folder, flags, _ = aligned
    run = Run.open(folder)
    assert run.finished
    assert run.session_rule.items == 2
    before = Run.open(run.config["settings"]["parent"]["folder"]).load_best()
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), run.load_best(), before)
    assert any(jax.tree.leaves(changed["params"]))
    kept = tree(folder)
    assert "is finished" in command(align.run_command, flags)
    assert tree(folder) == kept


def test_stopped_and_resumed_bit_for_bit(aligned, runs, tmp_path, monkeypatch):
    """Killed between two iterations: the checkpoint has the reference."""
    folder, _, _ = aligned
    flags = flags_of(runs, tmp_path / "run")
    whole = PolicyStream.__call__

    def breaks(self, step=0):
        batches = whole(self, step)
        for number in range(step, STEPS):
            if number == 7:
                raise OSError("the power is gone")
            yield next(batches)

    monkeypatch.setattr(align, "make_validation", no_validation)
    with monkeypatch.context() as patch:
        patch.setattr(PolicyStream, "__call__", breaks)
        with pytest.raises(OSError, match="power"):
            command(align.run_command, flags)
    monkeypatch.setattr(align, "compare", lambda *_: {"users": 0, "lists": 4, "metrics": {}})
    monkeypatch.setattr(evaluate, "evaluate_run", lambda *_: None)
    assert "resuming at step 6" in command(align.run_command, flags)
    ours, theirs = (
        [row for row in helpers.logged(f / "metrics.jsonl") if "validation" not in row]
        for f in (tmp_path / "run", folder)
    )
    assert ours == theirs
    for step in (8, 12):
        name = f"pairs/step-{step:07}.parquet"
        assert pl.read_parquet(tmp_path / "run" / name).equals(pl.read_parquet(folder / name))


# --------------------------------------------------------------------------------------- bad input


def test_what_stops_a_run():
    guard = align.GuardConfig(chosen_loss=5, legality=0.5)
    good = {"chosen_change": -4.0, "legality": [0.9, 0.6]}
    assert guard(good) is None
    assert guard(good | {"chosen_change": np.nan}) is None  # no pair since the last row
    assert "have lost 6.0 nats" in guard(good | {"chosen_change": -6.0})
    assert "legality 0.400 is below" in guard(good | {"legality": [0.9, 0.4]})


def test_flags_that_fit_nothing(aligned, runs, tmp_path, refused):
    out = tmp_path / "run"
    base = flags_of(runs, out)
    cases = {
        "--beams.width 1: a pair takes 2": ["--beams.width", 1],
        "--rejected 2 is of --loss s-dpo": ["--rejected", 2],
        "--rejected 12 of --beams.width 12": ["--loss", "s-dpo", "--rejected", 12],
        "--dpo-share 0.0": ["--dpo-share", 0],
        "--head-weights has 3 numbers for the 2 heads swt, vtr": ["--head-weights", 1, 1, 1],
        "--head-weights are all 0": ["--head-weights", 0, 0],
        "--train.batch-size 99999": ["--train.batch-size", 99999],
        "is a run of experiments.pretrain": ["--reward", runs / "pre"],
    }
    for message, flags in cases.items():
        assert message in refused(align.run_command, *base, *flags), message
        assert not out.exists(), message
    message = refused(align.run_command, *aligned[1], "--seed", 5)
    assert "seed: 0 there, 5 now" in message
    assert "--out" in message


def edited(folder, to, change):
    """A copy of a run folder whose config.json is another."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    change(config)
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_runs_that_do_not_belong_together(runs, tmp_path, refused):
    """Single items against lists, other lengths, other codebooks, unfinished ones: a line each."""

    def changed(which, name, change):
        flags = flags_of(runs, tmp_path / "run")
        flags[0 if which == "pre" else 2] = edited(runs / which, tmp_path / name, change)
        return refused(align.run_command, *flags)

    def single(config):
        config["settings"]["stage"] = RewardRun.stage

    message = changed("reward", "a", single)
    assert "is a run of experiments.train_reward: give one of experiments.train_session" in message
    assert "judges lists of 3 items" in changed(
        "reward", "b", lambda c: c["settings"].update(items=3)
    )
    other = types.SimpleNamespace(
        folder="other",
        config=Run.open(runs / "pre").config | {"semantic_ids": {"fingerprint": "", "folder": "x"}},
    )
    with pytest.raises(InputError, match="has x, another semantic IDs: train the reward with"):
        open_session_reward(runs / "reward", other)
    assert "generates single items" in changed(
        "pre", "d", lambda c: c["settings"].update(targets="all")
    )
    for which in ("pre", "reward"):
        message = changed(
            which, f"{which}-e", lambda c: c["settings"]["train"].update(steps=10_000)
        )
        assert "is not trained to its end" in message
    # And the other way round.
    flags = ["--reward", runs / "reward", "--out", tmp_path / "run"]
    other = edited(runs / "pre", tmp_path / "f", lambda c: c["settings"].update(targets="all"))
    message = refused(posttrain.run_command, other, *flags)
    assert "is a run of experiments.train_session_reward" in message


def test_the_judge_is_another_model(runs, monkeypatch):
    """Of another seed and shape, and of lists that the reward is not trained on."""
    seen = []
    monkeypatch.setattr(train_session_reward, "main", seen.append)
    for flags in ([], ["--judge"], ["--judge", "--model.top-k", "9", "--seed", "7"]):
        train_session_reward.run_command(["--run", str(runs / "pre"), *flags])
    ours, judge, named = seen
    assert (ours.share, judge.share) == ("reward", "judge")
    assert judge.seed != ours.seed
    assert judge.model.d_model != ours.model.d_model
    assert (named.model.top_k, named.seed) == (9, 7)
    windows = SessionRewardRun.open(runs / "reward").windows("valid")
    parts = [share_of(windows, config.share, 0.25) for config in (ours, judge)]
    rows = [set(zip(part.user, part.position, strict=True)) for part in parts]
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) == len(windows)


def test_flags_of_the_reward_that_fit_nothing(runs, tmp_path, refused):
    base = reward_flags(runs, tmp_path / "run")
    cases = {
        "--items 5: no session of data set 'colours'": ["--items", 5],
        "--heads wtr: data set 'colours' has no follow": ["--heads", "wtr"],
        "--labels.view-share 2.0": ["--labels.view-share", 2],
        "training lists: lower it": ["--train.batch-size", 5000],
        "--item-weight -1": ["--item-weight", -1],
    }
    for message, flags in cases.items():
        assert message in refused(train_session_reward.run_command, *base, *flags), message
        assert not (tmp_path / "run").exists(), message
