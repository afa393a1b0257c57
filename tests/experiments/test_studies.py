"""What studies share: processes and tables."""

import dataclasses
import os
import pathlib

import numpy as np
import pytest

from experiments.studies.arms import command_line, run_tasks
from experiments.studies.pathways import ARMS, METRICS, StudyConfig, compare
from experiments.studies.pathways import tables as pathway_tables
from onerec_jax.errors import InputError
from onerec_jax.evaluation.report import markdown_table


@dataclasses.dataclass(frozen=True)
class Sleep:
    """Settings of a study that there is not."""

    seconds: int = 1


def test_tasks_run_in_processes_of_their_own(tmp_path):
    lines = []
    tasks = {name: (str(tmp_path / name),) for name in "abc"}
    run_tasks(os.mkdir, tasks, parallel=2, logs=tmp_path / "logs", say=lines.append)
    assert all((tmp_path / name).is_dir() for name in "abc")
    assert len(lines) == 3
    assert "done: 3 of 3" in lines[-1]
    tasks = {"a": (str(tmp_path / "a"),), "d": (str(tmp_path / "d"),)}
    with pytest.raises(RuntimeError, match="^a failed"):
        run_tasks(os.mkdir, tasks, parallel=2, logs=tmp_path / "logs", say=lines.append)
    assert "FileExistsError" in (tmp_path / "logs" / "a.log").read_text()
    assert (tmp_path / "d").is_dir()  # the others run to their end


def test_the_command_leaves_memory_to_its_runs(monkeypatch):
    name, seen = "XLA_PYTHON_CLIENT_PREALLOCATE", []

    def main(config):
        seen.append((os.environ[name], config.seconds))

    for given, found in (("true", "true"), (None, "false")):  # what the user says holds
        monkeypatch.setenv(name, "true")
        if given is None:
            monkeypatch.delenv(name)
        command_line(main, Sleep, "sleep", argv=["--seconds", "2"])
        assert seen.pop() == (found, 2)


def test_tables_of_arms():
    rng = np.random.default_rng(0)
    names = list(ARMS)[:2]
    scores = {a: {m: rng.random((2, 9)) + i for m in METRICS} for i, a in enumerate(names)}
    compared = compare(scores)
    assert list(compared) == names[1:]
    assert all(found["agrees"] for found in compared[names[1]].values())
    table, markdown = pathway_tables(scores, compared, {"random": {"like": 0.5}})
    assert table.row_count == len(METRICS) == markdown.count("\n") - 2
    assert markdown_table(["", "a"], [["x", "1"]]) == "| " + " | a |\n| --- | ---: |\n| x | 1 |\n"


@pytest.mark.parametrize("arms", [("nothing",), ("positive, item",)])
def test_arms_that_cannot_be_compared(arms):
    with pytest.raises(InputError, match="--arms"):
        StudyConfig(arms=arms, out=pathlib.Path("x"))
