"""An A/B test on the simulated platform: `python -m experiments.ab ARM ARM ...`.

Every arm goes on from the same log with the same users for so many days of theirs, in a closed
loop: what it shows is watched or not, and what was watched is the history of its next request.
Feedback is drawn with noise that belongs to (user, item, time), so that arms differ by what they
show.

An arm is one of these; `NAME=` before it gives it a short name.

    logging         the policy that made the log
    oracle          the platform's own expectation, over all items
    RUN             a run's beams; of a run on session lists its most probable list
    RUN+REWARD      all items of its beams, of which a reward run chooses
    swing+REWARD    a cascade: recall by Swing, ranked by a reward run

RUN and REWARD are folders; several, by commas or a pattern, are the same arm under several seeds,
paired with those of the other arms in their order.

    python -m experiments.ab logging pre=runs/pre post=runs/post select=runs/pre+runs/reward \\
        cascade=swing+runs/reward oracle
    python -m experiments.ab pre='runs/pre-s*' post='runs/post-s*'
"""

import dataclasses
import functools
import glob
import json
import pathlib
import shlex
import sys
import time
from typing import Annotated, NamedTuple

import numpy as np
import rich.console
import rich.table
import tyro

from onerec_jax import cli
from onerec_jax.data.progress import Progress
from onerec_jax.data.schema import Dataset
from onerec_jax.data.world.loop import Policy
from onerec_jax.data.world.policy import LoggingPolicy
from onerec_jax.data.world.response import World
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.evaluation import ab_report
from onerec_jax.evaluation.cascade import SwingRecall
from onerec_jax.evaluation.closed_loop import METRICS, Metered, compare, mean_cost, play
from onerec_jax.files import write_text
from onerec_jax.generation.generator import Generator
from onerec_jax.policies import (
    CascadePolicy,
    Ranker,
    RunPolicy,
    SelectionPolicy,
    SessionPolicy,
    oracle_policy,
)
from onerec_jax.reward_run import RewardRun
from onerec_jax.run import Run
from onerec_jax.sharding import make_mesh

WORDS = ("logging", "oracle", "swing")
ARMS = "an arm is logging, oracle, RUN, RUN+REWARD or swing+REWARD"
"""Parts of an arm that are no folder."""


@dataclasses.dataclass(frozen=True)
class CascadeConfig:
    """Recall of the cascade."""

    number: int = 0
    """Items handed to the ranking model; 0: as many as the items of --beam-width beams are."""
    latest: int = 50
    """Positive actions of a user that recall starts from."""
    neighbours: int = 100
    """Swing neighbours kept of each item."""

    def __post_init__(self):
        require_at_least(self, "cascade.", number=0, latest=1, neighbours=1)


@dataclasses.dataclass(frozen=True)
class AbConfig:
    """Compare policies on the platform that made a run's log; the first arm is the base."""

    arms: Annotated[tuple[str, ...], tyro.conf.Positional]
    """logging, oracle, RUN, RUN+REWARD or swing+REWARD, each with NAME= before it if you like; one
    must name a run."""
    days: float = 7.0
    """Of each user, from the first request after the log's end on."""
    room: int = 300
    """Most exposures of a user."""
    list_length: int = 10
    """Items of a slate; of a run on session lists those of its lists."""
    beam_width: int = 64
    """Items, or lists, that a search holds."""
    cascade: CascadeConfig = CascadeConfig()
    batch_size: int = 64
    """Users at once."""
    resamples: int = 2000
    """Bootstrap samples of users and seeds."""
    out: pathlib.Path = pathlib.Path("runs/ab.json")
    """JSON to write; a report (.md) and a plot (.png) go beside it."""

    def __post_init__(self):
        require_at_least(
            self, "", days=0.01, room=1, list_length=1, beam_width=1, batch_size=1, resamples=1
        )
        if len(self.arms) < 2:
            raise InputError("give two arms or more: they are compared with the first")


# ----------------------------------------------------------------------------------------- arms


class Arm(NamedTuple):
    """One arm: words or folders joined by +, each of one seed or of several."""

    text: str
    parts: tuple[tuple[str, ...], ...]

    @property
    def seeds(self) -> int:
        return max(len(part) for part in self.parts)

    def of(self, seed: int) -> tuple[str, ...]:
        """The parts under one seed; a part of one seed goes with all of them."""
        return tuple(part[seed if len(part) > 1 else 0] for part in self.parts)


def parse_arms(config: AbConfig) -> dict[str, Arm]:
    """Arms by name.

    Raises:
      InputError: no such arm, two of one name, seeds that cannot be paired, or no run at all.
    """
    arms = {}
    for text in config.arms:
        name, _, rest = text.rpartition("=")
        name = name or text
        if name in arms:
            raise InputError(f"two arms are called {name}: put NAME= before one")
        arms[name] = Arm(text, tuple(_several(part, text) for part in rest.split("+")))
    numbers = {len(part): arm.text for arm in arms.values() for part in arm.parts if len(part) > 1}
    if len(numbers) > 1:
        few, many = sorted(numbers)[:2]
        raise InputError(
            f"{numbers[few]} has {few} seeds, {numbers[many]} {many}: they are paired, so give "
            "every arm one or the same number"
        )
    if all(part[0] in WORDS for arm in arms.values() for part in arm.parts):
        raise InputError("no arm is a run: one must say which platform and log are meant")
    return arms


def _several(part: str, text: str) -> tuple[str, ...]:
    """A part under all its seeds: by commas, or by a pattern of folders, sorted."""
    found = []
    for piece in part.split(","):
        matches = sorted(glob.glob(piece)) if set(piece) & set("*?[") else [piece]
        if not matches or not piece:
            raise InputError(f"{text}: there is no folder {piece!r}")
        found += matches
    return tuple(found)


class Platform:
    """Runs by folder, each opened once, what compiles for them, and the world that they share."""

    def __init__(self, config: AbConfig):
        self.config = config
        self._opened: dict[tuple[type[Run], str], Run] = {}
        self._beams: dict[str, RunPolicy] = {}
        self._lists: dict[str, SessionPolicy] = {}
        self._generators: dict[tuple, Generator] = {}

    def open(self, kind: type[Run], folder: str) -> Run:
        """Opens a run.

        Raises:
          InputError: none of that kind, or of another data set than the first.
        """
        if (kind, folder) not in self._opened:
            try:
                run = kind.open(pathlib.Path(folder))
            except InputError as error:
                if not pathlib.Path(folder).exists():
                    raise InputError(f"{folder}: no such run; {ARMS}") from error
                raise
            first = next(iter(self._opened.values()), run)
            if run.dataset.fingerprint != first.dataset.fingerprint:
                raise InputError(
                    f"{folder} is of another data set than {first.folder}: compare within"
                )
            self._opened[kind, folder] = run
        return self._opened[kind, folder]

    def beams(self, folder: str) -> RunPolicy:
        """The policy of a run; runs that differ in weights only share what is compiled."""
        if folder not in self._beams:
            run = self.open(Run, folder)
            self._beams[folder] = RunPolicy(
                run, self._generator(run), list_length=self.config.list_length
            )
        return self._beams[folder]

    def lists(self, folder: str) -> SessionPolicy:
        """The policy of a run on session lists, which shows whole lists.

        Raises:
          InputError: its lists are of another length than slates are.
        """
        if folder not in self._lists:
            run = self.open(Run, folder)
            items, asked = run.model_config.session_items, self.config.list_length
            if items != asked:
                raise InputError(
                    f"{folder} generates lists of {items} items, --list-length is {asked}: give "
                    f"--list-length {items}, for slates of all arms are alike"
                )
            self._lists[folder] = SessionPolicy(run, self._generator(run))
        return self._lists[folder]

    def _generator(self, run: Run) -> Generator:
        config = self.config
        alike = (run.model_config, run.spec, run.ids.fingerprint, run.tie_order.tobytes())
        if alike not in self._generators:
            self._generators[alike] = run.generator(
                make_mesh(data=1), beam_width=config.beam_width, batch_size=config.batch_size
            )
        return self._generators[alike]

    def ranker(self, folder: str) -> Ranker:
        """Ranks by a reward run."""
        config = self.config
        return Ranker(
            self.open(RewardRun, folder),
            list_length=config.list_length,
            batch_size=config.batch_size,
        )

    @property
    def dataset(self) -> Dataset:
        """Of the first run that was opened, as `world`."""
        return next(iter(self._opened.values())).dataset

    @functools.cached_property
    def world(self) -> World:
        world = World.from_meta(self.dataset.meta)
        size, found = world.config, (self.dataset.num_users, self.dataset.num_items)
        if found != (size.users, size.items):
            first = next(iter(self._opened.values()))
            raise InputError(
                f"{first.folder}: its data set has lost users or items of the platform"
            )
        return world


def make_policy(parts: tuple[str, ...], platform: Platform) -> Policy:
    """The policy of one arm under one seed.

    Raises:
      InputError: no such arm, or runs that do not fit.
    """
    match parts:
        case ("logging",):
            return LoggingPolicy(platform.world)
        case ("oracle",):
            return oracle_policy(platform.world, platform.config.list_length)
        case ("swing", reward):
            return cascade(platform.ranker(reward), platform.config)
        case (run,) if platform.open(Run, run).session_rule:
            return platform.lists(run)
        case (run,):
            return platform.beams(run)
        case (run, reward):
            platform.open(RewardRun, reward).check_items(platform.open(Run, run))
            return SelectionPolicy(platform.beams(run), platform.ranker(reward))
    raise InputError(f"{'+'.join(parts)}: {ARMS}")


def cascade(ranker: Ranker, config: AbConfig) -> CascadePolicy:
    """Recall from the log of the reward run that ranks."""
    reward, cfg = ranker.reward, config.cascade
    items = reward.dataset.num_items
    recall = SwingRecall.fit(
        reward.dataset,
        reward.split,
        reward.spec.positive,
        reward.popular,
        neighbours=cfg.neighbours,
    )
    number = cfg.number or round(config.beam_width * items / len(reward.ids.leaf_sids))
    return CascadePolicy(recall, ranker, number=min(number, items), latest=cfg.latest)


def make_policies(config: AbConfig) -> tuple[dict[str, list[Policy]], World, Dataset]:
    """Every arm's policies, one a seed; the platform and the log that all go on from."""
    arms, platform, made = parse_arms(config), Platform(config), {}
    # Runs come first: they say which platform is meant.
    for name in sorted(arms, key=lambda name: arms[name].parts[-1][0] in WORDS):
        arm = arms[name]
        made[name] = [make_policy(arm.of(seed), platform) for seed in range(arm.seeds)]
    return {name: made[name] for name in arms}, platform.world, platform.dataset


# ----------------------------------------------------------------------------------------- test


def play_arm(name: str, policies: list[Policy], world, dataset, config: AbConfig) -> tuple:
    """METRICS of all seeds, float64 `[S, U]`, and the mean cost."""
    flagged = dataset.items["viral_farm"].fill_null(0).to_numpy().astype(float)
    values, costs = [], []
    with Progress(rich.console.Console(soft_wrap=True)) as progress:
        for seed, policy in enumerate(policies):
            stage = f"{name}, {seed + 1} of {len(policies)}" if len(policies) > 1 else name

            def say(share, exposures, stage=stage):
                progress(stage, round(1000 * share), 1000, exposures)

            policy = Metered(policy, config.batch_size)
            values.append(
                play(
                    policy,
                    world,
                    dataset,
                    days=config.days,
                    room=config.room,
                    flagged=flagged,
                    say=say,
                )
            )
            costs.append(policy.cost)
    return {metric: np.stack([v[metric] for v in values]) for metric in METRICS}, mean_cost(costs)


def show(header, rows, title: str) -> None:
    table = rich.table.Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    rich.console.Console(soft_wrap=True, highlight=False).print(table)


def main(config: AbConfig) -> None:
    """Play every arm, compare, write."""
    policies, world, dataset = make_policies(config)
    values, costs = {}, {}
    for name, seeds in policies.items():
        start = time.perf_counter()
        values[name], costs[name] = play_arm(name, seeds, world, dataset, config)
        seconds = time.perf_counter() - start
        print(f"{name}: {values[name]['views'].sum():,.0f} exposures, {seconds:.0f} s")
    result = compare(values, config.resamples)
    most = max(len(seeds) for seeds in policies.values())
    title = f"change over {config.arms[0].split('=')[0]} in %, 95% interval over users"
    title += f" and {most} seeds" if most > 1 else ""
    show(*ab_report.effect_rows(result), title)
    show(*ab_report.cost_rows(costs), f"cost of a million lists of {config.list_length}")
    write(config, result, costs, world)


def write(config: AbConfig, result: dict, costs: dict, world: World) -> None:
    """The JSON, and beside it the report and the plot."""
    config.out.parent.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(config) | {"out": str(config.out)}
    record = {"settings": settings, "arms": result, "costs": costs}
    write_text(config.out, json.dumps(record, indent=1))
    plot = config.out.with_suffix(".png")
    ab_report.draw(plot, result)
    note = (
        f"World {world.config.name} ({world.fingerprint}), {world.config.users} users, "
        f"{config.days:g} days of each. In brackets 95% intervals over users and seeds, paired; "
        f"± where seeds disagree on the sign. A list has {config.list_length} items."
    )
    command = shlex.join(["python", "-m", "experiments.ab", *sys.argv[1:]])
    text = ab_report.markdown(result, costs, command=command, note=note, plot=plot.name)
    write_text(config.out.with_suffix(".md"), text)
    print(f"written to {config.out}; report and plot beside it")


if __name__ == "__main__":
    cli.run(main, AbConfig, prog="python -m experiments.ab")
