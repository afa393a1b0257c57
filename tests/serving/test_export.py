"""An exported run gives the lists of the run itself, without its code."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import serving_world

from onerec_jax.data.schema import FEEDBACK
from onerec_jax.errors import InputError
from onerec_jax.serving import exported as module
from onerec_jax.serving.export import ExportConfig, export_run
from onerec_jax.serving.exported import Exported, pack_texts, unpack_text

CONFIG = ExportConfig(users=(4,), widths=(12,), filter_size=64)


@pytest.fixture(scope="module")
def folder(recommender, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "run"
    export_run(recommender, out, CONFIG)
    return out


@pytest.fixture(scope="module")
def exported(folder):
    return Exported.load(folder)


def actions_of(dataset, user):
    """The stored log of a user, as a client would send it."""
    first, end = dataset.offsets[user : user + 2].tolist()
    names = {"item_id", "time_s", "rating", "playtime_s", *FEEDBACK}
    table = dataset.interactions[first:end]
    return table.select([c for c in table.columns if c in names]).to_dicts()


def histories(dataset):
    whole = [actions_of(dataset, user) for user in range(serving_world.USERS)]
    return [*whole, [], ["3", 4, 5], [{"item_id": 7, "rating": 5.0}, 8]]


def test_features_are_those_of_the_library(recommender, exported):
    """Every array of the batch, for logs with holes, bare items and newcomers."""
    for now in (None, 2_000_000):
        for history in histories(recommender.run.dataset):
            batch, _ = recommender.gather([recommender.query(history, request_time_s=now)])
            _, found = exported._history(*exported._checked(history), now)
            leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
            for path, leaf in leaves:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                np.testing.assert_array_equal(found[name], leaf, err_msg=name)
                assert found[name].dtype == leaf.dtype, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exclude": [12, "10"], "include_seen": True},
        {"allowed": [1, 5, 9, 12, 20]},
    ],
)
def test_lists_are_those_of_the_library(recommender, exported, options):
    asked = histories(recommender.run.dataset)[4:]
    theirs = exported.recommend(asked, n=9, **options)
    parts = [[asked[start + place] for place in range(3)] for start in (0, 3)]
    ours = [
        listed
        for part in parts  # one shape to compile
        for listed in recommender.recommend(part, n=9, beam_width=12, **options)
    ]
    for listed, found in zip(ours, theirs, strict=True):
        assert [x["item_id"] for x in found] == [x.item_id for x in listed]
        assert [x["title"] for x in found] == [x.title for x in listed]
        assert [tuple(x["semantic_id"]) for x in found] == [x.semantic_id for x in listed]
        logp = [x.logp for x in listed]
        np.testing.assert_allclose([x["logp"] for x in found], logp, rtol=1e-5)


def test_it_serves_without_the_code_of_the_model(folder):
    code = f"""
import sys
from onerec_jax.serving.exported import Exported
lists = Exported.load({str(folder)!r}).recommend([[1, 2], []], n=3)
heavy = {{"flax", "polars", "orbax", "optax", "onerec_jax.models", "onerec_jax.run"}}
print([len(found) for found in lists], sorted(heavy & set(sys.modules)))
"""
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.stdout == "[3, 3] []\n", found.stderr


def test_for_both_platforms_and_with_xla_attention_only(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["platforms"] == ["cpu", "cuda"]
    (name,) = manifest["programs"]
    program = jax.export.deserialize(bytearray((folder / name).read_bytes()))
    assert program.platforms == ("cpu", "cuda")
    assert "cudnn" not in program.mlir_module()


def test_text_survives(exported):
    texts = ["", "a", "“ü” 漢字", "x" * 300, "\ud800"]
    packed = pack_texts(texts)
    assert [unpack_text(packed, row) for row in range(5)] == [*texts[:4], "?"]


@pytest.mark.parametrize(("history", "options", "words"), serving_world.BAD_QUESTIONS)
def test_bad_questions_are_refused_as_by_the_library(
    recommender, exported, history, options, words
):
    messages = []
    for one in (recommender, exported):
        with pytest.raises(InputError) as error:
            one.recommend([[3], history], **options)
        place = "history 0: " if options else ""  # each of a run's histories has its options
        messages.append((type(error.value), str(error.value).removeprefix(place)))
    assert messages[0] == messages[1]
    assert words in messages[0][1]


@pytest.mark.parametrize(
    ("histories", "options", "words"),
    [
        ([[]], {"n": 13}, "n 13"),
        ([[]], {"beam_width": 10**9}, "beam_width 1000000000"),
        ([[]], {"allowed": [1] * 65}, "allowed names 65 items"),
        ([[], "3"], {}, "history 1: a history is a list of items or actions, not 3"),
        ([3], {}, "users of a data set are not exported"),
        ("3", {}, "histories is a list"),
    ],
)
def test_what_was_not_exported(exported, histories, options, words):
    with pytest.raises(InputError) as error:
        exported.recommend(histories, **options)
    assert words in str(error.value)


def test_bad_folders(recommender, folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="holds no exported model"):
        Exported.load(tmp_path)
    with pytest.raises(InputError, match="exists"):
        export_run(recommender, folder, CONFIG)
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "weights.npz"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(InputError, match="weights.npz is damaged"):
        Exported.load(copy)
    weights.unlink()
    with pytest.raises(InputError, match="holds no exported model"):
        Exported.load(copy)
    monkeypatch.setattr(module, "_platform", lambda: "tpu")
    with pytest.raises(InputError, match="this is tpu"):
        Exported.load(folder)
