"""`python -m experiments.recommend RUN`: in words, for a user or a history of one's own."""

import numpy as np
import pytest
from conftest import COLOURS, ITEMS, STRIDE, USERS, make_data, title

from experiments import recommend
from experiments.recommend import RecommendConfig
from onerec_jax import cli
from onerec_jax.run import Run
from onerec_jax.serving.recommender import Recommender


def run(flags):
    cli.run(recommend.main, RecommendConfig, argv=[str(flag) for flag in flags])


def table_rows(printed):
    """Cells of the table: place, item, id, semantic ID, log P."""
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_for_a_user_of_the_data(trained, capsys):
    """The whole log is the history, the test item included."""
    opened = Run.open(trained.folder)
    user = opened.dataset.users["user_id"].to_list().index("u3")
    rows = opened.dataset.item_rows[slice(*opened.dataset.offsets[user : user + 2])]
    items = [int(opened.dataset.items["item_id"][int(row)]) - 100 for row in rows]
    run([trained.folder, "--user", "u3", "--n", 4])
    printed = capsys.readouterr().out
    first = printed.splitlines()[0]
    assert first.startswith(f"history, {len(items)} actions, … ")
    assert first.split("… ")[1].split(" | ") == [title(item) for item in items[-5:]]
    found = table_rows(printed)
    assert [row[0] for row in found] == ["1", "2", "3", "4"]
    for _, words, item_id, sid, logp in found:
        assert words == title(int(item_id) - 100)
        assert int(item_id) - 100 not in items
        row = opened.dataset.items["item_id"].to_list().index(int(item_id))
        assert sid == "-".join(map(str, opened.ids.sids[row]))
        assert float(logp) <= 0
    logps = [float(row[4]) for row in found]
    assert logps == sorted(logps, reverse=True)


def test_the_rule_says_what_comes_next(trained):
    """Asked when the test item came. After it nobody knows when the next request will be: the last
    action then counts as done just now, which this model never saw in training.
    """
    recommender = Recommender.load(trained.folder)
    data = recommender.run.dataset
    for user in range(0, USERS, 9):
        first, end = data.offsets[user : user + 2].tolist()
        actions = data.interactions[first:end].select("item_id", "time_s").to_dicts()
        *history, wanted = actions
        assert (history[-1]["item_id"] - 100 + STRIDE) % ITEMS == wanted["item_id"] - 100
        (items,) = recommender.recommend(
            [history], n=3, beam_width=16, request_time_s=wanted["time_s"]
        )
        assert items[0].item_id == wanted["item_id"]
        assert items[0].logp > -1 > items[1].logp


def test_for_a_history_of_your_own(trained, capsys):
    history = [2, 9, 16, 23, 30]
    run([trained.folder, "--history", ",".join(f"{item + 100}" for item in history), "--n", 3])
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith("history, 5 actions, … ")
    assert " | ".join(title(item) for item in history) in printed
    found = table_rows(printed)
    assert len({row[2] for row in found}) == 3
    run([trained.folder, "--history", " 102 , 109,116,123,130 ", "--n", 3])
    assert table_rows(capsys.readouterr().out) == found  # blanks do not matter


def test_seen_items_on_request(trained, capsys):
    """With every item seen but one, that one is left; with --include-seen all are there."""
    history = [(STRIDE * i) % ITEMS for i in range(ITEMS - 1)]
    text = ",".join(str(item + 100) for item in history)
    run([trained.folder, "--history", text, "--n", 5])
    (only,) = table_rows(capsys.readouterr().out)
    assert int(only[2]) - 100 == (STRIDE * (ITEMS - 1)) % ITEMS
    run([trained.folder, "--history", text, "--n", 5, "--include-seen"])
    assert len(table_rows(capsys.readouterr().out)) == 5


def test_more_than_the_catalogue(trained, capsys):
    run([trained.folder, "--history", "100", "--n", 999, "--beam-width", 99])
    found = table_rows(capsys.readouterr().out)
    assert len(found) == ITEMS - 1
    assert len({row[2] for row in found}) == ITEMS - 1
    assert np.isfinite([float(row[4]) for row in found]).all()
    assert {row[1].split()[1] for row in found} == set(COLOURS)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--user", "nobody"], ["--user", "nobody"]),
        (["--history", "100,999"], ["--history", "999"]),
        (["--history", ""], ["--history"]),
        (["--history", ", ,"], ["--history"]),
        (["--history", "100,,107"], ["--history"]),
        ([], ["--user", "--history"]),
        (["--user", "u1", "--history", "100"], ["--user", "--history"]),
        (["--user", "u1", "--n", "0"], ["--n"]),
        (["--user", "u1", "--beam-width", "0"], ["--beam-width"]),
        (["--users", "all"], ["--users", "--out"]),
        (["--user", "u1", "--skip-unknown"], ["--skip-unknown", "--users"]),
        (["--user", "u1", "--out", "x.parquet"], ["--users", "--out"]),
        (
            ["--users", "nowhere.txt", "--out", "x.parquet"],
            ["--users nowhere.txt", "cannot be read"],
        ),
    ],
)
def test_bad_flags(trained, refused, flags, words):
    message = refused(run, trained.folder, *flags)
    for word in words:
        assert word in message


def test_no_run_there(tmp_path, refused):
    message = refused(run, tmp_path, "--user", "u1")
    assert str(tmp_path) in message
    assert "no run" in message


def test_changed_data(copied, tmp_path, refused):
    import json

    other = make_data(tmp_path / "source", tmp_path / "other", seed=1)
    config = json.loads((copied / "config.json").read_text())
    config["data"]["folder"] = str(other)
    (copied / "config.json").write_text(json.dumps(config))
    assert "changed" in refused(run, copied, "--user", "u1")
