"""`python -m experiments.tokenize`: what it writes and shows, how it goes on, and its bad input."""

import dataclasses
import json
import re
import signal
import threading

import numpy as np
import polars as pl
import pytest
from conftest import ANIMALS, COLOURS, ITEMS, make_data, start, title, tree

from experiments import tokenize
from experiments.pretrain import TokenizerConfig
from onerec_jax.data.schema import build_dataset, load_dataset, save_dataset
from onerec_jax.tokenizer import build
from onerec_jax.tokenizer.alignment import ALIGNMENT_PRESETS
from onerec_jax.tokenizer.build import Tokenizer
from onerec_jax.tokenizer.rq_kmeans import encode
from onerec_jax.tokenizer.semantic_ids import SemanticIds

SMALL_ALIGNMENT = [
    *("--tokenizer.align", "tiny", "--tokenizer.alignment.steps", "3"),
    *("--tokenizer.alignment.width", "8", "--tokenizer.alignment.ff-dim", "8"),
    *("--tokenizer.alignment.caption-width", "8", "--tokenizer.alignment.batch-size", "16"),
]


def run(flags):
    tokenize.run_command([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def made(world):
    """Semantic IDs that many tests look at or extend. Nobody may change them."""
    out = world / "made"
    run(["--data", world / "data", "--out", out, "--tokenizer.codebook-size", 8])
    return out


NEW = [*range(96, 100), *range(140, 144)]
"""Item ids that come later, before and behind the old ones in the tables."""


@pytest.fixture
def grown(world, tmp_path):
    """The catalogue with eight films more, in which nobody has been seen yet."""
    old = load_dataset(world / "data")
    more = pl.DataFrame(
        {"item_id": NEW, "text": ["The red fox again"] * 8},
        schema_overrides={"item_id": old.items.schema["item_id"]},
    )
    items = pl.concat([old.items.select("item_id", "text"), more])
    meta = {"origin": "a test", "licence": "none"}
    log = old.table("interactions").select("user_id", "item_id")
    dataset = build_dataset("later", items, None, log, meta=meta, split="leave-one-out")
    save_dataset(dataset, tmp_path / "grown")
    return tmp_path / "grown"


# ----------------------------------------------------------------------------- written and shown


def test_writes_and_shows(world, made, tmp_path, capsys):
    out = tmp_path / "ids"
    run(["--data", world / "data", "--out", out, "--tokenizer.codebook-size", 8])
    printed = capsys.readouterr().out
    for words in ("of 8", "collision rate", f"{ITEMS} items", "entropy", "Gini", "fan-out"):
        assert words in printed
    assert "another seed agree to" in printed
    assert f"written to {out}" in printed
    assert "level 3 of 3" in printed  # progress
    codes = re.findall(r"^code (\d+), (\d+) items: (.+)$", printed, re.M)
    assert sum(int(items) for _, items, _ in codes) == ITEMS
    shown = {word for *_, words in codes for word in words.split(", ")}
    assert shown & {*COLOURS, *ANIMALS}
    assert len([item for item in range(ITEMS) if title(item) in printed]) > 10
    ids = SemanticIds.load(out)
    assert ids.sids.shape == (ITEMS, 3)
    assert ids.sids.min() >= 0
    assert ids.sids.max() < 8
    assert ids.manifest["dataset_fingerprint"] == load_dataset(world / "data").fingerprint
    np.testing.assert_array_equal(SemanticIds.load(made).sids, ids.sids)  # the same once more
    assert [path.name for path in tmp_path.iterdir()] == ["ids"]


def test_files(made):
    report = json.loads((made / "report.json").read_text())
    assert report["quality"]["stored"]["distinct_ids"] == len(SemanticIds.load(made).leaf_sids)
    assert {"stability", "readable", "fit", "dataset"} <= set(report)
    text = (made / "report.md").read_text()
    assert f"{report['stability']:.3f}" in text
    assert f"{report['quality']['stored']['entropy'][0]:.3f}" in text
    assert ", ".join(report["readable"][0]["words"]) in text
    assert "(codes.png)" in text
    picture = (made / "codes.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000


def test_given_vectors(world, tmp_path, capsys):
    """Two clear groups of items differ in their first code."""
    vectors = np.random.default_rng(0).standard_normal((ITEMS, 4)) * 0.01
    vectors[: ITEMS // 2, 0] += 5
    np.save(tmp_path / "v.npy", vectors.astype(np.float16))
    flags = ["--data", world / "data", "--vectors", tmp_path / "v.npy", "--out", tmp_path / "ids"]
    run([*flags, "--tokenizer.codebook-size", 2, "--tokenizer.collisions", "keep"])
    first = SemanticIds.load(tmp_path / "ids").sids[:, 0]
    assert len(set(first[: ITEMS // 2])) == 1
    assert len(set(first[ITEMS // 2 :])) == 1
    assert first[0] != first[-1]
    assert "agree to 1.000" in capsys.readouterr().out  # so clear that another seed sees them too


def test_no_stability(world, tmp_path, capsys):
    flags = ["--data", world / "data", "--out", tmp_path / "ids", "--tokenizer.codebook-size", 8]
    run([*flags, "--no-stability", "--tokenizer.collisions", "append", "--devices", 1])
    printed = capsys.readouterr().out
    assert "another seed" not in printed
    assert "appended" in printed
    assert SemanticIds.load(tmp_path / "ids").sids.shape == (ITEMS, 4)


def test_alignment(world, tmp_path, capsys):
    out = tmp_path / "ids"
    flags = ["--data", world / "data", "--out", out, "--no-stability", *SMALL_ALIGNMENT]
    run([*flags, "--tokenizer.codebook-size", 8])
    printed = capsys.readouterr().out
    assert "item pairs" in printed
    assert re.search(r"align +3/3", printed)
    tokenizer = Tokenizer.load(out)
    assert tokenizer.ids.codebooks.shape == (3, 8, 4 * 8)
    assert tokenizer.aligner.config.steps == 3
    assert len(json.loads((out / "report.json").read_text())["alignment"]) == 1
    assert "aligned" in (out / "report.md").read_text()


# ----------------------------------------------------------------------------------- the presets


def parse(flags) -> TokenizerConfig:
    """The tokenizer's configuration that a command line stands for."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "main", seen.append)
        run(["--data", "data", "--out", "out", *flags])
    return seen[0].tokenizer


@pytest.mark.parametrize("name", ALIGNMENT_PRESETS)
@pytest.mark.parametrize("joined", [False, True])
def test_presets_change_the_defaults(name, joined):
    flags = [f"--tokenizer.align={name}"] if joined else ["--tokenizer.align", name]
    preset = ALIGNMENT_PRESETS[name]
    assert parse(flags) == TokenizerConfig(align=name, alignment=preset)
    single = ["--tokenizer.alignment.steps", 7, *flags, "--tokenizer.alignment.no-captions"]
    changed = dataclasses.replace(preset, steps=7, captions=False)
    assert parse(single).alignment == changed


def test_without_a_preset():
    assert parse([]) == parse(["--tokenizer.align", "off"]) == TokenizerConfig()
    cfg = parse(["--tokenizer.kmeans.assignment", "balanced", "--tokenizer.pairs.top-k", 3])
    assert (cfg.kmeans.assignment, cfg.pairs.top_k) == ("balanced", 3)


@pytest.mark.parametrize(
    "flags",
    [
        ["--tokenizer.align", "huge"],
        ["--tokenizer.align"],
        ["--tokenizer.collisions", "fight"],
        ["--tokenizer.iterations", "3"],  # as it was called before
    ],
)
def test_flags_that_there_are_not(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        run(["--data", "data", "--out", "out", *flags])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------ extension


def test_extend(made, grown, tmp_path, capsys):
    out, before = tmp_path / "more", tree(made)
    # The settings of the old table count, not the flags.
    run(["--data", grown, "--extend", made, "--out", out, "--tokenizer.levels", 2])
    printed = capsys.readouterr().out
    assert "semantic IDs of later" in printed
    assert f"{ITEMS + 8} items" in printed
    assert "code " in printed
    old, new = SemanticIds.load(made), SemanticIds.load(out)
    rows = np.searchsorted(new.item_ids, old.item_ids)
    np.testing.assert_array_equal(new.sids[rows], old.sids)
    added = np.setdiff1d(np.arange(ITEMS + 8), rows)
    assert new.item_ids[added].tolist() == NEW
    tokenizer = Tokenizer.load(out)
    vector = tokenizer.encoder.encode(["The red fox again"])
    nearest = encode(vector, old.codebooks)
    np.testing.assert_array_equal(new.codes[added], np.tile(nearest, (8, 1)))
    assert len(np.unique(new.sids, axis=0)) == ITEMS + 8
    assert {"report.md", "report.json", "codes.png"} <= {path.name for path in out.iterdir()}
    assert tree(made) == before
    run(["--data", grown, "--extend", made, "--out", out, "--overwrite"])  # the same again
    assert SemanticIds.load(out).fingerprint == new.fingerprint


def test_extend_in_place(world, grown, tmp_path, capsys):
    ids = tmp_path / "ids"
    run(["--data", world / "data", "--out", ids, "--tokenizer.codebook-size", 8])
    before = SemanticIds.load(ids).fingerprint
    run(["--data", grown, "--extend", ids, "--out", ids, "--overwrite"])
    assert SemanticIds.load(ids).manifest["extended"][0]["from"] == before


def test_extensions_that_cannot_be(world, made, grown, tmp_path, refused):
    out = tmp_path / "out" / "ids"
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((ITEMS + 8, 4)))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "semantic_ids.json").write_text("{}")
    cases = {
        "nothing to extend": ["--data", world / "data", "--extend", made],
        "holds no semantic IDs": ["--data", grown, "--extend", tmp_path / "nowhere"],
        "of the format 'None'": ["--data", grown, "--extend", tmp_path / "damaged"],
        "give no file": ["--data", grown, "--extend", made, "--vectors", tmp_path / "v.npy"],
        "--pairs": ["--data", grown, "--extend", made, "--pairs", tmp_path / "p.parquet"],
    }
    for words, flags in cases.items():
        assert words in refused(run, *flags, "--out", out)
    assert not out.parent.exists()


# ------------------------------------------------------------------- what is written, and when


def test_overwrite_is_asked_for(world, tmp_path, refused):
    out = tmp_path / "ids"
    flags = ["--data", world / "data", "--out", out, "--tokenizer.codebook-size"]
    run([*flags, 8])
    before = tree(tmp_path)
    assert "--overwrite" in refused(run, *flags, 4)
    assert "codebook-size" in refused(run, *flags, 41, "--overwrite")  # fails: the old stays
    assert tree(tmp_path) == before
    run([*flags, 4, "--overwrite"])
    assert SemanticIds.load(out).codebook_size == 4
    (tmp_path / "photos").mkdir()
    flags[3] = tmp_path / "photos"
    assert "no semantic IDs" in refused(run, *flags, 4, "--overwrite")


def test_targets_that_cannot_be_written(world, tmp_path, refused, monkeypatch):
    """Found out before the work is done."""
    monkeypatch.setattr(tokenize, "make", None)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below" / "ids"):
        message = refused(run, "--data", world / "data", "--out", out, "--overwrite")
        assert f"--out {out}" in message
    assert tree(tmp_path) == {"file": b"mine"}


def test_a_full_disk_is_one_line(world, tmp_path, refused, monkeypatch):
    def draw(path, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.reports, "draw", draw)  # the last of the files
    message = refused(run, "--data", world / "data", "--out", tmp_path / "ids")
    assert "No space left on device" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["fit_rq_kmeans", "encode", "make_report"])
def test_a_crash_leaves_the_old_table(world, made, tmp_path, monkeypatch, moment):
    def crash(*args, **options):
        raise RuntimeError("the lights went out")

    out = tmp_path / "ids"
    Tokenizer.load(made).save(out)
    before = tree(tmp_path)
    monkeypatch.setattr(build, moment, crash)
    flags = ["--data", world / "data", "--tokenizer.codebook-size", 8, "--out"]
    with pytest.raises(RuntimeError, match="lights"):
        run([*flags, out, "--overwrite"])
    with pytest.raises(RuntimeError, match="lights"):
        run([*flags, tmp_path / "new" / "ids"])
    assert tree(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_ctrl_c(world, tmp_path, monkeypatch, capsys):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "encode", stop)
    with pytest.raises(SystemExit) as stopped:
        run(["--data", world / "data", "--out", tmp_path / "ids", "--tokenizer.codebook-size", 8])
    assert stopped.value.code == 130
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_kill_9_while_fitting(world, made, tmp_path):
    """Nothing is there afterwards, and the same command makes all of it."""
    out = tmp_path / "out" / "ids"
    flags = ["--data", str(world / "data"), "--out", str(out), "--tokenizer.codebook-size", "8"]
    process = start(["experiments.tokenize", *flags], world)
    guard = threading.Timer(240, process.kill)
    guard.start()
    for line in process.stdout:
        if line.startswith("level 2 of 3"):
            break
    process.send_signal(signal.SIGKILL)
    printed, err = process.communicate()
    guard.cancel()
    assert process.returncode == -signal.SIGKILL, err
    assert "written to" not in printed, "killed too late for this test to mean anything"
    assert not out.parent.exists()
    run(flags)
    assert SemanticIds.load(out).fingerprint == SemanticIds.load(made).fingerprint


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (None, "cannot be read"),
        (b"no numpy", "cannot be read"),
        (np.zeros((ITEMS - 1, 3)), "one row an item"),
        (np.zeros(ITEMS), "one row an item"),
        (np.full((ITEMS, 3), np.nan), "row 0 is not finite"),
        (np.ones((ITEMS, 3)), "rows are equal"),
        (np.eye(3)[np.arange(ITEMS) % 3], "3 distinct vectors"),
    ],
    ids=["missing", "garbage", "short", "flat", "nan", "constant", "few"],
)
def test_bad_vectors(world, tmp_path, refused, vectors, words):
    path, out = tmp_path / "v.npy", tmp_path / "out" / "ids"
    if isinstance(vectors, bytes):
        path.write_bytes(vectors)
    elif vectors is not None:
        np.save(path, vectors)
    message = refused(run, "--data", world / "data", "--vectors", path, "--out", out)
    assert words in message
    assert str(path) in message
    assert not out.parent.exists()


def test_flags_that_fit_nothing(world, tmp_path, refused):
    """One line each, which names the flag; nothing is written."""
    out = tmp_path / "out" / "ids"
    kmeans = "--tokenizer.kmeans"
    cases = {
        "--devices 9": ["--devices", 9],
        "--devices -1": ["--devices", -1],
        "--tokenizer.levels 0": ["--tokenizer.levels", 0],
        "40 levels of 8": ["--tokenizer.levels", 40],
        "--tokenizer.codebook-size 41": ["--tokenizer.codebook-size", 41],
        "--tokenizer.kmeans.iterations 0": [f"{kmeans}.iterations", 0],
        "--tokenizer.kmeans.mini-batch": [
            f"{kmeans}.mini-batch",
            9,
            f"{kmeans}.assignment",
            "sweep",
        ],
        "--vectors and --tokens": ["--vectors", "v.npy", "--tokens", "t.npz"],
        "--pairs is for the alignment": ["--pairs", "p.parquet"],
        "t.npz: cannot be read": ["--tokens", tmp_path / "t.npz"],
        "p.parquet: no such file": ["--pairs", tmp_path / "p.parquet", *SMALL_ALIGNMENT],
        "batch-size 20": [*SMALL_ALIGNMENT, "--tokenizer.alignment.batch-size", 20],
    }
    base = ["--data", world / "data", "--out", out, "--tokenizer.codebook-size", 8]
    for words, flags in cases.items():
        assert words in refused(run, *base, *flags), words
    assert not out.parent.exists()


def test_bad_input(world, tmp_path, refused):
    out = tmp_path / "out" / "ids"
    assert str(tmp_path / "no") in refused(run, "--data", tmp_path / "no", "--out", out)
    message = refused(
        run, "--data", world / "data", "--out", out, "--tokenizer.codebook-size", ITEMS + 1
    )
    assert "--tokenizer.codebook-size 41" in message
    assert f"{ITEMS} training items" in message
    broken = make_data(tmp_path / "source", tmp_path / "broken")
    meta = json.loads((broken / "dataset.json").read_text())
    meta["split"] = "by mood"
    (broken / "dataset.json").write_text(json.dumps(meta))
    refused(run, "--data", broken, "--out", out)
    (broken / "items.parquet").write_bytes(b"PAR1")
    refused(run, "--data", broken, "--out", out)
    assert not out.parent.exists()


def test_out_of_memory(world, tmp_path, refused, monkeypatch):
    def fit(*args, **options):
        raise build.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(build, "fit_rq_kmeans", fit)
    message = refused(run, "--data", world / "data", "--out", tmp_path / "ids")
    assert "--tokenizer.kmeans.mini-batch" in message
