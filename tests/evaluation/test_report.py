"""The report in words and plots."""

import copy
import io

import numpy as np
import pytest
import rich.console

from onerec_jax.evaluation.report import METRICS, draw_plots, markdown, result_rows, rich_table


def result(value):
    return {name: value for name in METRICS} | {
        f"{name}_ci95": [value - 0.01, value + 0.02] for name in METRICS
    }


@pytest.fixture
def report():
    return {
        "command": "python -m experiments.pretrain --seed 3",
        "dataset": {
            "name": "toy",
            "split": "leave-one-out",
            "users": 1234,
            "items": 56,
            "interactions": 7890,
        },
        "model": {
            "preset": "tiny",
            "parameters": 98765,
            "train_flops": 4_000_000,
            "compute_dtype": "float32",
        },
        "test": {
            "item": result(0.21),
            "id": result(0.22),
            "legality_unmasked": 0.876,
            "beam_width": 64,
            "coverage": 0.432,
            "prefixes": [3.1, 8.7, 9.9],
        },
        "baselines": {
            "popularity": result(0.11),
            "markov": result(0.12),
            "sasrec_ce": result(0.13),
        },
        "paired": {"popularity": {"difference": 0.1, "ci95": [0.05, 0.15]}},
        "sasrec": {"epochs": 7, "best_epoch": 7, "seconds": 12.3, "still_rising": True},
        "seconds": {"train": 45.6, "test": 7.8},
        "versions": {"jax": "0.10.2"},
        "plots": ["loss", "recall"],
    }


def test_markdown_says_it_all(report):
    text = markdown(report)
    for words in (
        "# OneRec on toy",
        report["command"],
        "1,234 users",
        "56 items",
        "7,890 actions",
        "98,765 parameters",
        "87.6%",
        "43.2%",
        "3.1 different first codes and 8.7 different pairs",
        "+0.1000",
        "[+0.0500, +0.1500]",
        "7 epochs",
        "still rising",
        "![loss](loss.png)",
        "| train | 45.6 |",
        "jax 0.10.2",
    ):
        assert words in text, words
    table = [line for line in text.splitlines() if line.startswith("|")]
    cell = "0.2100 [0.2000, 0.2300]"
    assert any(line.count(cell) == 4 and "items" in line for line in table)
    assert [line for line in table if line.startswith("| popularity | 0.1100 [0.1000, 0.1300]")]


def test_markdown_of_less_and_of_more(report):
    bare = {k: v for k, v in report.items() if k not in ("baselines", "paired", "sasrec")}
    text = markdown(bare)
    assert "0.2100" in text
    assert "epochs" not in text
    assert "minus" not in text
    report["test_exclude_seen"] = {"item": result(0.31), "id": result(0.32)}
    report["baselines_exclude_seen"] = {"popularity": result(0.19)}
    text = markdown(report)
    assert "seen items excluded" in text
    assert text.index("0.2100") < text.index("0.3100")
    report["sasrec"]["still_rising"] = False
    assert "had stopped rising" in markdown(report)


def test_rows_and_terminal_table(report):
    rows = result_rows(report)
    assert [values["recall@10"] for _, values in rows] == [0.21, 0.22, 0.11, 0.12, 0.13]
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    console.print(rich_table(report))
    text = console.export_text()
    for words in ("toy", "OneRec", "Markov", "SASRec", "0.1300"):
        assert words in text


def rows_of(layers=2, experts=4):
    """What metrics.jsonl holds, validation rows in between."""
    rng = np.random.default_rng(0)
    rows = []
    for step in (10, 20, 30):
        load = rng.dirichlet(np.ones(experts), layers).tolist()
        rows.append({"step": step, "loss": 3.0, "loss_level": [1.5, 1.0, 0.5], "load": load})
        rows.append({"step": step, "validation": 1, "loss": 3.0, "recall@10": 0.1})
    return rows


def png_size(path):
    """Width and height in the header."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_plots(report, tmp_path):
    sids = np.random.default_rng(0).integers(0, 8, (56, 3)).astype(np.int32)
    names = draw_plots(tmp_path, report, rows_of(), sids, 8)
    assert names == ["loss", "recall", "codes", "experts"]
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in names}
    sizes = {name: png_size(tmp_path / f"{name}.png") for name in names}
    assert all(min(size) > 200 for size in sizes.values())
    # One panel a level and one a layer.
    assert sizes["codes"][0] == pytest.approx(3 * 3 * 120, rel=0.01)
    assert sizes["experts"][0] == pytest.approx(2 * 3.2 * 120, rel=0.01)


def test_plots_of_a_dense_model_without_baselines(report, tmp_path):
    rows = copy.deepcopy(rows_of())
    for row in rows:
        row.pop("load", None)
    del report["baselines"]
    sids = np.zeros((5, 1), np.int32)
    assert draw_plots(tmp_path, report, rows, sids, 8) == ["loss", "recall", "codes"]
