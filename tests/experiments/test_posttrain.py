"""`python -m experiments.posttrain` on a small world: rewards rise, resuming, files, bad input.

Blue items are clicked and watched, red ones are not; the log shows both alike.
"""

import concurrent.futures
import contextlib
import io
import json
import shutil

import helpers
import jax
import numpy as np
import polars as pl
import pytest
from conftest import MODEL_FLAGS, quick_compilation, tree
from test_train_reward import MODEL

from experiments import evaluate, posttrain, pretrain, recommend, sample, train_reward
from onerec_jax import cli
from onerec_jax.data.schema import build_dataset, save_dataset
from onerec_jax.posttraining.trainer import PolicyStream
from onerec_jax.run import Run
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer.build import TokenizerConfig, tokenize

USERS, ITEMS, ACTIONS = 80, 40, 24
STEPS = 24
TESTS = [(evaluate, "evaluate_run"), (evaluate, "show"), (pretrain, "show_recommendations")]


def no_validation(*_):
    """In place of `make_validation`, which compiles a search."""
    return lambda variables: {"loss": 1.0, "score": 0.0}


def command(run, flags):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), quick_compilation():
        run([str(flag) for flag in flags])
    return out.getvalue()


def make_log():
    """Sessions of four exposures."""
    rng = np.random.default_rng(0)
    n = USERS * ACTIONS
    item = rng.integers(0, ITEMS, n)
    click = rng.random(n) < np.where(item % 2, 0.1, 0.9)
    time_s = 1_000_000 + np.tile(np.arange(ACTIONS), USERS) * 600 + rng.integers(0, 60, n)
    log = {
        "user_id": np.repeat(np.arange(USERS), ACTIONS),
        "item_id": item,
        "time_s": time_s,
        "session": np.tile(np.arange(ACTIONS) // 4, USERS),
        "playtime_s": np.where(click, 20.0, 2.0).astype(np.float32),
        "click": click.astype(np.int8),
    }
    words = [f"{'red' if i % 2 else 'blue'} {chr(97 + i // 2) * 3}" for i in range(ITEMS)]
    items = pl.DataFrame({"item_id": np.arange(ITEMS), "text": words})
    meta = {"origin": "a test", "licence": "none"}
    return build_dataset("colours", items, None, pl.DataFrame(log), meta=meta, split="time")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of a pretraining run `pre` and a reward run `reward`. Nobody may change it."""
    source = tmp_path_factory.mktemp("posttrain")
    save_dataset(make_log(), source / "data")
    config = TokenizerConfig(codebook_size=8)
    with quick_compilation():
        made = tokenize(make_log(), config, mesh=make_mesh(1), stability=False, say=lambda _: None)
    made.save(source / "ids")
    data = ["--data", source / "data", "--semantic-ids", source / "ids"]
    train = [
        *("--train.batch-size", 32, "--train.log-every", 20, "--train.patience", 0),
        *("--optimizer.learning-rate", 0.01, "--optimizer.warmup-steps", 5, "--mesh.data", 1),
    ]
    few = [
        *("--train.steps", 20, "--train.validate-every", 20, "--model.dropout", 0),
        # The pathways and layers that it is made of are tested with it; here compiling counts.
        *("--model.decoder-layers", 1, "--model.lifelong-length", 0),
    ]
    with pytest.MonkeyPatch.context() as patch:  # its test and what it shows are tested elsewhere
        for owner, name in TESTS:
            patch.setattr(owner, name, lambda *_: None)
        patch.setattr(pretrain, "make_validation", no_validation)
        command(pretrain.run_command, [*data, "--run", source / "pre", *MODEL_FLAGS, *train, *few])
    steps = ["--train.steps", 80, "--train.validate-every", 80, "--weight-factor", 1]
    reward = [*("--run", source / "pre", "--out", source / "reward"), *MODEL, *train, *steps]
    command(train_reward.run_command, reward)
    return source


def flags_of(runs, out, *more):
    return [
        *(runs / "pre", "--reward", runs / "reward", "--judge", runs / "reward", "--out", out),
        *("--rl-share", 0.25, "--rollout.group", 6, "--rollout.refresh-every", 4),
        *("--format.k", 2, "--train.batch-size", 32, "--train.steps", STEPS, "--mesh.data", 1),
        *("--train.log-every", 4, "--train.validate-every", 12, "--keep-rollouts", 8),
        *("--optimizer.learning-rate", 0.01, "--sparse-learning-rate", 0.01),
        *("--optimizer.warmup-steps", 0, "--validate-beam-width", 16, "--list-length", 3),
        *("--evaluation.beam-width", 16, "--evaluation.batch-size", 16),
        *("--evaluation.resamples", 100, *more),
    ]


@pytest.fixture(scope="module")
def posted(runs):
    """A finished run. Nobody may change it."""
    flags = flags_of(runs, runs / "post")
    return runs / "post", flags, command(posttrain.run_command, flags)


# --------------------------------------------------------------------------- a run from end to end


def test_rewards_rise(posted):
    folder, _, printed = posted
    rows = [row for row in helpers.logged(folder / "metrics.jsonl") if "validation" not in row]
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.05
    assert rows[-1]["legality"][-1] >= rows[0]["legality"][-1] - 0.1
    result = json.loads((folder / "comparison.json").read_text())["metrics"]
    for who in ("reward", "judge"):
        assert result[f"p, {who}"]["ci95"][0] > 0, who
    assert "8 of 32 users a step with 6 items each" in printed
    assert "p, reward" in printed


def test_statistics_of_every_row(posted):
    wanted = {
        *("loss", "loss_level", "loss_preference", "loss_format", "grad_norm", "grad_norm_policy"),
        *("reward", "best_reward", "legality", "distinct", "entropy", "ratio_quantiles", "valid"),
        *("clipped_high", "clipped_low", "early_clipped", "load"),
    }
    for row in helpers.logged(posted[0] / "metrics.jsonl"):
        if "validation" in row:
            assert {"loss", "reward", "legality", "ndcg@10", "score"} <= set(row)
        else:
            assert wanted <= set(row)
            assert 0 <= row["legality"][2] <= row["legality"][1] <= row["legality"][0] <= 1


def test_rollouts_are_kept_as_they_were_judged(posted):
    folder, _, _ = posted
    run = Run.open(folder)
    files = sorted((folder / "rollouts").iterdir())
    assert [path.name for path in files] == [f"step-{n:07}.parquet" for n in (8, 16, 24)]
    frame = pl.read_parquet(files[1])
    assert frame.height == 8 * 6
    assert set(frame["step"]) == {16}
    leaf = run.ids.find(np.array(frame["semantic_id"].to_list()))
    np.testing.assert_array_equal(frame["item_id"].is_null(), leaf < 0)
    np.testing.assert_array_equal(frame["reward"].is_null(), ~frame["counts"])
    known = frame.filter(pl.col("item_id").is_not_null())
    sids = run.ids.sids[known["item_id"].to_numpy()]  # ids are rows here
    np.testing.assert_array_equal(sids, known["semantic_id"].to_list())
    assert frame.group_by("user_id", "position", "semantic_id").len()["len"].max() == 1
    assert (frame["logp"] < 0).all()


def test_the_result_opens_as_any_run(posted, capfd):
    folder, flags, _ = posted
    run = Run.open(folder)
    assert run.finished
    before = Run.open(run.config["settings"]["parent"]["folder"]).load_best()
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), run.load_best(), before)
    assert any(jax.tree.leaves(changed["params"]))
    assert "OneRec" in (folder / "report.md").read_text()
    user = run.dataset.users["user_id"][0]
    cli.run(recommend.main, recommend.RecommendConfig, argv=[str(folder), "--user", str(user)])
    assert "semantic ID" in capfd.readouterr().out
    kept = tree(folder)
    assert "is finished" in command(posttrain.run_command, flags)
    assert tree(folder) == kept


@contextlib.contextmanager
def samplers(run, queue, count=2):
    """Other drawers, here threads, until the training has come to its end."""
    config = sample.SampleConfig(run, queue, idle_s=60)  # command lines are no matter of threads
    with concurrent.futures.ThreadPoolExecutor() as pool:
        started = [pool.submit(sample.main, config) for _ in range(count)]
        yield
        for one in started:
            one.result()


@pytest.mark.parametrize("queue", [False, True])
def test_stopped_and_resumed_bit_for_bit(posted, runs, tmp_path, monkeypatch, queue):
    """Killed between two refreshes of the policy that draws: the checkpoint has its copy. Other
    processes draw the same as the trainer."""
    folder, _, _ = posted
    flags, drawers = flags_of(runs, tmp_path / "run"), contextlib.nullcontext()
    if queue:
        flags += ["--queue.folder", tmp_path / "queue", "--queue.prefetch", 3]
        drawers = samplers(tmp_path / "run", tmp_path / "queue")
    whole = PolicyStream.__call__

    def breaks(self, step=0):
        batches = whole(self, step)
        for number in range(step, STEPS):
            if number == 15:
                raise OSError("the power is gone")
            yield next(batches)

    monkeypatch.setattr(posttrain, "make_validation", no_validation)
    monkeypatch.setattr(posttrain, "compare", lambda *_: {"users": 0, "metrics": {}})
    monkeypatch.setattr(evaluate, "evaluate_run", lambda *_: None)
    with drawers:
        with monkeypatch.context() as patch:
            patch.setattr(PolicyStream, "__call__", breaks)
            with pytest.raises(OSError, match="power"):
                command(posttrain.run_command, flags)
        assert "resuming at step 12" in command(posttrain.run_command, flags)
    ours, theirs = (
        [row for row in helpers.logged(f / "metrics.jsonl") if "validation" not in row]
        for f in (tmp_path / "run", folder)
    )
    if queue:
        # Of rows of four steps, as old as the refreshes of every four make them.
        assert [row.pop("policy_age") for row in ours] == [1.5] * 6
        left = [path.name for path in (tmp_path / "queue").rglob("*") if path.is_file()]
        assert sorted(left) == ["finished", "queue.json"]
    assert ours == theirs
    for step in (16, 24):
        name = f"rollouts/step-{step:07}.parquet"
        assert pl.read_parquet(tmp_path / "run" / name).equals(pl.read_parquet(folder / name))


# -------------------------------------------------------------------------------------- bad input


def test_what_stops_a_run():
    guard = posttrain.GuardConfig(legality=0.5, entropy=0.1)
    good = {"ratio_quantiles": np.ones(4), "legality": [0.9, 0.6], "entropy": [0.06, 0.06]}
    assert guard(good) is None
    assert guard(good | {"ratio_quantiles": np.full(4, np.nan)}) is None  # nothing that counts
    assert "ratio" in guard(good | {"ratio_quantiles": np.array([1, 1, 1, np.inf])})
    assert "legality 0.400 is below" in guard(good | {"legality": [0.9, 0.4]})
    assert "entropy 0.080 is below" in guard(good | {"entropy": [0.04, 0.04]})
    assert "entropy nan" in guard(good | {"entropy": [np.nan, 0.04]})


def test_flags_that_fit_nothing(posted, runs, tmp_path, refused):
    out = tmp_path / "run"
    base = flags_of(runs, out)
    file = tmp_path / "flagged.txt"
    file.write_text("3\n999\n")
    cases = {
        "--rollout.group 1": ["--rollout.group", 1],
        "--format.k 7 items of groups of 6": ["--format.k", 7],
        "--rollout.parts 999: 999 users would get rollouts": ["--rollout.parts", 999],
        "--objective fun: ": ["--objective", "fun"],
        "--objective p=1,ctr: ctr has no weight": ["--objective", "p=1,ctr"],
        "--rl-share 0.0": ["--rl-share", 0],
        "--queue.max-age 2: with --rollout.refresh-every 4 ": ["--queue.max-age", 2],
        "--rsft-drop 1.0": ["--rsft-drop", 1],
        "--train.batch-size 99999": ["--train.batch-size", 99999],
        "no column viral": ["--flagged", "viral"],
        "flagged ids are of no item (999": ["--flagged", file],
        "is a run of experiments.pretrain": ["--reward", runs / "pre"],
    }
    for message, flags in cases.items():
        assert message in refused(posttrain.run_command, *base, *flags), message
        assert not out.exists(), message
    before = tree(posted[0])
    message = refused(posttrain.run_command, *posted[1], "--seed", 5)
    assert "seed: 0 there, 5 now" in message
    assert "--out" in message
    assert tree(posted[0]) == before


def test_queues_that_fit_nothing(posted, runs, tmp_path, refused):
    out, queue = tmp_path / "run", tmp_path / "queue"
    waits = ["--queue.folder", queue, "--queue.timeout-s", 0]
    message = refused(posttrain.run_command, *flags_of(runs, out, *waits, "--seed", 5))
    assert "no rollouts for step 0" in message
    assert f"start `python -m experiments.sample {out} --queue {queue}`" in message
    assert message.endswith("saved step 0\n")
    before = tree(queue)
    assert len([name for name in before if name.startswith("requests/")]) == 3

    cases = {
        f"{queue} is the queue of another run than {posted[0]} (seed: 5 there, 0 now)": [posted[0]],
        f"{runs / 'pre'} is no run of experiments.posttrain": [runs / "pre"],
        f"{tmp_path / 'none'} is no run folder": [tmp_path / "none"],
        "8 users of a request do not divide over the 3 shares": [out, "--mesh.data", 3],
        f"no trainer has come to {tmp_path / 'new'} in 0.001 s": [
            *(out, "--queue", tmp_path / "new", "--idle-s", 0.001)
        ],
        f"{runs} exists and is no queue": [out, "--queue", runs],
        "--lease-s 0.5 must be at least 1": [out, "--lease-s", 0.5],
    }
    for message, flags in cases.items():
        assert message in refused(sample.run_command, "--queue", queue, *flags), message
        assert tree(queue) == before, message
    message = refused(posttrain.run_command, *flags_of(runs, tmp_path / "other", *waits))
    assert f"{queue} is the queue of another run than {tmp_path / 'other'} (seed" in message


def test_unfinished_runs(runs, tmp_path, refused):
    for name in ("pre", "reward"):
        copy = shutil.copytree(runs / name, tmp_path / name)
        config = json.loads((copy / "config.json").read_text())
        config["settings"]["train"]["steps"] = 10_000
        (copy / "config.json").write_text(json.dumps(config))
        flags = flags_of(runs, tmp_path / "run")
        flags[0 if name == "pre" else 2] = copy
        message = refused(posttrain.run_command, *flags)
        assert f"{copy} is not trained to its end" in message
