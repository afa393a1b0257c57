"""metrics.jsonl: what is written, and what survives a crash."""

import json

import jax.numpy as jnp
import numpy as np

from onerec_jax.training.metrics import MetricsLog, first_non_finite, late_mean, mean_rows


def test_rows_are_plain_json(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    row = {
        "step": 3,
        "loss": jnp.float32(0.1),
        "loss_level": np.array([1.5, 2.5]),
        "load": jnp.array([[0.25, 0.75]]),
        "count": np.int64(7),
        "name": "x",
    }
    log.write(row)
    log.write({"step": 4})
    first, second = log.path.read_text().splitlines()
    assert json.loads(first) == {
        "step": 3,
        "loss": 0.1,
        "loss_level": [1.5, 2.5],
        "load": [[0.25, 0.75]],
        "count": 7,
        "name": "x",
    }
    assert json.loads(second) == {"step": 4}
    assert log.read() == [json.loads(first), json.loads(second)]


def test_float32_survives_the_text(tmp_path):
    """Equal bits give equal text, and neighbours of float32 mostly differ at seven digits."""
    log = MetricsLog(tmp_path / "m")
    value = np.float32(8.828817)
    log.write({"step": 1, "x": value})
    assert np.float32(log.read()[0]["x"]) == value


def test_cut_after_drops_later_rows_and_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path / "m")
    for step in (10, 20, 20, 30):
        log.write({"step": step, "x": step / 7})
    whole = log.path.read_text()
    with log.path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed within a write
    assert [row["step"] for row in log.read()] == [10, 20, 20, 30]
    log.cut_after(20)
    lines = whole.splitlines(keepends=True)
    assert log.path.read_text() == "".join(lines[:3])  # byte for byte what was written
    log.write({"step": 30, "x": 30 / 7})
    assert log.path.read_text() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_cut_after_a_torn_line_that_is_the_last_wanted(tmp_path):
    log = MetricsLog(tmp_path / "m")
    log.path.write_text('{"step": 10}\n{"step": 2')
    log.cut_after(20)
    assert log.path.read_text() == '{"step": 10}\n'


def test_nothing_written_yet(tmp_path):
    log = MetricsLog(tmp_path / "m")
    assert log.read() == []
    log.cut_after(0)
    assert not log.path.exists()
    log.write({"step": 1})
    log.cut_after(0)
    assert log.read() == []


def test_mean_rows_keeps_shapes():
    rows = [{"loss": np.float32(1), "load": np.array([[1.0, 3.0]])}, {"loss": 3, "load": [[3, 5]]}]
    mean = mean_rows(rows)
    assert mean["loss"] == 2
    np.testing.assert_array_equal(mean["load"], [[2.0, 4.0]])


def test_first_non_finite():
    good = {"loss": 1.0, "grad_norm": np.float32(2.0), "load": np.array([np.nan])}
    assert first_non_finite([good, good]) is None
    bad_gradient = good | {"grad_norm": jnp.inf}
    bad_loss = good | {"loss": np.float32("nan")}
    assert first_non_finite([good, bad_gradient, bad_loss]) == (1, "grad_norm")
    assert first_non_finite([good, good, bad_loss]) == (2, "loss")
    assert first_non_finite([]) is None


def test_a_metric_that_some_steps_lack(tmp_path):
    """A mean over the steps that have it; null where none has, for NaN is no JSON."""
    rows = [{"x": np.float32("nan"), "y": [1.0, np.nan]}, {"x": np.float32(3), "y": [3.0, np.nan]}]
    mean = mean_rows(rows)
    assert mean["x"] == 3
    log = MetricsLog(tmp_path / "m")
    log.write({"step": 1, **mean})
    assert json.loads(log.path.read_text(), parse_constant=str) == {
        "step": 1,
        "x": 3.0,
        "y": [2.0, None],
    }


def test_late_mean_is_of_the_last_rows_that_have_it():
    rows = [{"x": value} for value in range(10)] + [{"y": 1.0}, {"x": None}]
    assert late_mean(rows, "x") == 8.5
    assert late_mean(rows, "x", share=0.01) == 9
    assert np.isnan(late_mean(rows, "z"))
