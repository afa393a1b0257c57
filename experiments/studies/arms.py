"""What studies share: many runs side by side, and a command line that leaves them the memory.

An arm is one setting under study. Every arm runs once a seed; the same seed means the same data
order and, where the arms allow it, the same initial parameters.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from experiments import pretrain
from experiments.prepare import PrepareConfig, prepare
from onerec_jax import cli
from onerec_jax.data.schema import load_dataset
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.errors import InputError
from onerec_jax.run import Run, settings_hash
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer.semantic_ids import SemanticIds


def world_data(
    world: WorldConfig, split: Literal["leave-one-out", "time"] = "leave-one-out"
) -> pathlib.Path:
    """The folder of a platform's log; simulated if it is not there."""
    key = settings_hash(dataclasses.asdict(world))
    name = f"world-{key}" if split == "leave-one-out" else f"world-{split}-{key}"
    folder = pretrain.RUNS / "data" / name
    if not folder.exists():
        print(f"simulating {world.users:,} users")
        prepare(PrepareConfig(source="world", world=world, split=split, out=folder))
    return folder


def trained(config: pretrain.PretrainConfig) -> Run:
    """A run trained to its end, without the test and the baselines of `experiments.pretrain`."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    dataset = load_dataset(config.data)
    ids_folder = pretrain.find_semantic_ids(config, dataset, mesh)
    ids = SemanticIds.load(ids_folder)
    lifelong_folder = pretrain.find_lifelong(config, dataset, ids)
    run = pretrain.open_run(config, config.data, ids_folder, lifelong_folder, dataset, ids)
    pretrain.train(config, run, mesh)
    return run


def run_tasks(
    function: Callable[..., Any],
    tasks: Mapping[str, tuple],
    *,
    parallel: int,
    logs: pathlib.Path,
    gpus: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """Calls `function(*arguments)` for every named task, some at a time, each in its own process.

    A process has its share of the CPU cores to itself; what it prints goes to `logs/NAME.log`.

    Args:
      function: of a module, so that a fresh process can import it; writes its results to files.
      tasks: name -> arguments.
      parallel: tasks at a time.
      gpus: GPUs to deal the processes out to, the first of CUDA_VISIBLE_DEVICES where that is
        set; 0 leaves them as JAX finds them.

    Raises:
      InputError: more GPUs than CUDA_VISIBLE_DEVICES names.
      RuntimeError: a task failed; the others have run to their end.
    """
    logs.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
    if len(visible) < gpus:
        raise InputError(f"--gpus {gpus}, but CUDA_VISIBLE_DEVICES names {len(visible)}: ask fewer")
    waiting, failed, begin = queue.SimpleQueue(), [], time.perf_counter()
    for task in tasks.items():
        waiting.put(task)
    done = itertools.count(1)

    def work_through(place):
        """Runs tasks one after the other, each in a process that is new: none leaves anything."""
        while True:
            try:
                name, arguments = waiting.get_nowait()
            except queue.Empty:
                return
            process = multiprocessing.get_context("spawn").Process(
                target=_run, args=(place, function, arguments, logs / f"{name}.log")
            )
            process.start()
            process.join()
            if process.exitcode:
                failed.append(name)
            minutes = (time.perf_counter() - begin) / 60
            outcome = "failed" if process.exitcode else "done"
            say(f"{name} {outcome}: {next(done)} of {len(tasks)} after {minutes:.1f} min")

    threads = []
    for number in range(parallel):
        gpu = visible[number % gpus] if gpus else None
        place = Place(cores[number::parallel], gpu, -(-parallel // gpus) if gpus else 1)
        threads.append(threading.Thread(target=work_through, args=(place,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    if failed:
        raise RuntimeError(f"{', '.join(sorted(failed))} failed: see {logs}")


def command_line(
    main: Callable[[Any], Any],
    config_type: type,
    name: str,
    *,
    default: Any = None,
    argv: Sequence[str] | None = None,
) -> None:
    """The command line of the study `name`; arguments and exits as `cli.run`.

    Runs are processes of their own: this one takes of a GPU's memory only what it needs.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    prog = f"python -m experiments.studies.{name}"
    cli.run(main, config_type, prog=prog, default=default, argv=argv)


class Place(NamedTuple):
    """Where a process runs."""

    cores: list[int]
    gpu: str | None
    """As CUDA_VISIBLE_DEVICES names it."""
    sharing: int
    """Processes on that GPU."""


def _run(place: Place, function, arguments, log) -> None:
    """A process: takes its place before JAX looks for devices, then works, printing to a file."""
    if place.cores:
        os.sched_setaffinity(0, place.cores)
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / place.sharing:.2f}"
    with (
        open(log, "w", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            function(*arguments)
        except BaseException:
            traceback.print_exc()
            raise
