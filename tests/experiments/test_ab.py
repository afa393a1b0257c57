"""`python -m experiments.ab`: the closed loop of several arms on one small platform."""

import dataclasses
import json

import helpers
import jax
import numpy as np
import pytest
from conftest import quick_compilation

from experiments import ab
from onerec_jax.data.features import build_feature_spec
from onerec_jax.data.schema import load_dataset, save_dataset
from onerec_jax.data.sources.world import read_world
from onerec_jax.data.splits import make_split
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.data.world.loop import Log
from onerec_jax.data.world.response import World
from onerec_jax.errors import InputError
from onerec_jax.inputs import PositiveRule
from onerec_jax.run import Run
from onerec_jax.training.step import TrainState

USERS, ITEMS = 20, 100
CONFIG = ab.AbConfig(("logging", "oracle"), days=3, room=30, list_length=3, batch_size=8)


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    """A world, its data set, and a folder with a run of random weights in `run`."""
    folder = tmp_path_factory.mktemp("ab")
    with quick_compilation():
        save_dataset(read_world(WorldConfig(users=USERS, items=ITEMS, actions=20)), folder / "data")
        dataset = load_dataset(folder / "data")
        ids = helpers.random_ids(ITEMS)
        manifest = ids.manifest | {"dataset_fingerprint": dataset.fingerprint}
        ids = dataclasses.replace(ids, manifest=manifest)
        ids.save(folder / "ids")
        model = helpers.tiny_config(num_experts=0, decoder_layers=1, lifelong_length=0)
        run = Run.create(
            folder / "run",
            settings={
                "preset": "tiny",
                "seed": 0,
                "model": dataclasses.asdict(model),
                "train": {"steps": 1, "patience": 0},
            },
            command="python -m experiments.pretrain",
            data_folder=folder / "data",
            ids_folder=folder / "ids",
            dataset=dataset,
            ids=ids,
            spec=build_feature_spec(dataset, make_split(dataset), ids, PositiveRule()),
        )
        drawn = jax.tree.map(
            jax.numpy.asarray, dict(helpers.random_variables(run.model(), run.example))
        )
        state = TrainState(jax.numpy.int32(1), drawn["params"], {}, {"count": 0})
        note = {"progress": {"best_step": 1, "waited": 0}}
        run.checkpoints.save(state, note=note, score=1.0)
        run.checkpoints.close()
    return World.from_meta(dataset.meta), dataset, folder


def test_the_log_goes_on_from_where_it_ended(platform):
    _, dataset, _ = platform
    now = ab.actions_of(Log.from_dataset(dataset, 5), dataset)
    np.testing.assert_array_equal(now.offsets, dataset.offsets)
    for name in ("item_row", "user_row", "position", "time_s", "playtime_s", "like", "session"):
        np.testing.assert_array_equal(now.column(name), dataset.column(name))


def test_missing_places_hold_popular_items():
    lists = np.array([[5, -1, -1], [0, 1, 2]])
    found = ab.filled(lists, [np.array([7]), np.array([3])], np.array([7, 5, 2, 9]))
    np.testing.assert_array_equal(found, [[5, 2, 9], [0, 1, 2]])


def test_a_run_beside_the_oracle(platform, tmp_path, monkeypatch, capfd):
    """The oracle satisfies more than random weights; nothing is shown twice."""
    _, dataset, folder = platform
    slates = []
    fill = ab.filled

    def noted(lists, seen, popular):
        slates.extend((row, set(known.tolist())) for row, known in zip(lists, seen, strict=True))
        return fill(lists, seen, popular)

    monkeypatch.setattr(ab, "filled", noted)
    out = tmp_path / "ab.json"
    arms = (f"ours={folder / 'run'}", "oracle")
    ab.main(dataclasses.replace(CONFIG, arms=arms, room=12, beam_width=8, out=out))
    arms = json.loads(out.read_text())["arms"]
    assert list(arms) == ["ours", "oracle"]
    assert arms["oracle"]["long_view"]["difference"] > 0
    assert arms["ours"]["views"]["difference"] == 0
    assert slates
    for row, known in slates:
        listed = row[row >= 0].tolist()
        assert len(set(listed)) == len(listed)
        assert not set(listed) & known
    assert "watch time, s" in capfd.readouterr().out


def test_arms_that_fit_nothing(platform):
    _, _, folder = platform
    for message, arms in {
        "two arms or more": ("oracle",),
        "no arm is a run": ("oracle", "logging"),
        "two arms are called oracle": ("oracle", "oracle"),
        "is RUN or RUN\\+REWARD": ("oracle", "a+b+c"),
        "is no run folder": ("oracle", str(folder / "data")),
        "experiments.train_reward": ("oracle", f"{folder / 'run'}+{folder / 'run'}"),
    }.items():
        with pytest.raises(InputError, match=message):
            ab.make_policies(dataclasses.replace(CONFIG, arms=arms))
