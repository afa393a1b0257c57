"""`python -m experiments.evaluate RUN`: a finished run again, with a second protocol."""

import json
import shutil

import numpy as np
import pytest
from conftest import ITEMS, make_data, tree

from experiments import evaluate
from experiments.evaluate import EvaluateConfig, seen_items
from onerec_jax import cli
from onerec_jax.data.examples import target_examples
from onerec_jax.run import Run

BUDGET = [
    *("--evaluation.beam-width", "16", "--evaluation.batch-size", "64"),
    *("--evaluation.resamples", "100", "--evaluation.sasrec-epochs", "1"),
]


def run(flags):
    cli.run(evaluate.main, EvaluateConfig, argv=[str(flag) for flag in flags])


def test_exclude_seen_gives_a_second_table(copied, trained, capsys):
    first = json.loads((trained.folder / "report.json").read_text())
    run([copied, *BUDGET, "--evaluation.exclude-seen"])
    printed = capsys.readouterr().out
    assert "seen items excluded" in printed
    assert str(copied) in printed
    report = json.loads((copied / "report.json").read_text())
    # The first table stays what it was: the same model under the same protocol.
    for name in ("recall@5", "recall@10", "ndcg@5", "ndcg@10"):
        assert report["test"]["item"][name] == first["test"]["item"][name]
        for model, baseline in first["baselines"].items():
            assert report["baselines"][model][name] == baseline[name]
        # No test item has been seen (stride 7 meets all 40 items before one comes again), so that
        # dropping seen items can only raise a rank.
        assert report["test_exclude_seen"]["item"][name] >= first["test"]["item"][name]
    popular = report["baselines_exclude_seen"]["popularity"]["recall@10"]
    assert popular > first["baselines"]["popularity"]["recall@10"]
    assert set(report["baselines_exclude_seen"]) == {"popularity", "markov", "sasrec_ce"}
    text = (copied / "report.md").read_text()
    assert text.count("| popularity |") >= 2
    assert "seen items excluded" in text
    assert {"train", "prepare"} <= set(report["seconds"])  # of the earlier stages, kept
    assert report["command"] == first["command"]


def test_without_baselines(copied, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "fit_sasrec", None)
    run([copied, *BUDGET, "--evaluation.no-baselines"])
    report = json.loads((copied / "report.json").read_text())
    assert "baselines" not in report
    assert "| popularity |" not in (copied / "report.md").read_text()
    assert "OneRec, items" in capsys.readouterr().out


def test_baselines_are_kept(copied, trained, monkeypatch):
    """The same budget again: SASRec is not trained twice."""
    opened = Run.open(copied)
    config = evaluate.EvaluationConfig(sasrec_epochs=1)
    monkeypatch.setattr(evaluate, "fit_sasrec", None)
    ranks, budget, _ = evaluate.evaluate_baselines(opened, config, 0)
    report = json.loads((trained.folder / "report.json").read_text())
    assert budget == report["sasrec"]
    assert (budget["epochs"], budget["best_epoch"], budget["still_rising"]) == (1, 1, True)
    hits = np.mean(ranks["popularity"] < 10)
    assert hits == pytest.approx(report["baselines"]["popularity"]["recall@10"])


def test_seen_items_are_the_history(trained):
    opened = Run.open(trained.folder)
    test = target_examples(opened.split.test_at)
    seen = seen_items(opened, test)
    rows, offsets = opened.dataset.item_rows, opened.dataset.offsets
    for user in (0, 31):
        actions = rows[offsets[user] : offsets[user + 1]]
        np.testing.assert_array_equal(seen[user], actions[:-1])
        assert actions[-1] not in seen[user]
    assert len(set(rows.tolist())) == ITEMS


# -------------------------------------------------------------------------------------- bad input


def test_no_run_there(tmp_path, refused):
    assert str(tmp_path / "nowhere") in refused(run, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    message = refused(run, tmp_path / "empty")
    assert "no run" in message
    assert "experiments.pretrain" in message
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"data": 3}'])
def test_a_damaged_run(copied, refused, content):
    (copied / "config.json").write_text(content)
    assert str(copied) in refused(run, copied)


def test_a_checkpoint_of_another_model(copied, refused):
    """Somebody edits the sizes: the checkpoint has the last word, and the leaf is named."""
    path = copied / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["model"]["expert_dim"] = 24
    path.write_text(json.dumps(config))
    before = tree(copied)
    message = refused(run, copied, *BUDGET)
    assert "another model" in message
    assert "experts/w_" in message
    assert "48" in message or "24" in message
    assert tree(copied) == before


def test_a_checkpoint_of_another_codebook(copied, refused):
    path = copied / "features.json"
    spec = json.loads(path.read_text())
    spec["codebook_size"] *= 2
    path.write_text(json.dumps(spec))
    before = tree(copied)
    assert "codebook" in refused(run, copied, *BUDGET)
    assert tree(copied) == before


def test_data_or_ids_changed_under_the_run(copied, world, tmp_path, refused):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    other = make_data(tmp_path / "source", tmp_path / "other", seed=1)
    old = config["data"]["folder"]
    for folder, word in ((str(other), "changed"), (str(tmp_path / "gone"), "gone")):
        config["data"]["folder"] = folder
        path.write_text(json.dumps(config))
        before = tree(copied)
        message = refused(run, copied, *BUDGET)
        assert word in message
        assert folder in message
        assert tree(copied) == before
    config["data"]["folder"] = old
    config["semantic_ids"]["folder"] = str(tmp_path / "no ids")
    path.write_text(json.dumps(config))
    assert "semantic IDs" in refused(run, copied, *BUDGET)


def test_before_training_has_finished(copied, refused):
    """A report of a model on its way would pass for the run's result."""
    path = copied / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["train"]["steps"] = 90
    path.write_text(json.dumps(config))
    before = tree(copied)
    message = refused(run, copied, *BUDGET)
    assert config["command"] in message  # the remedy
    assert tree(copied) == before


def test_without_checkpoints(copied, refused):
    shutil.rmtree(copied / "checkpoints")
    message = refused(run, copied, *BUDGET)
    assert str(copied) in message
    assert "experiments.pretrain" in message
