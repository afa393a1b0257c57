"""A run folder: created once, continued by the same settings, opened only if all is as it was."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from helpers import full_dataset, random_ids, tiny_config

from onerec_jax.data.features import build_feature_spec
from onerec_jax.data.schema import load_dataset, save_dataset
from onerec_jax.data.splits import make_split
from onerec_jax.errors import InputError
from onerec_jax.inputs import PositiveRule
from onerec_jax.run import Run, settings_hash
from onerec_jax.tokenizer.semantic_ids import SemanticIds

SETTINGS = {
    "preset": "tiny",
    "seed": 0,
    "model": dataclasses.asdict(tiny_config()),
    "train": {"steps": 60, "patience": 2},
}


class Place:
    """A data set and semantic IDs on disk, and runs made from them."""

    def __init__(self, folder):
        self.folder = folder
        save_dataset(full_dataset(), folder / "data")
        self.dataset = load_dataset(folder / "data")
        ids = random_ids(self.dataset.num_items)
        manifest = ids.manifest | {"dataset_fingerprint": self.dataset.fingerprint}
        dataclasses.replace(ids, manifest=manifest).save(folder / "ids")

    def create(self, name="run", command="pretrain --again", **changes):
        ids = SemanticIds.load(self.folder / "ids")
        split = make_split(self.dataset)
        return Run.create(
            self.folder / name,
            settings=SETTINGS | changes,
            command=command,
            data_folder=self.folder / "data",
            ids_folder=self.folder / "ids",
            dataset=self.dataset,
            ids=ids,
            spec=build_feature_spec(self.dataset, split, ids, PositiveRule()),
        )


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_create_then_open(place):
    made = place.create()
    opened = Run.open(made.folder)
    assert opened.config == json.loads(json.dumps(made.config))
    assert opened.spec == made.spec
    assert opened.model_config == tiny_config()
    assert opened.dataset.fingerprint == place.dataset.fingerprint
    np.testing.assert_array_equal(opened.ids.sids, made.ids.sids)
    one = np.zeros(2, np.int32)
    assert opened.builder(one, one).target.shape == (2, 1, 3)
    assert opened.model().train is False
    assert opened.model(train=True).train is True
    assert sorted(opened.tie_order) == list(range(place.dataset.num_items))
    train_actions = int(make_split(place.dataset).train_end.sum())
    assert opened.popularity.sum() == train_actions


def test_the_same_settings_go_on(place):
    """Another command line and moved folders are no other settings."""
    made = place.create()
    before = (made.folder / "config.json").read_bytes()
    place.create(command="pretrain --mesh.data 4")
    place.folder.joinpath("data").rename(place.folder / "moved")
    (place.folder / "moved").rename(place.folder / "data")
    place.create()
    assert (made.folder / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, ["seed", "0 there", "1 now"]),
        ({"model": SETTINGS["model"] | {"d_model": 32}}, ["model.d_model", "16", "32"]),
        ({"extra": True}, ["extra", "None there", "True now"]),
        ({"train": {"steps": 60}}, ["train.patience", "2 there", "None now"]),
    ],
)
def test_other_settings_are_refused(place, changes, words):
    made = place.create()
    before = {p.name: p.read_bytes() for p in made.folder.iterdir() if p.is_file()}
    with pytest.raises(InputError) as error:
        place.create(**changes)
    for word in [*words, "--run", str(made.folder)]:
        assert word in str(error.value)
    assert {p.name: p.read_bytes() for p in made.folder.iterdir() if p.is_file()} == before


def test_other_data_is_refused(place):
    place.create()
    save_dataset(full_dataset(seed=1), place.folder / "data", overwrite=True)
    place.dataset = load_dataset(place.folder / "data")
    with pytest.raises(InputError, match="data.fingerprint"):
        place.create()
    with pytest.raises(InputError, match="has changed since") as error:
        Run.open(place.folder / "run")
    assert str(place.folder / "data") in str(error.value)


def test_other_semantic_ids_are_refused(place):
    place.create()
    other = random_ids(place.dataset.num_items, seed=1)
    other.save(place.folder / "ids")
    with pytest.raises(InputError, match="semantic_ids.fingerprint"):
        place.create()
    with pytest.raises(InputError, match="ids has changed since"):
        Run.open(place.folder / "run")


def test_what_is_no_run(place, tmp_path):
    with pytest.raises(InputError, match="no run folder"):
        Run.open(tmp_path / "nowhere")
    folder = place.create().folder
    text = (folder / "config.json").read_text()
    for damaged in ("", "{", "[]", '"run"', '{"data": 3}', '{"data": {"folder": "x"}}'):
        (folder / "config.json").write_text(damaged)
        with pytest.raises(InputError, match="no run folder"):
            Run.open(folder)
    (folder / "config.json").write_text(text)
    for damaged in ("", "{}", "[1]"):
        (folder / "features.json").write_text(damaged)
        with pytest.raises(InputError, match="no run folder"):
            Run.open(folder)


class FakeCheckpoints:
    """What a run knows of its progress."""

    def __init__(self, latest, **progress):
        self.latest, self.progress = latest, progress

    def load_note(self, step=None):
        return {"progress": self.progress}


@pytest.mark.parametrize(
    ("checkpoints", "finished", "best"),
    [
        (FakeCheckpoints(None), False, None),
        (FakeCheckpoints(7, waited=0, best_step=0), False, None),  # saved by Ctrl-C
        (FakeCheckpoints(40, waited=1, best_step=20), False, 20),
        (FakeCheckpoints(40, waited=2, best_step=20), True, 20),  # stopped early
        (FakeCheckpoints(60, waited=0, best_step=60), True, 60),
    ],
)
def test_finished_and_best(place, checkpoints, finished, best):
    run = place.create()
    (run.folder / "checkpoints").mkdir()
    run.__dict__["checkpoints"] = checkpoints
    assert run.finished == finished
    if best is None:
        with pytest.raises(InputError, match="pretrain --again"):
            _ = run.best_step
    else:
        assert run.best_step == best


def test_patience_zero_never_stops_early(place):
    run = place.create(train={"steps": 60, "patience": 0})
    (run.folder / "checkpoints").mkdir()
    run.__dict__["checkpoints"] = FakeCheckpoints(40, waited=9, best_step=20)
    assert not run.finished


def test_settings_hash():
    a = {"x": 1, "y": {"z": [1, 2]}, "path": pathlib.Path("p")}
    assert settings_hash(a) == settings_hash(dict(reversed(a.items())))
    assert settings_hash(a) != settings_hash(a | {"x": 2})
    assert len(settings_hash(a)) == 6


def test_a_run_killed_before_its_config_was_written_starts_again(place):
    """A folder with anything of somebody else's is left alone."""
    run = place.create()
    (run.folder / "config.json").unlink()
    assert place.create().folder == run.folder
    (run.folder / "config.json").unlink()
    (run.folder / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is no run folder"):
        place.create()
    assert not (run.folder / "config.json").exists()


def test_a_folder_that_cannot_be_made_is_one_line(place):
    (place.folder / "file").write_text("")
    with pytest.raises(InputError, match="file/run cannot be written .Not a directory."):
        place.create(name="file/run")


def test_a_damaged_config_is_one_line(place):
    (place.create().folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json is damaged"):
        place.create()
