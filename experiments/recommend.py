"""Recommendations in words: `python -m experiments.recommend RUN --user 42`."""

import dataclasses
import pathlib
from typing import Annotated

import numpy as np
import rich.console
import rich.table
import tyro

from onerec_jax import cli
from onerec_jax.data.batches import BatchBuilder, log_from_histories
from onerec_jax.data.examples import Examples
from onerec_jax.data.features import uncompressed
from onerec_jax.errors import InputError
from onerec_jax.generation.generator import drop_seen, expand_leaves
from onerec_jax.run import Run
from onerec_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class RecommendConfig:
    """Recommend items to one user of a finished run."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """Run folder."""
    user: str | None = None
    """User id of the data set; the whole log of the user is the history."""
    history: str | None = None
    """Item ids, oldest first, separated by commas: a history of your own."""
    n: int = 10
    """Items to return."""
    beam_width: int = 64
    include_seen: bool = False
    """Recommend items of the history too."""


def row_of(values, wanted: str, what: str, flag: str) -> int:
    """Row of an id, whatever its type in the table."""
    found = np.flatnonzero(values.cast(str).to_numpy() == wanted.strip())
    if not len(found):
        raise InputError(f"{flag}: the data set has no {what} '{wanted.strip()}'")
    return int(found[0])


def split_ids(text: str) -> list[str]:
    """Item ids between commas."""
    ids = [part.strip() for part in text.split(",")]
    if not all(ids):
        raise InputError(f"--history '{text}' has an empty id: give item ids between single commas")
    return ids


class Recommender:
    """A loaded model and its compiled search, for one user at a time."""

    def __init__(self, run: Run, *, beam_width: int):
        self.run, self.variables = run, run.load_best()
        self.generator = run.generator(make_mesh(data=1), beam_width=beam_width, batch_size=1)

    def __call__(self, builder: BatchBuilder, user: int, position: int, *, n: int, seen=()):
        """Item rows and log-probabilities of their IDs, best first, at most n of each.

        The history is the first `position` actions of `user` in the builder's log; items in `seen`
        are left out, so a list is shorter than n if the beams hold too few others.
        """
        example = Examples(np.array([user], np.int32), np.array([position], np.int32))
        (beams,) = self.generator.beams(self.variables, builder, example)
        lists = expand_leaves(
            beams.leaf, self.generator.offsets, self.generator.items, n + len(seen)
        )
        (items,) = drop_seen(lists, [seen], n)
        items = items[items >= 0]
        logp = dict(zip(beams.leaf[0].tolist(), beams.logp[0].tolist(), strict=True))
        return items, [logp[int(self.run.ids.leaf_of_item[item])] for item in items]


def describe(run: Run, row: int) -> tuple[str, str]:
    """Id and title of an item."""
    item = run.dataset.items.row(int(row), named=True)
    return str(item["item_id"]), item.get("title") or f"item {item['item_id']}"


def show(run: Run, history, items, logp) -> None:
    """Print the latest actions and the recommendations."""
    console = rich.console.Console(soft_wrap=True, highlight=False, markup=False)
    latest = [describe(run, row)[1] for row in history[-5:]]
    console.print(f"history, {len(history)} actions, … " + " | ".join(latest))
    table = rich.table.Table()
    for name in ("", "item", "id", "semantic ID", "log P"):
        table.add_column(name, justify="right" if name in ("", "log P") else "left")
    for place, (row, value) in enumerate(zip(items, logp, strict=True)):
        item_id, title = describe(run, row)
        sid = "-".join(map(str, run.ids.sids[row]))
        table.add_row(f"{place + 1}", title, item_id, sid, f"{value:.2f}")
    console.print(table)


def main(config: RecommendConfig) -> None:
    """Recommend to one user."""
    if (config.user is None) == (config.history is None):
        raise InputError("give either --user ID or --history ID,ID,…")
    if min(config.n, config.beam_width) < 1:
        raise InputError(f"--n {config.n} and --beam-width {config.beam_width} must be positive")
    run = Run.open(config.run)
    if config.history is not None:
        ids = run.dataset.items["item_id"]
        rows = [row_of(ids, text, "item", "--history") for text in split_ids(config.history)]
        log = log_from_histories([rows], run.spec)
        lives = uncompressed(log) if run.spec.clustered else None
        builder = BatchBuilder(log, run.builder.items, run.model_config, lives)
        user, position = 0, len(rows)
    else:
        builder = run.builder
        user = row_of(run.dataset.users["user_id"], config.user, "user", "--user")
        position = int(np.diff(run.dataset.offsets)[user])
    first = builder.log.offsets[user]
    history = builder.log.item[first : first + position]
    seen = () if config.include_seen else history
    recommender = Recommender(run, beam_width=config.beam_width)
    show(run, history, *recommender(builder, user, position, n=config.n, seen=seen))


if __name__ == "__main__":
    cli.run(main, RecommendConfig, prog="python -m experiments.recommend")
