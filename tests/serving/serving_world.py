"""A run folder made in no time: random data with every feature, random weights, a checkpoint."""

import contextlib
import dataclasses
import pathlib
import threading
import time

import helpers
import httpx
import jax
import numpy as np
import polars as pl

from onerec_jax.data.features import build_feature_spec
from onerec_jax.data.schema import Dataset, load_dataset, save_dataset
from onerec_jax.data.splits import make_split
from onerec_jax.inputs import PositiveRule
from onerec_jax.run import Run
from onerec_jax.serving.config import HttpConfig, ServiceConfig
from onerec_jax.serving.server import Server
from onerec_jax.serving.service import Service
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.training.step import TrainState

USERS, ITEMS = 7, 30
SETTINGS = {
    "preset": "tiny",
    "seed": 0,
    "model": dataclasses.asdict(helpers.tiny_config(num_experts=4, decoder_layers=1)),
    "train": {"steps": 9, "patience": 0},
}

BAD_QUESTIONS = [
    ([1, 999], {}, "no item '999'"),
    ([1, "\ud800\n"], {}, "no item '\\ud800\\n'"),
    ([True], {}, "not bool"),
    ([None], {}, "not NoneType"),
    ([{"rating": 3}], {}, "not NoneType"),
    ([{"item_id": 3, "stars": 3}], {}, "action 0 of the history: stars"),
    ([{"item_id": 3, "follow": 1}], {}, "follow: the model knows time_s, rating"),
    ([3, {"item_id": 3, "rating": float("nan")}], {}, "action 1 of the history: rating"),
    ([{"item_id": 3, "like": 2}], {}, "like is '2': give 0 or 1"),
    ([{"item_id": 3, "time_s": 1.5}], {}, "time_s"),
    ([{"item_id": 3, "time_s": -1}], {}, "time_s"),
    ([{"item_id": 3, "time_s": float("nan")}], {}, "time_s"),
    ([{"item_id": 3, "time_s": 5}, 3], {}, "action 1 of the history has no time_s"),
    ([{"item_id": 3, "time_s": 5}, {"item_id": 3, "time_s": 4}], {}, "order of time_s"),
    ([], {"n": 0}, "n is 0"),
    ([], {"n": -1}, "n is -1"),
    ([], {"n": 2.0}, "n is 2.0"),
    ([], {"n": True}, "n is True"),
    ([], {"beam_width": 0}, "beam_width is 0"),
    ([], {"beam_width": "8"}, "beam_width is 8"),
    ([], {"request_time_s": -5}, "request_time_s is -5"),
    ([], {"exclude": [999]}, "no item '999'"),
    ([], {"allowed": ["x"]}, "no item 'x'"),
    ([{"item_id": 3, "a\nb": 3}], {}, "a\\nb: the model knows"),
    ([{"item_id": 3, "rating": "5"}], {}, "rating is '5': give a number"),
    ([{"item_id": 3, "playtime_s": -1}], {}, "playtime_s is '-1': give seconds"),
    ([{"item_id": 3, "time_s": 10**400}], {}, "time_s"),
    ([], {"n": "1\n"}, "n is 1\\n"),
    ([], {"exclude": "12"}, "exclude is 12: give a list of ids"),
]
"""History, options, and words of what a run and its export say of them."""


def titled(dataset: Dataset) -> Dataset:
    """The data set with titles: "Item 07", every fifth without one, one with markup in it."""
    titles = [f"Item {row:02}" if row % 5 else None for row in range(dataset.num_items)]
    titles[1] = "<b>Bold</b> & \u201cquoted\u201d"
    items = dataset.items.with_columns(pl.Series("title", titles))
    return dataclasses.replace(dataset, items=items)


def save_checkpoint(run: Run, step: int, seed: int, change=jax.numpy.asarray) -> None:
    """Random weights as the best of a training that has come to `step`."""
    one = np.zeros(1, np.int32)
    drawn = helpers.random_variables(run.model(), run.builder(one, one), seed=seed)
    variables = jax.tree.map(change, dict(drawn))
    state = TrainState(
        jax.numpy.int32(step), variables["params"], variables.get("router", {}), {"count": 0}
    )
    run = dataclasses.replace(run, training=True)
    note = {"progress": {"best_step": step, "waited": 0}}
    run.checkpoints.save(state, note=note, score=float(step))
    run.checkpoints.close()


def make_run(folder: pathlib.Path) -> pathlib.Path:
    save_dataset(titled(helpers.full_dataset(users=USERS, items=ITEMS)), folder / "data")
    dataset = load_dataset(folder / "data")
    ids = helpers.random_ids(dataset.num_items)
    ids.manifest["dataset_fingerprint"] = dataset.fingerprint
    ids.save(folder / "ids")
    ids = SemanticIds.load(folder / "ids")
    spec = build_feature_spec(dataset, make_split(dataset), ids, PositiveRule())
    run = Run.create(
        folder / "run",
        settings=SETTINGS,
        command="python -m experiments.pretrain",
        data_folder=folder / "data",
        ids_folder=folder / "ids",
        dataset=dataset,
        ids=ids,
        spec=spec,
    )
    save_checkpoint(run, 3, seed=0)
    return folder / "run"


def grow(folder, run, *, codebooks=None, new_ids=True):
    """The data set with three items and an author more, and semantic IDs for it.

    Without `new_ids` the new items share those of others: the trie stays, nothing is compiled.
    """
    items = run.dataset.table("items")
    new = items.tail(3).with_columns(pl.col("item_id") + 100, author_id=pl.lit("Aaron"))
    grown = dataclasses.replace(run.dataset, items=pl.concat([items, new]))
    save_dataset(grown, folder / "data")
    dataset = load_dataset(folder / "data")
    sids = np.concatenate([run.ids.sids, (run.ids.sids[:3] + new_ids) % 5])
    manifest = run.ids.manifest | {"dataset_fingerprint": dataset.fingerprint}
    books = run.ids.codebooks if codebooks is None else codebooks
    SemanticIds(sids, books, manifest).save(folder / "ids")
    return folder / "data", folder / "ids"


SERVICE = ServiceConfig(widths=(4, 12), users=(4,), max_n=10, max_history=50, wait_ms=2)


@contextlib.contextmanager
def running(folder, service=SERVICE, http=HttpConfig(port=0)):  # noqa: B008
    """A server in a thread of this process, ready; stopped as by SIGTERM."""
    said = []
    server = Server(Service(folder, service, say=said.append), http)
    server.said = said
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while server.service.recommender is None and thread.is_alive():
            time.sleep(0.01)
        assert thread.is_alive(), server.failure
        with httpx.Client(base_url=server.url, timeout=30) as client:
            server.client = client
            yield server
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
