"""Tables and plot of an A/B test."""

import pytest

from onerec_jax.evaluation.ab_report import (
    PUBLISHED,
    cost_rows,
    draw,
    effect,
    effect_rows,
    in_per_cent,
    markdown,
    published_rows,
)
from onerec_jax.evaluation.closed_loop import METRICS


def row(difference, *, base=50.0, by_seed=(), agrees=True):
    ci95 = [difference - 1, difference + 2]
    return {
        "mean": base + difference,
        "base": base,
        "difference": difference,
        "ci95": ci95,
        "by_seed": list(by_seed) or [difference],
        "agrees": agrees,
    }


@pytest.fixture
def result():
    """Metric k of arm `b` lies k above its base."""
    return {
        "a": {metric: row(0.0, agrees=False) for metric in METRICS},
        "b": {metric: row(float(k), by_seed=(k, k)) for k, metric in enumerate(METRICS)},
    }


COSTS = {
    "a": {"requests": 9, "seconds": 0.25, "scored": 0, "flops": None},
    "b": {"requests": 9, "seconds": 2e-3, "scored": 7.5, "flops": {"x": 3e6, "y": 5e5}},
}


def test_changes_in_words():
    assert in_per_cent(row(5.0)) == (10, 8, 14)
    assert effect(row(5.0, agrees=False)) == "+10.0 [+8.0, +14.0]"  # one seed has no other
    assert effect(row(5.0, by_seed=(1, 9))) == "+10.0 [+8.0, +14.0]"
    assert effect(row(5.0, by_seed=(-1, 11), agrees=False)) == "+10.0 [+8.0, +14.0] ±"
    assert effect(row(5.0, base=0.0)) == ""


def test_a_row_each(result):
    header, rows = effect_rows(result)
    assert header == ["a user", "a", "b"]
    assert [cells[0] for cells in rows] == list(METRICS.values())
    assert rows[1] == ["watch time, s", "50", "+2.0 [+0.0, +6.0]"]
    header, rows = published_rows(result)
    assert header == ["% over a", *PUBLISHED.values()]
    for cell, metric in zip(rows[0][1:], PUBLISHED, strict=True):
        assert cell.startswith(f"{2 * list(METRICS).index(metric):+.1f} [")


def test_costs_of_a_million():
    header, rows = cost_rows(COSTS)
    names = ["a million lists", "items scored a list", "x, TFLOP", "y, TFLOP", "TFLOP", "seconds"]
    assert header == names
    assert rows == [
        ["a", "", "", "", "", "250,000"],
        ["b", "7.5", "3", "0.5", "3.5", "2,000"],
    ]


def test_report_and_plot(result, tmp_path):
    text = markdown(result, COSTS, command="python -m x", note="A note.", plot="ab.png")
    for part in ("`python -m x`", "A note.", "![](ab.png)", "| % over a |", "| a user |", "TFLOP"):
        assert part in text
    result["b"]["like"]["base"] = 0.0
    draw(tmp_path / "ab.png", result)
    assert (tmp_path / "ab.png").read_bytes().startswith(b"\x89PNG")
