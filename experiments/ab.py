"""An A/B test on the simulated platform: `python -m experiments.ab ARM ARM ...`.

Every arm goes on from the same log with the same users for so many days of theirs, in a closed
loop: what it shows is watched or not, and what was watched is the history of its next request.
Feedback is drawn with noise that belongs to (user, item, time), so that arms differ by what they
show.

An arm is `logging` (the policy that made the log), `oracle` (the platform's own expectation, over
all items), a run folder, or RUN+REWARD: the run's beams, of which a reward run chooses. `NAME=`
before the latter two gives them a short name.

    python -m experiments.ab logging pre=runs/pre post=runs/post select=runs/pre+runs/reward oracle
"""

import dataclasses
import json
import pathlib
import time
from typing import Annotated

import numpy as np
import polars as pl
import rich.console
import rich.table
import tyro

from onerec_jax import cli
from onerec_jax.data.batches import BatchBuilder
from onerec_jax.data.examples import Examples
from onerec_jax.data.features import action_log
from onerec_jax.data.schema import Dataset
from onerec_jax.data.world.loop import Log, Policy, Request
from onerec_jax.data.world.policy import LoggingPolicy
from onerec_jax.data.world.response import World, satisfaction
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.evaluation.closed_loop import METRICS, compare, play
from onerec_jax.files import write_text
from onerec_jax.generation.generator import compute_copy, drop_seen, expand_leaves
from onerec_jax.generation.selection import select
from onerec_jax.reward_run import RewardRun, open_reward
from onerec_jax.run import Run
from onerec_jax.sharding import make_mesh, put_batch


@dataclasses.dataclass(frozen=True)
class AbConfig:
    """Compare policies on the platform that made a run's log; the first arm is the base."""

    arms: Annotated[tuple[str, ...], tyro.conf.Positional]
    """logging, oracle, [NAME=]RUN or [NAME=]RUN+REWARD; a run must be among them."""
    days: float = 7.0
    """Of each user, from the first request after the log's end on."""
    room: int = 300
    """Most exposures of a user."""
    list_length: int = 10
    """Items of a slate."""
    beam_width: int = 64
    batch_size: int = 64
    """Users at once."""
    resamples: int = 2000
    """Bootstrap samples of the users."""
    out: pathlib.Path = pathlib.Path("runs/ab.json")
    """JSON to write."""

    def __post_init__(self):
        require_at_least(
            self, "", days=0.01, room=1, list_length=1, beam_width=1, batch_size=1, resamples=1
        )
        if len(self.arms) < 2:
            raise InputError("give two arms or more: they are compared with the first")


# ------------------------------------------------------------------------------------- policies


def actions_of(log: Log, dataset: Dataset) -> Dataset:
    """The data set with the log as it is now."""
    table = log.table()
    user = table.pop("user")
    position = np.arange(len(user)) - (np.cumsum(log.length) - log.length)[user]
    frame = pl.DataFrame(
        {"user_row": user, "item_row": table.pop("item"), "position": position, **table}
    )
    return dataclasses.replace(dataset, interactions=frame)


@dataclasses.dataclass(eq=False)
class RunPolicy:
    """The beams of a run; with a reward, their items by its score. Nothing is shown twice."""

    run: Run
    config: AbConfig
    reward: RewardRun | None = None

    def __post_init__(self):
        config = self.config
        self.generator = self.run.generator(
            make_mesh(data=1), beam_width=config.beam_width, batch_size=config.batch_size
        )
        self.variables = compute_copy(self.run.model(), self.run.load_best())
        if self.reward is not None:
            self.scorer = self.reward.scorer(users=config.batch_size)

    def __call__(self, users: np.ndarray, log: Log, request: Request) -> np.ndarray:
        run, config = self.run, self.config
        now = actions_of(log, run.dataset)
        builder = BatchBuilder(
            action_log(now, run.spec), run.builder.items, run.model_config, run.builder.lives
        )
        position, n = log.length[users], config.list_length
        leaves = []
        for start in range(0, len(users), config.batch_size):
            part = slice(start, start + config.batch_size)
            leaves.append(self._leaves(builder, users[part], position[part], request.time_s[part]))
        leaf = np.concatenate(leaves)
        seen = [log.history(user)["item"] for user in users]
        # Of one length, whatever the beams: the score compiles once.
        longest = max(len(items) for items in seen) if self.reward is None else 0
        lists = expand_leaves(
            leaf, self.generator.offsets, self.generator.items, 2 * config.beam_width + longest
        )
        if self.reward is None:
            lists = drop_seen(lists, seen, n)
        else:
            scorer = self.scorer.over(action_log(now, self.reward.spec))
            examples = Examples(users.astype(np.int32), position.astype(np.int32))
            lists = select(
                lists, examples, lambda who, items: scorer(who, items, request.time_s)["p"], n,
                seen=seen,
            )  # fmt: skip
        return filled(lists, seen, run.popular)

    def _leaves(self, builder, users, position, time_s):
        """Best beams of users, padded to one shape."""
        size = self.config.batch_size
        full = np.resize(np.arange(len(users)), size)
        batch = builder(users[full], position[full], time_s[full])
        found = self.generator.search(
            self.variables, put_batch(batch, self.generator.mesh), trie=self.generator.trie
        )
        return np.asarray(found.leaf)[: len(users)]


def filled(lists: np.ndarray, seen, popular: np.ndarray) -> np.ndarray:
    """Lists whose missing places hold popular items that are neither seen nor listed."""
    lists = lists.copy()
    for row, known in zip(lists, seen, strict=True):
        missing = np.flatnonzero(row < 0)
        if len(missing):
            others = popular[~np.isin(popular, np.concatenate([known, row]))]
            row[missing] = np.resize(others if len(others) else popular, len(missing))
    return lists


def oracle_policy(world: World, n: int) -> Policy:
    """What satisfies most by the world's own expectation, of all items that were not seen."""
    items = np.arange(world.config.items)

    def policy(users, log, request):
        lists = []
        for i, user in enumerate(users):
            situation = (request.session[i], request.slot[i], request.time_s[i])
            worth = satisfaction(world.expected(user, items, *situation))
            fresh = np.where(np.isin(items, log.history(user)["item"]), -np.inf, worth)
            lists.append(np.argsort(-fresh, kind="stable")[:n])
        return np.array(lists, np.int32)

    return policy


# ----------------------------------------------------------------------------------------- test


def parse_arms(config: AbConfig) -> dict[str, list[pathlib.Path]]:
    """Folders by the arm's name; none for `logging` and `oracle`."""
    arms = {}
    for text in config.arms:
        name, _, rest = text.rpartition("=")
        folders = [] if text in ("logging", "oracle") else rest.split("+")
        if len(folders) > 2:
            raise InputError(f"{text}: an arm is RUN or RUN+REWARD")
        name = name or text
        if name in arms:
            raise InputError(f"two arms are called {name}: put NAME= before one")
        arms[name] = [pathlib.Path(folder) for folder in folders]
    if not any(arms.values()):
        raise InputError("no arm is a run: one must say which platform and log are meant")
    return arms


def make_policies(config: AbConfig) -> tuple[dict[str, Policy], World, Dataset]:
    """Every arm's policy; the platform and the log that all go on from."""
    arms = parse_arms(config)
    runs = {folders[0]: Run.open(folders[0]) for folders in arms.values() if folders}
    base = next(iter(runs.values()))
    world = World.from_meta(base.dataset.meta)
    if (base.dataset.num_users, base.dataset.num_items) != (world.config.users, world.config.items):
        raise InputError(f"{base.folder}: its data set has lost users or items of the platform")
    for folder, run in runs.items():
        if run.dataset.fingerprint != base.dataset.fingerprint:
            raise InputError(f"{folder} is of another data set than {base.folder}: compare within")
    policies = {}
    for name, folders in arms.items():
        if not folders:
            logging = name == "logging"
            policies[name] = (
                LoggingPolicy(world) if logging else oracle_policy(world, config.list_length)
            )
            continue
        run = runs[folders[0]]
        reward = open_reward(folders[1], run) if len(folders) > 1 else None
        policies[name] = RunPolicy(run, config, reward)
    return policies, world, base.dataset


def show(result: dict) -> None:
    """One table: means of the base, and what each other arm changes in per cent."""
    (base, first), *others = result.items()
    table = rich.table.Table(title=f"change over {base} in %, 95% interval over users")
    for i, name in enumerate(("a user", base, *(name for name, _ in others))):
        table.add_column(name, justify="right" if i else "left")
    for metric, label in METRICS.items():
        cells = [f"{first[metric]['mean']:.4g}"]
        for _, arm in others:
            row = arm[metric]
            scale = 100 / row["base"] if row["base"] else float("nan")
            low, high = (scale * x for x in row["ci95"])
            cells.append(f"{scale * row['difference']:+.1f} \\[{low:+.1f}, {high:+.1f}]")
        table.add_row(label, *cells)
    rich.console.Console(soft_wrap=True, highlight=False).print(table)


def main(config: AbConfig) -> None:
    """Play every arm, compare, write."""
    policies, world, dataset = make_policies(config)
    flagged = dataset.items["viral_farm"].fill_null(0).to_numpy().astype(float)
    values = {}
    for name, policy in policies.items():
        start = time.perf_counter()
        values[name] = play(
            policy, world, dataset, days=config.days, room=config.room, flagged=flagged
        )
        seconds = time.perf_counter() - start
        print(f"{name}: {values[name]['views'].sum():,.0f} exposures, {seconds:.0f} s")
    result = compare(values, config.resamples)
    show(result)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(config) | {"out": str(config.out)}
    write_text(config.out, json.dumps({"settings": settings, "arms": result}, indent=1))
    print(f"written to {config.out}")


if __name__ == "__main__":
    cli.run(main, AbConfig, prog="python -m experiments.ab")
