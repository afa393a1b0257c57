"""Recommendations for many users: the lists of Python in a file, and what a kill leaves."""

import polars as pl
import pytest
import serving_world

from onerec_jax.errors import InputError
from onerec_jax.serving import bulk
from onerec_jax.serving.bulk import BulkConfig, recommend_to_file

CONFIG = BulkConfig(n=3, beam_width=99, batch_size=4, filter_size=64)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(bulk, "BATCHES", 1)


def check(recommender, path, users):
    table = pl.read_parquet(path)
    lists = recommender.recommend(users, n=CONFIG.n, beam_width=CONFIG.beam_width)
    wanted = [
        (user, place, item.item_id, list(item.semantic_id))
        for user, listed in zip(users, lists, strict=True)
        for place, item in enumerate(listed, 1)
    ]
    assert table.columns == ["user_id", "place", "item_id", "logp", "semantic_id"]
    assert table.drop("logp").rows() == wanted
    logp = [item.logp for listed in lists for item in listed]
    assert table["logp"].to_list() == pytest.approx(logp, rel=1e-5)


def test_everyone(recommender, tmp_path, capsys):
    out = tmp_path / "lists.parquet"
    done = recommend_to_file(recommender, "all", out, CONFIG)
    assert done["users"] == serving_world.USERS
    assert f"{serving_world.USERS} users in" in capsys.readouterr().out
    check(recommender, out, list(range(serving_world.USERS)))
    assert [path.name for path in tmp_path.iterdir()] == ["lists.parquet"]
    with pytest.raises(InputError, match="exists"):
        recommend_to_file(recommender, "all", out, CONFIG)


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_some_users_in_an_order_of_their_own(recommender, tmp_path, kind):
    path, users = tmp_path / f"users.{kind}", [5, 0, 5, 3, 1]
    if kind == "txt":
        path.write_text("5\n0\n\n5\n 3\n1")
    else:
        table = pl.DataFrame({"user_id": users, "more": users})
        table.write_csv(path) if kind == "csv" else table.write_parquet(path)
    recommend_to_file(recommender, path, tmp_path / "out.parquet", CONFIG)
    check(recommender, tmp_path / "out.parquet", users)


def test_a_killed_run_goes_on(recommender, tmp_path, monkeypatch, capsys):
    out, lists, calls = tmp_path / "out.parquet", bulk._lists, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return lists(*args)

    monkeypatch.setattr(bulk, "_lists", killed)
    with pytest.raises(KeyboardInterrupt):
        recommend_to_file(recommender, "all", out, CONFIG)
    assert not out.exists()
    with pytest.raises(InputError, match="other settings"):
        recommend_to_file(recommender, "all", out, BulkConfig(n=2, batch_size=4))
    done = recommend_to_file(recommender, "all", out, CONFIG)
    assert (done["users"], done["kept"]) == (3, 4)
    assert "3 users" in capsys.readouterr().out
    check(recommender, out, list(range(serving_world.USERS)))


def test_unknown_users_are_skipped_on_request(recommender, tmp_path, capsys):
    path, out = tmp_path / "users.txt", tmp_path / "out.parquet"
    path.write_text("5\nnobody\n0\n99")
    done = recommend_to_file(recommender, path, out, CONFIG, skip_unknown=True)
    assert (done["users"], done["skipped"]) == (2, 2)
    assert "2 unknown ids skipped" in capsys.readouterr().out
    check(recommender, out, [5, 0])
    path.write_text("98\n99")
    with pytest.raises(InputError, match="2 of 2 ids") as error:
        recommend_to_file(recommender, path, tmp_path / "none.parquet", CONFIG, skip_unknown=True)
    assert "--skip-unknown" not in str(error.value)
    path = tmp_path / "users.parquet"
    pl.DataFrame({"user_id": [5, None]}).write_parquet(path)
    with pytest.raises(InputError, match="row 2: an id of users is an integer"):
        recommend_to_file(recommender, path, tmp_path / "none.parquet", CONFIG, skip_unknown=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no user"),
        (
            "1\n99",
            "1 of 2 ids are of no user of the data set ('99' in row 2): correct them or give",
        ),
        ("x\n1\n99\nü\n98", "4 of 5 ids are of no user"),
        ("x\n1\n99\nü\n98", "('x' in row 1, '99' in row 3, '\\xfc' in row 4, …)"),
        ("98\n99", "('98' in row 1, '99' in row 2): correct them"),
        (b"\xff\xfe", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_bad_files(recommender, tmp_path, text, words):
    path = tmp_path / "users.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match="--users") as error:
        recommend_to_file(recommender, path, tmp_path / "out.parquet", CONFIG)
    assert words in str(error.value)
    (tmp_path / "bad.csv").write_text("name\n1\n")
    with pytest.raises(InputError, match="cannot be read"):
        recommend_to_file(recommender, tmp_path / "bad.csv", tmp_path / "out.parquet", CONFIG)
