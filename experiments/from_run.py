"""What the commands share that go on from a finished run: experiments.posttrain and .align."""

import dataclasses
import json
import math
import pathlib
import shlex
import sys
import time
from collections.abc import Callable
from typing import Annotated, Literal

import rich.console
import rich.table
import tyro

from experiments import evaluate
from experiments.stage import RUNS, checked_mesh, seconds_of_training
from onerec_jax import cli
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.files import read_json, write_text
from onerec_jax.run import Run, settings_hash
from onerec_jax.sharding import USER_AXES, MeshConfig
from onerec_jax.training.loop import LoopConfig, Progress

# ------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class FromRunConfig:
    """Settings of every stage that goes on from a finished run; `optimizer` is each one's own."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """Finished run to start from; one that this command has made will do."""
    reward: pathlib.Path
    """Finished run of the reward for the same data set and semantic IDs."""
    judge: pathlib.Path | None = None
    """A second one (trained with --judge), to measure the result by and nothing else."""
    out: pathlib.Path | None = None
    """Run folder to write; default: runs/DATA-STAGE-HASH, one for each set of flags."""
    seed: int = 0
    train: LoopConfig = LoopConfig(steps=5000, validate_every=500, patience=0)
    validate_users: int = 500
    """Users, or session lists, in each validation, drawn once by the seed; 0 = all."""
    select_by: Literal["reward", "loss"] = "reward"
    """What the best checkpoint goes by: the mean reward of lists, or the NTP loss."""
    evaluation: evaluate.EvaluationConfig = evaluate.EvaluationConfig(baselines=False)
    mesh: MeshConfig = MeshConfig()
    deterministic: bool = False
    """On a GPU: the same bits every time, by slower kernels."""

    def __post_init__(self):
        require_at_least(self, "", seed=0, validate_users=0)


def settings(config: FromRunConfig, kind: type[Run], parent: Run, reward, *apart: str) -> dict:
    """What the result of every such stage depends on; the mesh may change between sessions.

    Args:
      kind: names the stage.
      reward: an opened run.
      apart: further fields that are left out.
    """
    values = dataclasses.asdict(config)
    for name in ("run", "reward", "judge", "out", "mesh", "evaluation", *apart):
        del values[name]
    before = parent.config["settings"]
    return values | {
        "stage": kind.stage,
        "preset": before["preset"],
        "model": before["model"],
        "parent": origin(parent),
        "reward_run": origin(reward),
    }


# --------------------------------------------------------------------------------------- stages


def finished(run: Run) -> Run:
    """The run, if it has come to its end.

    Raises:
      InputError: it has not.
    """
    if not run.finished:
        raise InputError(
            f"{run.folder} is not trained to its end: run `{run.config['command']}` on"
        )
    return run


def origin(run: Run) -> dict:
    """A run that another comes from, for the latter's settings."""
    parts = {name: run.config[name] for name in ("settings", "data", "semantic_ids", "lifelong")}
    named = {k: v["fingerprint"] if v and k != "settings" else v for k, v in parts.items()}
    return {
        "folder": str(run.folder.resolve()),
        "settings": settings_hash(named),
        "step": run.best_step,
    }


def mesh_of(config, parent: Run):
    """The mesh that a command asks for, checked against the parent's model."""
    if config.deterministic:
        cli.use_deterministic_kernels()
    return checked_mesh(config, parent.model_config)


def create(kind: type[Run], out: pathlib.Path | None, values: dict, parent: Run) -> Run:
    """Creates or continues the run folder of a stage, on the parent's data set and semantic IDs.

    Args:
      kind: names the stage.
      out: the folder; None: one for each set of values.
      values: the settings.
    """
    values = json.loads(json.dumps(values))
    key = values | {"data": parent.dataset.fingerprint, "semantic_ids": parent.ids.fingerprint}
    folders = {
        part: pathlib.Path(parent.config[part]["folder"])
        for part in ("data", "semantic_ids", "lifelong")
        if parent.config.get(part)
    }
    return kind.create(
        out or RUNS / f"{parent.dataset.name}-{kind.stage}-{settings_hash(key)}",
        settings=values,
        command=shlex.join(["python", "-m", f"experiments.{kind.stage}", *sys.argv[1:]]),
        data_folder=folders["data"],
        ids_folder=folders["semantic_ids"],
        dataset=parent.dataset,
        ids=parent.ids,
        spec=parent.spec,
        lifelong_folder=folders.get("lifelong"),
        snapshots=parent.snapshots,
    )


def rollout_users(share: float, batch_size: int, mesh, parts: int = 1) -> int:
    """Users of a step that get rollouts: the share asked for, rounded up to fill the devices.

    Raises:
      InputError: the step has too few users for the parts.
    """
    unit = math.prod(mesh.shape[axis] for axis in USER_AXES) * parts
    users = max(round(share * batch_size), 1)
    users = -(-users // unit) * unit
    if users > batch_size:
        raise InputError(
            f"--rollout.parts {parts}: {users} users would get rollouts, and a step "
            f"has {batch_size}: lower it or raise --train.batch-size"
        )
    return users


def train_and_compare(
    run: Run,
    evaluation: evaluate.EvaluationConfig,
    train: Callable[[], tuple[object, Progress]],
    compare: Callable[[], dict],
) -> dict:
    """The comparison of before and after: what is written in the run, or made now.

    Args:
      train: as `training.loop.fit` returns.
    """
    path = run.folder / "comparison.json"
    if path.exists():
        print(f"{run.folder} is finished: showing its comparison")
        return read_json(path)
    seconds = {"train": seconds_of_training(run, train)}
    start = time.perf_counter()
    result = compare()
    seconds["compare"] = time.perf_counter() - start
    evaluate.evaluate_run(run, evaluation, seconds)
    write_text(path, json.dumps(result, indent=1))
    return result


def show(result: dict, title: str) -> None:
    """Print before and after."""
    table = rich.table.Table(title=title)
    for i, name in enumerate(("mean over users", "before", "after", "difference", "95% interval")):
        table.add_column(name, justify="right" if i else "left")
    for name, row in result["metrics"].items():
        low, high = row["ci95"]
        cells = (f"{row[k]:.4f}" for k in ("before", "after"))
        table.add_row(name, *cells, f"{row['difference']:+.4f}", f"\\[{low:+.4f}, {high:+.4f}]")
    rich.console.Console(soft_wrap=True, highlight=False).print(table)
