"""Recommendations of a finished run: in words for one user, or as a table for many.

    python -m experiments.recommend RUN --user 42
    python -m experiments.recommend RUN --history 31,7,12
    python -m experiments.recommend RUN --users users.txt --out lists.parquet

A killed batch goes on where it was when the same command is given again.
"""

import dataclasses
import pathlib
from typing import Annotated

import numpy as np
import rich.console
import rich.table
import tyro

from onerec_jax import cli
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.serving.bulk import BulkConfig, recommend_to_file
from onerec_jax.serving.catalogue import Catalogue
from onerec_jax.serving.recommender import Recommended, Recommender
from onerec_jax.serving.session_lists import recommend_lists
from onerec_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class RecommendConfig:
    """Recommend items to users of a finished run."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """Run folder."""
    user: str | None = None
    """User id of the data set; the whole log of the user is the history."""
    history: str | None = None
    """Item ids, oldest first, separated by commas: a history of your own."""
    users: pathlib.Path | None = None
    """File of user ids: .txt, one a line; .parquet or .csv with a column user_id. "all": everyone
    of the data set."""
    out: pathlib.Path | None = None
    """Parquet file to write for --users: user_id, place, item_id, logp, semantic_id."""
    skip_unknown: bool = False
    """Leave out ids of --users that the data set lacks, and say how many."""
    n: int = 10
    """Items to return."""
    beam_width: int = 64
    include_seen: bool = False
    """Recommend items of the history too."""
    batch_size: int = 256
    """Users at once, of --users."""
    filter_size: int = 1024
    """Seen items that the search of --users leaves out; of longer histories the rest is dropped
    from the list, which may come short."""
    lists: bool = False
    """Of a run with --targets sessions: show its most probable whole list, not the n items that are
    most probable as the first of one."""
    devices: int = 1
    """That share the users of a batch; 0: all."""

    def __post_init__(self):
        require_at_least(self, "", n=1, beam_width=1, batch_size=1, devices=0, filter_size=1)
        if sum(x is not None for x in (self.user, self.history, self.users)) != 1:
            raise InputError("give one of --user ID, --history ID,ID,… and --users FILE")
        if (self.users is None) != (self.out is None):
            raise InputError("--users and --out belong together: give both or neither")
        if self.skip_unknown and self.users is None:
            raise InputError("--skip-unknown is of --users: leave it out")
        if self.lists and self.users is not None:
            raise InputError("--lists is for one --user or --history: leave it out")
        if self.out is not None and self.out.suffix != ".parquet":
            raise InputError(f"--out {self.out}: lists are written as .parquet: name it so")


def split_ids(text: str) -> list[str]:
    """Item ids between commas."""
    ids = [part.strip() for part in text.split(",")]
    if not all(ids):
        raise InputError(f"--history '{text}' has an empty id: give item ids between single commas")
    return ids


def show(catalogue: Catalogue, history: np.ndarray, listed: list[Recommended]) -> None:
    """Print the latest actions and the recommendations."""
    console = rich.console.Console(soft_wrap=True, highlight=False, markup=False)
    latest = [catalogue.title(row) for row in history[-5:]]
    console.print(f"history, {len(history)} actions, … " + " | ".join(latest))
    table = rich.table.Table()
    for name in ("", "item", "id", "semantic ID", "log P"):
        table.add_column(name, justify="right" if name in ("", "log P") else "left")
    for place, item in enumerate(listed, 1):
        sid = "-".join(map(str, item.semantic_id))
        table.add_row(f"{place}", item.title, f"{item.item_id}", sid, f"{item.logp:.2f}")
    console.print(table)


def main(config: RecommendConfig) -> None:
    """Recommend to one user, or to many."""
    recommender = Recommender.load(config.run, mesh=make_mesh(data=config.devices))
    options = {
        "n": config.n,
        "beam_width": config.beam_width,
        "include_seen": config.include_seen,
    }
    if config.users is not None:
        sizes = {"batch_size": config.batch_size, "filter_size": config.filter_size}
        bulk = BulkConfig(**options, **sizes)
        recommend_to_file(
            recommender, config.users, config.out, bulk, skip_unknown=config.skip_unknown
        )
        return
    history = config.user if config.history is None else split_ids(config.history)
    try:
        query = recommender.query(history, **options)
    except InputError as error:
        flag = "--user" if config.history is None else "--history"
        raise InputError(f"{flag}: {error}") from error
    if config.lists:
        more = {"beam_width": config.beam_width, "include_seen": config.include_seen}
        (found,) = recommend_lists(recommender, [history], **more)
        listed = found.items
    else:
        (listed,) = recommender.recommend([history], **options)
    show(recommender.catalogue, query.history, listed)


if __name__ == "__main__":
    cli.run(main, RecommendConfig, prog="python -m experiments.recommend")
