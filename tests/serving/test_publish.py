"""`python -m experiments.publish RUN`: a newer catalogue for a run that is served."""

import pytest
import serving_world

from experiments import publish
from onerec_jax import cli
from onerec_jax.run import Run
from onerec_jax.serving.catalogue import CATALOGUE, open_for_serving


def run(*flags):
    cli.run(publish.main, publish.PublishConfig, argv=[str(flag) for flag in flags])


def test_it_is_served(copied, tmp_path, capsys):
    data, ids = serving_world.grow(tmp_path / "grown", Run.open(copied))
    run(copied, "--data", data, "--semantic-ids", ids)
    items = serving_world.ITEMS + 3
    said = capsys.readouterr().out
    assert said == (
        f"{copied} serves {data}: {items} items (+3 to the training), {serving_world.USERS} users "
        "(+0)\n"
    )
    assert open_for_serving(copied).dataset.num_items == items


def test_what_does_not_fit(copied, tmp_path, capsys):
    old = Run.open(copied)
    data, ids = serving_world.grow(tmp_path / "grown", old)
    nowhere = tmp_path / "nowhere"
    for folder, data_, ids_, words in (
        (copied, old.config["data"]["folder"], ids, "no semantic IDs of the items"),
        (copied, nowhere, ids, str(nowhere)),
        (copied, data, nowhere, str(nowhere)),
        (nowhere, data, ids, f"{nowhere} is no run folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(folder, "--data", data_, "--semantic-ids", ids_)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert words in error
    assert not (copied / CATALOGUE).exists()
