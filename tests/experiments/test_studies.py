"""What studies share: processes, paired intervals, and the platform's answer to lists."""

import os
import pathlib

import numpy as np
import pytest

from experiments.studies.arms import markdown_table, paired_over_seeds, run_tasks
from experiments.studies.pathways import ARMS, METRICS, StudyConfig, compare, expected_of_lists
from experiments.studies.pathways import tables as pathway_tables
from onerec_jax.data.examples import target_examples
from onerec_jax.data.sources.world import read_world
from onerec_jax.data.splits import make_split
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.data.world.response import World, satisfaction
from onerec_jax.errors import InputError


def test_a_constant_gain_has_no_width():
    b = np.random.default_rng(0).normal(size=(3, 50))
    found = paired_over_seeds(b + 0.25, b)
    assert found["difference"] == pytest.approx(0.25)
    assert found["ci95"] == pytest.approx([0.25, 0.25])
    assert found["agrees"]
    assert found["by_seed"] == pytest.approx([0.25] * 3)


def test_interval_holds_what_seeds_and_users_change():
    rng = np.random.default_rng(1)
    users = np.broadcast_to(rng.normal(size=400), (3, 400))
    seeds = np.array([[0.5], [-0.4], [0.3]])
    narrow = paired_over_seeds(users, np.zeros((3, 400)))
    wide = paired_over_seeds(users + seeds, np.zeros((3, 400)))
    assert np.diff(wide["ci95"]) > 2 * np.diff(narrow["ci95"])
    assert not wide["agrees"]
    width = 2 * 1.96 * users[0].std() / 20  # of a mean of 400 users
    assert np.diff(narrow["ci95"])[0] == pytest.approx(width, rel=0.15)


def test_users_without_a_value_are_left_out():
    a = np.resize([1.0, np.nan, 3.0], (1, 60))
    assert paired_over_seeds(a, np.zeros((1, 60)))["difference"] == 2.0
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_over_seeds(a, np.zeros((1, 2)))


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


def test_answer_to_lists():
    """Each user is asked where its test action was; places without an item do not count."""
    dataset = read_world(WorldConfig(users=12, items=120, actions=12), split="leave-one-out")
    test = target_examples(make_split(dataset).test_at)
    rng = np.random.default_rng(0)
    lists = rng.integers(120, size=(len(test), 4))
    lists[0, 2:], lists[1] = -1, -1
    found = expected_of_lists(dataset, test, lists)
    world = World.from_meta(dataset.meta)
    for i in (0, 5):
        row = dataset.offsets[test.user[i]] + test.position[i]
        shown = lists[i][lists[i] >= 0]
        where = (dataset.column(name)[row] for name in ("session", "slot", "time_s"))
        answer = world.expected(int(test.user[i]), shown, *where)
        np.testing.assert_allclose(found["watch_s"][i], answer.watch_s.mean(), rtol=1e-6)
        np.testing.assert_allclose(found["satisfaction"][i], satisfaction(answer).mean(), rtol=1e-6)
    assert np.isnan(found["like"][1])


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
