"""How to keep experts evenly loaded: `python -m experiments.studies.balancing`.

Loss-free balancing by a bias against the auxiliary loss against nothing, as "Auxiliary-Loss-Free
Load Balancing" (arXiv 2408.15664), Table 2, compares them: loss, load and dropped tokens. Every arm
trains on the log of the simulated platform with the same seeds, under a capacity limit.

    python -m experiments.studies.balancing --seeds 3
"""

import dataclasses
import json
import os
import pathlib

import numpy as np
import rich.console
import rich.table

from experiments import pretrain
from experiments.studies.arms import command_line, run_tasks, trained, world_data
from onerec_jax.config import PRESETS
from onerec_jax.data.lifelong import LifelongConfig
from onerec_jax.data.pipeline import PipelineConfig
from onerec_jax.data.schema import load_dataset
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.errors import require_at_least
from onerec_jax.evaluation.report import markdown_table
from onerec_jax.files import write_text
from onerec_jax.sharding import make_mesh
from onerec_jax.training.loop import LoopConfig
from onerec_jax.training.metrics import MetricsLog
from onerec_jax.training.optimizer import OptimizerConfig

ARMS = {"loss-free bias": "bias", "auxiliary loss": "auxiliary", "nothing": "none"}
METRICS = {"loss": "validation loss", "max_violation": "MaxVio", "dropped": "dropped share"}


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Compare ways of balancing experts."""

    world: WorldConfig = WorldConfig(users=2000, items=3000, actions=250)
    """The platform, simulated if its log is not there yet."""
    seeds: int = 3
    runs: pretrain.PretrainConfig = pretrain.PretrainConfig(
        model=dataclasses.replace(
            PRESETS["tiny"],
            pathways=("static", "short", "positive"),
            positive_length=32,
            num_experts=16,
            capacity_factor=1.25,
        ),
        targets="positive",
        pipeline=PipelineConfig(targets_per_user=8),
        train=LoopConfig(batch_size=64, steps=1500, log_every=50, validate_every=500, patience=0),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=200),
        compression=LifelongConfig(chunk_actions=16),
        validate_users=0,
    )
    """Of every arm, but for its way of balancing."""
    parallel: int = os.cpu_count() or 1
    """Runs at a time, each with its share of the CPU cores."""
    gpus: int = 0
    """GPUs to deal the runs out to; 0: they run where JAX puts them."""
    out: pathlib.Path = pathlib.Path("runs/studies/balancing")

    def __post_init__(self):
        require_at_least(self, "", seeds=1, parallel=1, gpus=0)


def run_arm(config: pretrain.PretrainConfig) -> None:
    """Trains one run; what the study reads is its metrics.jsonl."""
    trained(config)


def measured(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Of one run: the last validation's loss, and by logged step the load and what was dropped."""
    rows = MetricsLog(folder / "metrics.jsonl").read()
    steps = [row for row in rows if "max_violation" in row]
    return {
        "loss": np.array([row["loss"] for row in rows if row.get("validation")]),
        "max_violation": np.array([row["max_violation"] for row in steps]),
        "dropped": np.array([row["dropped"] for row in steps]),
        "step": np.array([row["step"] for row in steps]),
    }


def draw(path: pathlib.Path, found: dict[str, list[dict]]) -> None:
    """MaxVio and dropped share over training, a line a seed."""
    from matplotlib.figure import Figure  # no pyplot: a notebook keeps its backend

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("max_violation", "dropped"), strict=True):
        for colour, (arm, runs) in enumerate(found.items()):
            for number, run in enumerate(runs):
                label = arm if number == 0 else None
                axis.plot(run["step"], run[name], color=f"C{colour}", alpha=0.7, label=label)
        axis.set_title(METRICS[name])
        axis.set_xlabel("step")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def main(config: StudyConfig) -> None:
    """Data, runs, table, plot."""
    folder = world_data(config.world)
    pretrain.find_semantic_ids(config.runs, load_dataset(folder), make_mesh(data=1))
    runs = {
        (arm, seed): dataclasses.replace(
            config.runs,
            model=dataclasses.replace(config.runs.model, balance=balance),
            seed=seed,
            data=folder,
            run=config.out / f"{balance}-{seed}",
        )
        for seed in range(config.seeds)
        for arm, balance in ARMS.items()
    }
    # A finished run ends at once, so all are started.
    tasks = {run.run.name: (run,) for run in runs.values()}
    run_tasks(run_arm, tasks, parallel=config.parallel, gpus=config.gpus, logs=config.out / "logs")
    found = {arm: [measured(runs[arm, seed].run) for seed in range(config.seeds)] for arm in ARMS}
    header, rows = ["", *METRICS.values()], []
    for arm, measurements in found.items():
        cells = []
        for name in METRICS:
            # The last fifth of training, but for the loss, which is the end's.
            values = [
                x[name][-1:] if name == "loss" else x[name][-len(x[name]) // 5 :]
                for x in measurements
            ]
            means = [float(v.mean()) for v in values]
            cells.append(f"{np.mean(means):.4f} ({', '.join(f'{m:.4f}' for m in means)})")
        rows.append([arm, *cells])
    table = rich.table.Table(*header, title="mean of the seeds, and each seed")
    for row in rows:
        table.add_row(*row)
    rich.console.Console(width=130).print(table)
    write_text(config.out / "report.md", markdown_table(header, rows))
    record = {
        "config": dataclasses.asdict(config),
        "runs": {
            arm: [{k: v.tolist() for k, v in run.items()} for run in measurements]
            for arm, measurements in found.items()
        },
    }
    write_text(config.out / "report.json", json.dumps(record, indent=1, default=str) + "\n")
    draw(config.out / "load.png", found)
    print(f"written to {config.out}")


if __name__ == "__main__":
    command_line(main, StudyConfig, "balancing")
