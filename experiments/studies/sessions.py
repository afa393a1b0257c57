"""Lists as a whole against lists item by item: OneRec V0 (arXiv 2502.18965), Table 1.

Point-wise models (SASRec, TIGER-shaped, this repository's), one that generates lists, and that one
aligned with a session reward, on the simulated platform. For each seed one point-wise and one
session-wise run, one session reward and one judge; all alignments begin at the session-wise run.
See docs/sessions.md, "Study".

    python -m experiments.studies.sessions --small
    python -m experiments.studies.sessions --small --seeds 1 --arms point-wise session-wise '+ IPA'
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from experiments import align, pretrain, train_session_reward
from experiments.studies import session_report
from experiments.studies.arms import command_line, world_data
from experiments.studies.post_runs import (
    JUDGE_SEED,
    Measured,
    read_measured,
    run_all,
    train_policy,
)
from experiments.studies.posttraining import chosen
from experiments.studies.session_config import SMALL, StudyConfig
from experiments.studies.session_judge import (
    JudgeConfig,
    judged,
    played,
    requests_of,
    run_lists,
    sasrec_lists,
)
from experiments.studies.study_config import Changes, no_validation, of_arm
from onerec_jax.data.examples import check_batch_size
from onerec_jax.data.schema import load_dataset
from onerec_jax.data.world.response import World
from onerec_jax.errors import InputError
from onerec_jax.files import write_npz, write_text
from onerec_jax.run import Run, settings_hash
from onerec_jax.session_reward_run import SessionRewardRun
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.training.loop import Collapsed, NonFiniteLoss

# ----------------------------------------------------------------------------------------- arms


class Arm(NamedTuple):
    """Whose lists, and what is done to the model before."""

    model: Literal["point-wise", "tiger", "sasrec", "lists"]
    diverse: bool = False
    """Lists of a point-wise model by the rule of diversity."""
    align: Changes | None = None
    """What the arm changes in the alignment of the session-wise run; None: it is not aligned."""


BASE, SEED_MODEL = "point-wise", "session-wise"
"""What all arms are compared with, and what those are that are aligned."""
ARMS = {
    "SASRec": Arm("sasrec"),
    "TIGER-shaped": Arm("tiger"),
    BASE: Arm("point-wise"),
    "point-wise, diverse": Arm("point-wise", diverse=True),
    SEED_MODEL: Arm("lists"),
    "+ NTP alone": Arm("lists", align={"preference_weight": 0.0}),
    "+ DPO": Arm("lists", align={"refresh_every": 0}),
    "+ S-DPO": Arm(
        "lists",
        align={"refresh_every": 0, "preference.loss": "s-dpo", "preference.rejected": 3},
    ),
    "+ IPA": Arm("lists", align={}),
    "+ IPA, r_DPO 5%": Arm("lists", align={"dpo_share": 0.05}),
}
"""In the order of the paper's table. Its alignments draw pairs for 1% of the users; `+ NTP alone`
trains on as long without pairs."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What the arms of a seed begin from, are rewarded and judged by: run folders."""

    point_wise: pathlib.Path
    tiger: pathlib.Path
    lists: pathlib.Path
    reward: pathlib.Path
    judge: pathlib.Path

    @property
    def policies(self) -> dict[str, pathlib.Path]:
        """By `Arm.model`."""
        return {"point-wise": self.point_wise, "tiger": self.tiger, "lists": self.lists}


def folder_of() -> pathlib.Path:
    return pretrain.RUNS / "studies" / "sessions"


def chosen_arms(config: StudyConfig) -> dict[str, Arm]:
    """The arms that --arms names.

    Raises:
      InputError: as `chosen`; or one is missing that others are compared with.
    """
    arms = chosen(ARMS, config)
    if BASE not in arms:
        raise InputError(f"--arms leaves out {BASE!r}, with which all are compared: add it")
    if SEED_MODEL not in arms and any(arm.align is not None for arm in arms.values()):
        raise InputError(f"--arms leaves out {SEED_MODEL!r}, which is what is aligned: add it")
    return arms


# --------------------------------------------------------------------------------------- starts


def data_of(config: StudyConfig) -> tuple[pathlib.Path, pathlib.Path]:
    """Folders of the platform's log and of its semantic IDs; made if they are not there."""
    folder = world_data(config.world, "time")
    dataset, mesh = load_dataset(folder), make_mesh(data=1)
    ids = pretrain.find_semantic_ids(config.start, dataset, mesh)
    pretrain.find_semantic_ids(config.tiger, dataset, mesh)
    # Runs that are trained side by side read what is made here.
    pretrain.find_lifelong(config.start, dataset, SemanticIds.load(ids))
    return folder, ids


def starts_of(config: StudyConfig, arms: Mapping[str, Arm], data, ids) -> list[Start]:
    """The start of every seed; what the arms need and is not there yet is trained."""
    parts = [dataclasses.asdict(x) for x in (config.world, config.start, config.reward)]
    parts += [config.tiger_codes, config.tiger_length]
    folder = folder_of() / f"start-{settings_hash({'parts': parts})}"
    needed = {arm.model for arm in arms.values()} | {"point-wise"}
    starts, runs, rewards = [], {}, {}
    for seed in range(config.seeds):
        names = ("point-wise", "tiger", "lists", "reward", "judge")
        start = Start(*(folder / f"{name}-{seed}" for name in names))
        starts.append(start)
        models = {"point-wise": config.start, "tiger": config.tiger, "lists": config.lists}
        for name, path in start.policies.items():
            if name in needed and not (path / "done").exists():
                values = {"seed": seed, "data": data, "run": path}
                runs[path.name] = (dataclasses.replace(models[name], **values),)
        judge = {**train_session_reward.JUDGE, "judge": True, "seed": JUDGE_SEED + seed}
        for out, values in ((start.reward, {"seed": seed}), (start.judge, judge)):
            if not (out / "report.json").exists():
                values = {"data": data, "semantic_ids": ids, "out": out, **values}
                rewards[out.name] = (dataclasses.replace(config.reward, **values),)
    if runs or rewards:
        print(f"{len(runs)} models and {len(rewards)} session rewards to train in {folder}")
    run_all(config, train_policy, runs, folder / "logs")
    run_all(config, train_session_reward.main, rewards, folder / "logs")
    return starts


# ------------------------------------------------------------------------------------------ runs


def align_config(config: StudyConfig, start: Start, seed: int, changes: Changes):
    """The alignment of an arm and seed, of the session-wise run."""
    return of_arm(
        config.align, changes, folder_of(), run=start.lists, reward=start.reward, seed=seed
    )


def aligned(config: align.AlignConfig) -> Run:
    """A run aligned to its end, without the comparison and the test of experiments.align.

    Raises:
      Collapsed, NonFiniteLoss: it came to no end.
    """
    parent = align.open_parent(config)
    reward = align.open_reward(config, "reward", parent)
    examples = parent.session_lists("train")
    check_batch_size(config.train.batch_size, examples)
    run, mesh = align.open_run(config, parent, reward), make_mesh(data=1)
    tester = align.ListTester(config, run, reward, None, mesh)

    align.train(config, parent, run, examples, tester, mesh, no_validation)
    return run


def run_arm(
    arm: Arm,
    alignment: align.AlignConfig | None,
    start: Start,
    items: int,
    cfg: JudgeConfig,
    seed: int,
    path: pathlib.Path,
) -> None:
    """A task: makes and judges the lists of one arm of one seed, and writes `path`.

    Args:
      alignment: None judges a model of the start.
    """
    reward, judge = SessionRewardRun.open(start.reward), SessionRewardRun.open(start.judge)
    test, values = requests_of(judge.dataset), {}
    path.parent.mkdir(parents=True, exist_ok=True)
    if arm.model == "sasrec":
        lists = sasrec_lists(Run.open(start.point_wise), test, items, cfg, seed=seed)
    else:
        try:
            run = Run.open(start.policies[arm.model]) if alignment is None else aligned(alignment)
        except (Collapsed, NonFiniteLoss) as error:
            print(error)
            write_npz(path, {"stopped": str(error)})
            return
        generator = run.generator(
            make_mesh(data=1), beam_width=cfg.beam_width, batch_size=cfg.batch_size
        )
        lists = run_lists(run, generator, test, items, cfg, seed=seed, diverse=arm.diverse)
        if cfg.days and not arm.diverse:
            values = played(run, generator, items, cfg)
    values = judged(lists, test, reward, judge, cfg) | values
    for name, value in values.items():
        print(f"{name}: {np.nanmean(value):.4f}")
    write_npz(path, values)


def measure(
    config: StudyConfig, starts: list[Start], arms: Mapping[str, Arm]
) -> dict[str, Measured]:
    """Makes and judges all arms that are not there yet, and reads what was measured."""
    items, key = config.start.sessions.items, settings_hash(dataclasses.asdict(config.judge))
    paths, logs, tasks = {name: [] for name in arms}, {name: [] for name in arms}, {}
    for seed, start in enumerate(starts):
        for name, arm in arms.items():
            alignment, folder = None, start.lists.parent
            if arm.align is not None:
                alignment = align_config(config, start, seed, arm.align)
                folder = alignment.out
                logs[name].append(folder / "metrics.jsonl")
            kind = settings_hash({"arm": arm._replace(align=None)})
            path = folder / f"scores-{kind}-{seed}-{key}.npz"
            paths[name].append(path)
            if not path.exists():
                task = f"{folder.name}-{kind}-{seed}-{key}"
                tasks[task] = (arm, alignment, start, items, config.judge, seed, path)
    print(f"{len(tasks)} of {len(arms) * len(starts)} arms to do, {config.parallel} at a time")
    run_all(config, run_arm, tasks, folder_of() / "logs")
    return {name: read_measured(paths[name], logs[name]) for name in arms}


# ------------------------------------------------------------------------------------------ main


def main(config: StudyConfig) -> None:
    """Trains and judges what is not there yet, compares, prints and writes."""
    name = f"sessions-{config.world.name}" + ("-small" if config.small else "")
    out = config.out or pretrain.RUNS / "studies" / name
    arms = chosen_arms(config)
    measured = measure(config, starts_of(config, arms, *data_of(config)), arms)
    world = World.from_meta(load_dataset(world_data(config.world, "time")).meta)
    report = session_report.report_of(
        {arm: found.scores for arm, found in measured.items()},
        base=BASE,
        seed_model=SEED_MODEL,
        aligned=[arm for arm in arms if ARMS[arm].align is not None],
        resamples=config.resamples,
    )
    users = next(iter(measured[BASE].scores.values())).shape[1]
    lines = [
        f"World {world.config.name} ({world.fingerprint}), split by time: {users} test users; "
        f"{config.seeds} seeds; "
        f"{config.start.train.steps} steps of pretraining, {config.align.train.steps} of "
        f"alignment. {config.judge.lists} lists of {config.start.sessions.items} unseen items for "
        "each test user. In brackets 95% intervals over users and seeds, paired; ± where seeds "
        "disagree on the sign."
    ]
    for arm, found in measured.items():
        lines += [
            f"{arm}, seed {seed}, was stopped: {why}"
            for seed, why in enumerate(found.stopped)
            if why
        ]
    out.mkdir(parents=True, exist_ok=True)
    text = session_report.markdown(report, lines)
    print(text)
    write_text(out / "report.md", f"{text}\n![gains](gains.png)\n")
    session_report.draw(out / "gains.png", report)
    record = {
        "config": dataclasses.asdict(config),
        "command": " ".join(sys.argv),
        **report,
        "stopped": {arm: found.stopped for arm, found in measured.items()},
    }
    write_text(out / "report.json", json.dumps(record, indent=1, default=str) + "\n")
    print(f"written to {out}")


def run_command(argv: list[str] | None = None) -> None:
    """The command line; `argv` replaces the process's own flags."""
    argv = sys.argv[1:] if argv is None else argv
    default = StudyConfig(**(SMALL if "--small" in argv else {}))
    command_line(main, StudyConfig, "sessions", default=default, argv=argv)


if __name__ == "__main__":
    run_command()
