"""`python -m experiments.pretrain`: the whole chain, killed and resumed, and its bad input."""

import dataclasses
import json
import pathlib
import re
import signal

import helpers
import jax
import numpy as np
import pytest
from conftest import (
    FLAGS,
    ITEMS,
    MODEL_FLAGS,
    USERS,
    make_data,
    start,
    title,
    tree,
    wait_for,
    wait_for_step,
)

from experiments import evaluate, pretrain, recommend
from experiments.prepare import PrepareConfig, prepare
from onerec_jax import cli
from onerec_jax.run import Run
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer.alignment import ALIGNMENT_PRESETS
from onerec_jax.tokenizer.build import Tokenizer

# --------------------------------------------------------------------------- a run from end to end


def test_report_holds_what_is_promised(trained, world):
    report = json.loads((trained.folder / "report.json").read_text())
    assert report["command"].startswith("python -m experiments.pretrain")
    assert report["dataset"]["name"] == "log"
    assert report["dataset"]["users"] == USERS
    assert report["dataset"]["items"] == ITEMS
    lines = (world / "source" / "log.csv").read_text().count("\n") - 1
    assert report["dataset"]["interactions"] == lines
    assert report["model"]["preset"] == "tiny"
    assert report["model"]["parameters"] > 10_000
    results = [report["test"]["item"], report["test"]["id"]]
    assert set(report["baselines"]) == {"popularity", "markov", "sasrec_ce"}
    for result in results + list(report["baselines"].values()):
        for name in ("recall@5", "recall@10", "ndcg@5", "ndcg@10"):
            low, high = result[f"{name}_ci95"]
            assert 0 <= low <= result[name] <= high <= 1
        assert result["recall@5"] <= result["recall@10"]
        assert result["ndcg@10"] <= result["recall@10"]
    for name in ("legality_unmasked", "coverage"):
        assert 0 < report["test"][name] <= 1
    assert sorted(report["test"]["prefixes"]) == report["test"]["prefixes"]  # longer: more
    assert {"prepare", "tokenize", "train", "test"} <= set(report["seconds"])
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    assert {"jax", "flax", "optax", "grain"} <= set(report["versions"])


def test_the_rule_is_learned(trained):
    """Every room of the house had to work for this."""
    report = json.loads((trained.folder / "report.json").read_text())
    popularity, markov = (report["baselines"][name] for name in ("popularity", "markov"))
    ours = report["test"]["item"]
    assert popularity["recall@10"] < 0.5
    assert ours["recall@10"] > 0.9
    assert ours["ndcg@10"] > 0.8
    assert markov["recall@5"] == 1.0  # the rule is a Markov chain
    assert report["paired"]["popularity"]["ci95"][0] > 0.2
    assert report["test"]["item"]["recall@10"] <= report["test"]["id"]["recall@10"]
    assert sum(report["test"]["loss_level"]) < 1.5  # from log(16) * 3 = 8.3
    assert report["model"]["best_step"] in (30, 60)


def test_files_of_a_run(trained):
    folder = trained.folder
    text = (folder / "report.md").read_text()
    assert "OneRec" in text
    for name in ("loss", "recall", "codes", "experts"):
        data = (folder / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 3000
        assert f"{name}.png" in text
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if "loss_level" in row]
    assert [row["step"] for row in train] == list(range(5, 61, 5))
    assert train[-1]["loss"] < train[0]["loss"] / 2
    assert np.shape(train[0]["load"]) == (2, 4)
    assert [row["step"] for row in rows if "recall@10" in row] == [30, 60]
    assert not list(folder.glob(".*"))


def test_what_is_printed(trained):
    printed = trained.printed
    assert str(trained.folder) in printed
    for words in ("users/s", "dropped", "popularity", "SASRec", "Markov"):
        assert words in printed
    titles = {title(item) for item in range(ITEMS)}
    assert len([word for word in titles if word in printed]) > 10  # recommendations in words


def test_a_second_run_reuses_everything(trained, in_world, capsys):
    before = tree(trained.folder)
    changed = {p: p.stat().st_mtime_ns for p in trained.folder.rglob("*") if p.is_file()}
    pretrain.run_command(trained.flags)
    assert "popularity" in capsys.readouterr().out
    assert tree(trained.folder) == before
    again = {p: p.stat().st_mtime_ns for p in trained.folder.rglob("*") if p.is_file()}
    assert again == changed


def test_the_default_run_folder_depends_on_flags_data_and_ids(trained, in_world):
    """One folder for each set of settings; the mesh and the evaluation are none of them."""

    def folder(*flags):
        config = parse(["--data", str(in_world / "data"), *FLAGS, *flags])
        data = pretrain.load_dataset(config.data)
        ids_folder = pretrain.find_semantic_ids(config, data, make_mesh(1))
        ids = pretrain.SemanticIds.load(ids_folder)
        lives = pretrain.find_lifelong(config, data, ids)
        return pretrain.open_run(config, config.data, ids_folder, lives, data, ids).folder

    first = folder()
    assert folder("--mesh.data", "2", "--evaluation.beam-width", "8") == first
    assert folder("--seed", "1") != first
    assert folder("--train.steps", "61") != first
    # Flags of the tokenizer matter through the IDs that come of them.
    assert folder("--tokenizer.kmeans.chunk", "7") == first
    assert folder("--tokenizer.seed", "1") != first
    assert first.parent.name == "runs"


def test_how_ids_were_made_is_no_setting():
    """An extended table, or one made elsewhere, has no flags of pretraining."""
    values = pretrain.settings(parse([]))
    assert not {"tokenizer", "vectors", "tokens", "pairs", "semantic_ids", "run"} & set(values)
    assert {"model", "train", "optimizer", "positive", "seed", "preset"} <= set(values)
    flags = ["--tokenizer.align", "tiny", "--vectors", "v.npy", "--pairs", "p.parquet"]
    assert pretrain.settings(parse(flags)) == values
    json.dumps(values)


def test_other_ids_under_a_run_are_refused(trained, in_world, refused):
    """Settings alone would not tell: the fingerprint of the IDs does."""
    before = tree(trained.folder)
    message = refused(pretrain.run_command, *trained.flags, "--tokenizer.seed", 1)
    assert "semantic_ids.fingerprint" in message
    assert tree(trained.folder) == before


@pytest.mark.parametrize("flag", ["--vectors", "--tokens", "--pairs"])
def test_files_for_ids_that_are_there(in_world, tmp_path, refused, flag):
    ids = in_world / "runs" / "semantic_ids" / "any"
    flags = ["--data", in_world / "data", "--semantic-ids", ids, "--run", tmp_path / "run", *FLAGS]
    message = refused(pretrain.run_command, *flags, flag, tmp_path / "file")
    assert flag in message
    assert "--semantic-ids" in message
    assert not (tmp_path / "run").exists()


def test_ids_made_on_the_way_are_a_whole_tokenizer(trained, in_world):
    """They can be extended, and their report lies beside them."""
    folder = Run.open(trained.folder).config["semantic_ids"]["folder"]
    assert Tokenizer.load(folder).ids.fingerprint == Run.open(trained.folder).ids.fingerprint
    assert "report.md" in trained.printed
    for name in ("report.md", "report.json", "codes.png"):
        assert (pathlib.Path(folder) / name).exists()


def test_alignment_presets(in_world):
    """As in experiments.tokenize."""
    cfg = parse(["--tokenizer.align", "tiny", "--tokenizer.alignment.steps", 9]).tokenizer
    assert cfg.align == "tiny"
    assert cfg.alignment == dataclasses.replace(ALIGNMENT_PRESETS["tiny"], steps=9)
    assert parse([]).tokenizer == pretrain.TokenizerConfig()


def parse(flags):
    """The configuration that a command line stands for."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "main", seen.append)
        pretrain.run_command([str(flag) for flag in flags])
    return seen[0]


@pytest.mark.parametrize("preset", ["tiny", "v1-0.015b", "v1-0.121b"])
def test_presets_parse_build_and_report(preset, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrain.run_command(["--preset", preset, "--describe"])
    printed = capsys.readouterr().out
    assert preset in printed
    assert "parameters" in printed
    assert "FLOP" in printed
    assert not list(tmp_path.iterdir())
    assert parse([f"--preset={preset}"]).model == pretrain.PRESETS[preset]
    changed = parse(["--model.dropout", "0.25", "--preset", preset]).model
    assert changed.dropout == 0.25
    assert changed.d_model == pretrain.PRESETS[preset].d_model


# ------------------------------------------------------------------- killed, interrupted, resumed


def steps_in(folder):
    return {int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()}


def restored(folder):
    """Model of the latest checkpoint, bit for bit, and its step, which is the data position."""
    run = Run.open(folder)
    flat, _ = jax.tree_util.tree_flatten_with_path(run.load_best())
    step = run.checkpoints.latest
    run.checkpoints.close()
    model = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in flat}
    return model, step


def test_kill_9_and_the_same_command_again(trained, world, tmp_path):
    """Before the first checkpoint and after it; then to the end, bit for bit as undisturbed."""
    run = tmp_path / "run"
    flags = ["--data", str(world / "data"), "--run", str(run), *FLAGS, "--evaluation.no-baselines"]
    for step, saved in ((10, set()), (40, {30})):
        process = start(["experiments.pretrain", *flags], world)
        wait_for_step(process, run / "metrics.jsonl", step)
        # A save goes on beside the steps after it.
        wait_for(process, f"the checkpoint of {saved}", lambda s=saved: s <= steps_in(run))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert steps_in(run) == saved, "killed too late for this test to mean anything"
        assert not (run / "report.json").exists()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 45, "lo')  # and a line torn by the kill
    process = start(["experiments.pretrain", *flags], world)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "30" in next(line for line in out.splitlines() if "resum" in line)
    ours, theirs = (helpers.logged(f / "metrics.jsonl") for f in (run, trained.folder))
    assert ours == theirs
    assert restored(run) == restored(trained.folder)
    ours, theirs = (json.loads((f / "report.json").read_text()) for f in (run, trained.folder))
    assert ours["test"] == theirs["test"]
    assert not [p for p in (run / "checkpoints").iterdir() if not p.name.isdigit()]


def evaluate_again(flags):
    cli.run(evaluate.main, evaluate.EvaluateConfig, argv=flags)


def recommend_to(flags):
    cli.run(recommend.main, recommend.RecommendConfig, argv=flags)


def test_ctrl_c_saves_and_says_how_to_go_on(world, tmp_path, refused):
    run = tmp_path / "run"
    flags = ["--data", str(world / "data"), "--run", str(run), *FLAGS]
    process = start(["experiments.pretrain", *flags], world)
    wait_for_step(process, run / "metrics.jsonl", 5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    (step,) = steps_in(run)
    assert 5 < step < 30
    last = out.strip().splitlines()[-1]
    assert str(step) in last
    assert "python -m experiments.pretrain" in last  # the command that goes on
    assert str(run) in last
    # Nothing has been validated: there is no model to test or serve yet.
    before = tree(run)
    for command, flags in ((evaluate_again, []), (recommend_to, ["--user", "u1"])):
        message = refused(command, run, *flags)
        assert str(run) in message
        assert "python -m experiments.pretrain" in message
    assert tree(run) == before


# -------------------------------------------------------------------------------------- bad input


def test_flags_that_fit_nothing(in_world, tmp_path, refused):
    """Refused before a run folder is made; every message names the flag."""
    out = tmp_path / "run"
    base = ["--data", in_world / "data", "--run", out, *FLAGS]
    cases = {
        "--train.batch-size": ["--train.batch-size", 100_000],
        "--train.batch-size 0": ["--train.batch-size", 0],
        "--train.batch-size 63": ["--train.batch-size", 63, "--mesh.data", 2],
        "--mesh.data": ["--mesh.data", 9],
        "--mesh.expert": ["--mesh.expert", 9],
        "--mesh.expert 3": ["--mesh.data", 1, "--mesh.expert", 3, "--train.batch-size", 63],
        "--tokenizer.codebook-size": ["--tokenizer.codebook-size", 41],
        "--vectors": ["--vectors", tmp_path / "no.npy"],
        "--tokens": ["--tokens", tmp_path / "no.npz"],
        "--pairs": ["--pairs", in_world / "source" / "log.csv"],
        "--data": ["--data", tmp_path / "nowhere"],
        "--semantic-ids": ["--semantic-ids", tmp_path / "nowhere"],
        "--preset": ["--preset", "huge"],
        "--model.num-heads": ["--model.num-heads", 5],
        "--model.experts-per-token": ["--model.experts-per-token", 5],
    }
    before = tree(in_world)
    for names, flags in cases.items():
        message = refused(pretrain.run_command, *base, *flags)
        value = str(flags[-1])
        assert any(name in message for name in (*names.split(), value)), (names, message)
        assert not out.exists(), names
    assert tree(in_world) == before


def test_a_preset_that_does_not_fit(in_world, tmp_path, refused, monkeypatch):
    """On a device that says it has one GiB: nothing is allocated; split over eight, it fits."""
    monkeypatch.setattr(pretrain, "device_limit", lambda: 2**30)
    monkeypatch.setattr(pretrain, "fit", lambda *_, **__: pytest.fail("training began"))
    flags = ["--data", in_world / "data", "--run", tmp_path / "run", "--preset", "v1-0.121b"]
    flags += ["--train.batch-size", 64]
    message = refused(pretrain.run_command, *flags, "--mesh.data", 1)
    need, missing = (float(x) for x in re.findall(r"([\d.]+) GiB", message))
    assert need == pytest.approx(16 * 0.121e9 / 2**30, rel=0.1)  # four copies in float32
    assert missing == pytest.approx(need - 1, abs=0.11)
    assert "--mesh.fsdp" in message
    with pytest.raises(pytest.fail.Exception, match="training began"):
        pretrain.run_command([*map(str, flags), "--mesh.fsdp", "8"])


def test_unknown_flags_end_with_code_2(capsys):
    for flags in (["--trian.steps", "3"], ["--train.steps", "many"]):
        with pytest.raises(SystemExit) as stop:
            pretrain.run_command(flags)
        assert stop.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.run_command(["--data", str(tmp_path / "nowhere"), "--debug"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert message.splitlines()[-1].startswith("error: ")


def test_a_run_with_other_settings_is_not_touched(trained, in_world, refused):
    before = tree(trained.folder)
    for flags, name in (
        (["--train.steps", 80], "steps"),
        (["--model.expert-dim", 24], "expert_dim"),
        (["--seed", 5], "seed"),
    ):
        message = refused(pretrain.run_command, *trained.flags, *flags)
        assert name in message
        assert str(flags[1]) in message
        assert "--run" in message
    assert tree(trained.folder) == before


def test_semantic_ids_of_another_data_set(trained, in_world, tmp_path, refused):
    other = make_data(tmp_path / "source", tmp_path / "other", seed=1)
    ids = Run.open(trained.folder).config["semantic_ids"]["folder"]
    run = tmp_path / "run"
    message = refused(
        pretrain.run_command, "--data", other, "--semantic-ids", ids, "--run", run, *FLAGS
    )
    assert "another data set" in message
    assert str(ids) in message
    assert not run.exists()


def test_data_changed_under_a_run(trained, in_world, tmp_path, refused):
    """Same settings, same run folder, other data: refused, and the run stays as it is."""
    other = make_data(tmp_path / "source", tmp_path / "other", seed=1)
    before = tree(trained.folder)
    flags = ["--data", other, "--run", trained.folder, *FLAGS]
    message = refused(pretrain.run_command, *flags)
    assert "fingerprint" in message or "data" in message
    assert tree(trained.folder) == before


def test_a_diverging_run_stops_with_the_step(in_world, tmp_path, refused):
    """Numbers that overflow float32: an error in one line, and nothing wrong is kept."""
    run = tmp_path / "run"
    small = ["--model.num-experts", 0, "--model.lifelong-length", 0, "--train.log-every", 1]
    flags = ["--data", in_world / "data", "--run", run, *FLAGS, *small]
    message = refused(
        pretrain.run_command, *flags, "--optimizer.learning-rate", 1e38, "--train.steps", 12
    )
    assert "not finite at step" in message
    assert "no checkpoint" in message
    assert "learning-rate" in message
    assert not (run / "report.json").exists()
    assert steps_in(run) == set()


def test_a_data_set_without_text_asks_for_vectors(in_world, tmp_path, refused):
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id\n" + "".join(f"{u},{i}\n" for u in (1, 2) for i in range(5)))
    data = prepare(PrepareConfig(source="table", path=log, out=tmp_path / "data"))
    message = refused(pretrain.run_command, "--data", data, "--run", tmp_path / "run", *MODEL_FLAGS)
    assert "--vectors" in message
    assert not (tmp_path / "run").exists()
