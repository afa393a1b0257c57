"""The run folder that all tests of serving share, and a server of it."""

import pathlib
import shutil

import pytest
from serving_world import make_run, running

from onerec_jax.serving.recommender import Recommender


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> pathlib.Path:
    """The run folder. Nobody may change it: see `copied`."""
    return make_run(tmp_path_factory.mktemp("served"))


@pytest.fixture
def copied(served, tmp_path) -> pathlib.Path:
    """A copy of the run folder, to be changed or damaged."""
    return pathlib.Path(shutil.copytree(served, tmp_path / "run"))


@pytest.fixture(scope="session")
def recommender(served) -> Recommender:
    return Recommender.load(served)


@pytest.fixture(scope="session")
def server(served):
    with running(served) as server:
        yield server
