"""`experiments.pretrain --targets sessions`: trained, broken off and resumed, served by its first
items; and sessions of which nothing is left."""

import contextlib
import io
import json

import conftest
import helpers
import numpy as np
import polars as pl
import pytest

from experiments import posttrain, pretrain, recommend
from onerec_jax import cli
from onerec_jax.data.schema import build_dataset, save_dataset
from onerec_jax.generation.session_generator import session_lists
from onerec_jax.run import Run
from onerec_jax.serving.recommender import Recommender
from onerec_jax.serving.session_lists import recommend_lists
from onerec_jax.sharding import make_mesh

USERS, ITEMS, SESSIONS, LENGTH = 100, 24, 5, 4
FLAGS = [
    *("--model.d-model", "16", "--model.num-heads", "2", "--model.ff-dim", "16"),
    *("--model.encoder-layers", "1", "--model.decoder-layers", "1", "--model.num-experts", "0"),
    *("--model.pathways", "short", "--model.short-length", "4", "--model.feature-dim", "4"),
    *("--train.batch-size", "32", "--train.steps", "120", "--train.log-every", "10"),
    *("--train.validate-every", "60", "--train.patience", "0", "--mesh.data", "1"),
    *("--optimizer.learning-rate", "0.02", "--optimizer.warmup-steps", "5"),
    *("--validate-users", "30", "--validate-beam-width", "8", "--tokenizer.codebook-size", "16"),
    *("--evaluation.beam-width", "8", "--evaluation.batch-size", "32"),
    *("--evaluation.resamples", "20", "--evaluation.no-baselines"),
    *("--targets", "sessions", "--sessions.items", "3", "--sessions.min-watched", "3"),
]


def write_sessions(folder):
    """Sessions of four items, each one more than the one before; the next begins five further."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        item = int(rng.integers(ITEMS))
        for session in range(SESSIONS):
            for place in range(LENGTH):
                time_s = 10**6 + session * 50_000 + place * 30 + user
                rows.append((user, item % ITEMS, time_s, 9.0, int(session == place)))
                item += 1
            item += 4
    names = ("user_id", "item_id", "time_s", "playtime_s", "like")
    log = pl.DataFrame(rows, schema=names, orient="row")
    items = pl.DataFrame(
        {"item_id": range(ITEMS), "text": [conftest.title(i) for i in range(ITEMS)]}
    ).with_columns(title=pl.col("text"))
    meta = {"origin": "a test", "licence": "none"}
    save_dataset(build_dataset("s", items, None, log, meta=meta, split="leave-one-out"), folder)


def recommend_to(flags):
    cli.run(recommend.main, recommend.RecommendConfig, argv=flags)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """Working folder, flags, run folder and what training printed."""
    folder = tmp_path_factory.mktemp("sessions")
    write_sessions(folder / "data")
    flags = ["--data", str(folder / "data"), *FLAGS]
    out = io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        conftest.quick_compilation(),
    ):
        pretrain.run_command([*flags, "--run", str(folder / "run")])
    return folder, flags, folder / "run", out.getvalue()


def test_lists_are_learned(sessions):
    """Of five sessions, three are for training, of which the first has no history; the watch time
    of the last, cut by the held-out items, is short of the median."""
    _, _, folder, printed = sessions
    counts = json.loads((folder / "sessions.json").read_text())
    assert "training sessions: sessions 500, watched 400" in printed
    assert (counts["sessions"], counts["watched"], counts["min_watch_s"]) == (500, 400, 36.0)
    assert counts["lists"] == USERS
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    valid = [row for row in rows if "recall@10" in row]
    assert [row["step"] for row in valid] == [60, 120]
    report = json.loads((folder / "report.json").read_text())
    assert report["test"]["item"]["recall@10"] > 0.5
    # What is shown in words are first items, found by the beams of any other run.
    assert len({title for title in map(conftest.title, range(ITEMS)) if title in printed}) > 5
    run = Run.open(folder)
    assert run.model_config.session_items == 3
    lists = run.session_lists("test")
    generator = run.generator(make_mesh(1), beam_width=8, batch_size=32)
    variables = run.load_best()
    found = session_lists(generator, variables, run.builder, lists, width=16)
    steps = np.diff(found.items[:, 0], axis=1) % ITEMS
    assert (steps == 1).mean() > 0.6  # what a list is made of
    target = run.dataset.item_rows[lists.rows]
    assert (found.items[:, 0] == target).all(1).mean() > 0.1  # of 12,144 lists
    loss = generator.loss(variables, run.builder, lists).sum(-1).mean()
    assert loss < 3 < np.log(16) * run.ids.levels / 2
    first = generator.rank(variables, run.builder, lists)
    hit = (first.lists == target[:, :1]).any(1)
    np.testing.assert_array_equal(first.item_ranks < 10, hit)  # of the list, not of the position
    assert hit.mean() > 0.5


def test_whole_lists_are_served(sessions, capsys):
    """In order, without what was seen or is not allowed; and in words."""
    recommender = Recommender.load(sessions[2])
    history, few = [0, 1, 2, 3], [8, 9, 10, 11, 12]
    plain, chosen, none = (
        recommend_lists(recommender, [history], beam_width=16, allowed=allowed)[0]
        for allowed in (None, few, few[:2])
    )
    assert len({item.item_id for item in plain.items} - set(history)) == 3
    assert len({item.item_id for item in chosen.items} & set(few)) == 3
    assert (none.items, none.logp) == ([], -np.inf)
    flags = [str(sessions[2]), "--history", "0,1,2,3", "--lists"]
    recommend_to(flags)
    printed = capsys.readouterr().out
    places = [printed.index(item.title) for item in plain.items]
    assert places == sorted(places)


def test_broken_off_and_resumed(sessions, tmp_path, monkeypatch):
    """Between two validations; then as undisturbed, bit for bit."""
    folder, flags, whole, _ = sessions
    monkeypatch.chdir(folder)
    flags = [*flags, "--run", str(tmp_path / "run")]
    made = pretrain.training_stream

    def breaks(config, run):
        stream = made(config, run)

        class Stream:
            examples = stream.examples

            def __call__(self, step=0):
                for place, batch in enumerate(stream(step), step):
                    if place == 90:
                        raise OSError("the power is gone")
                    yield batch

        return Stream()

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "training_stream", breaks)
        with pytest.raises(OSError, match="power"):
            pretrain.run_command(flags)
    reported = []
    monkeypatch.setattr(pretrain.evaluate, "evaluate_run", lambda *args: reported.append(args))
    monkeypatch.setattr(pretrain.evaluate, "show", lambda result: None)
    monkeypatch.setattr(pretrain, "show_recommendations", lambda *args: None)
    pretrain.run_command(flags)
    ours, theirs = (helpers.logged(f / "metrics.jsonl") for f in (tmp_path / "run", whole))
    assert ours == theirs
    assert len(reported) == 1


def test_flags_that_fit_nothing(sessions, tmp_path, refused, monkeypatch):
    folder, flags, run, _ = sessions
    monkeypatch.chdir(folder)
    out = ["--run", tmp_path / "run"]
    cases = {
        "--sessions.items 5": ["--sessions.items", 5],
        "--sessions.min-watched 5 (": ["--sessions.min-watched", 5],
        "--sessions.min-watch-s": ["--sessions.combine", "all", "--sessions.min-watch-s", 99],
        "--pipeline.targets-per-user 2": ["--pipeline.targets-per-user", 2],
        "--model.session-items 4": ["--model.session-items", 4],
    }
    for words, more in cases.items():
        message = refused(pretrain.run_command, *flags, *out, *more)
        assert words in message, message
    point = flags[: flags.index("--targets")]
    message = refused(pretrain.run_command, *point, *out, "--model.session-items", 3)
    assert "--targets sessions" in message
    flags = [str(run), "--lists", "--users", "all", "--out", "x.parquet"]
    assert "--lists" in refused(recommend_to, *flags)
    message = refused(posttrain.run_command, run, "--reward", tmp_path / "none")
    assert "session lists" in message
