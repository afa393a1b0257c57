"""`python -m experiments.tokenize`: what it writes and shows, and its bad input."""

import json

import numpy as np
import pytest
from conftest import ITEMS, make_data, tree

from experiments import tokenize
from experiments.tokenize import TokenizeConfig
from onerec_jax import cli
from onerec_jax.data.schema import load_dataset
from onerec_jax.tokenizer.semantic_ids import SemanticIds


def run(flags):
    cli.run(tokenize.main, TokenizeConfig, argv=[str(flag) for flag in flags])


def test_writes_and_shows(world, tmp_path, capsys):
    out = tmp_path / "ids"
    run(["--data", world / "data", "--out", out, "--tokenizer.codebook-size", 8])
    printed = capsys.readouterr().out
    for words in ("of 8", "collision rate", f"{ITEMS} items", str(out)):
        assert words in printed
    ids = SemanticIds.load(out)
    assert ids.sids.shape == (ITEMS, 3)
    assert ids.sids.min() >= 0
    assert ids.sids.max() < 8
    assert ids.manifest["dataset_fingerprint"] == load_dataset(world / "data").fingerprint
    again = tmp_path / "again"
    run(["--data", world / "data", "--out", again, "--tokenizer.codebook-size", 8])
    np.testing.assert_array_equal(SemanticIds.load(again).sids, ids.sids)


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
    assert "collision rate" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (None, "cannot be read"),
        (b"no numpy", "cannot be read"),
        (np.zeros((ITEMS - 1, 3)), "one row an item"),
        (np.zeros(ITEMS), "one row an item"),
        (np.full((ITEMS, 3), np.nan), "row 0 is not finite"),
    ],
    ids=["missing", "garbage", "short", "flat", "nan"],
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
