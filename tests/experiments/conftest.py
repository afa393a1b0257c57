"""One small world for all command-line tests: a log with a rule, its data set, one trained run.

The rule: after item i comes item i + 7 (modulo 40). A model that learns finds it at once; by
popularity the items are all alike.
"""

import contextlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import pretrain
from experiments.prepare import PrepareConfig
from experiments.prepare import main as prepare_main
from onerec_jax import cli

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
USERS, ITEMS, STRIDE = 60, 40, 7
COLOURS = ["red", "green", "blue", "gold", "grey", "pink", "teal", "navy"]
ANIMALS = ["fox", "owl", "cat", "dog", "hen"]

MODEL_FLAGS = [
    *("--model.d-model", "32", "--model.num-heads", "2", "--model.ff-dim", "32"),
    *("--model.encoder-layers", "1", "--model.decoder-layers", "2"),
    *("--model.num-experts", "4", "--model.experts-per-token", "2", "--model.expert-dim", "16"),
    *("--model.short-length", "4", "--model.positive-length", "4"),
    *("--model.lifelong-length", "8", "--model.lifelong-queries", "2"),
    *("--model.lifelong-blocks", "1", "--model.feature-dim", "4", "--model.author-dim", "4"),
    *("--model.static-dim", "4", "--model.dropout", "0.05"),
]
TRAIN_FLAGS = [
    *("--train.batch-size", "64", "--train.steps", "60", "--train.log-every", "5"),
    *("--train.validate-every", "30", "--train.patience", "0"),
    *("--optimizer.learning-rate", "0.01", "--optimizer.warmup-steps", "5"),
    *("--validate-users", "0", "--validate-beam-width", "10", "--mesh.data", "1"),
]
EVALUATION_FLAGS = [
    *("--evaluation.beam-width", "16", "--evaluation.batch-size", "64"),
    *("--evaluation.resamples", "200", "--evaluation.sasrec-epochs", "1"),
]
FLAGS = [*MODEL_FLAGS, *TRAIN_FLAGS, *EVALUATION_FLAGS]


def title(item: int) -> str:
    return f"The {COLOURS[item % 8]} {ANIMALS[item // 8]}"


def write_log(folder: pathlib.Path, seed: int = 0) -> list[str]:
    """log.csv and items.csv under column names of their own; returns the flags to read them."""
    rng = np.random.default_rng(seed)
    lines = ["who,what,when"]
    for user in range(USERS):
        item = int(rng.integers(ITEMS))
        for action in range(int(rng.integers(8, 15))):
            lines.append(f"u{user},{item + 100},{1_000_000 + user * 5000 + action * 60}")
            item = (item + STRIDE) % ITEMS
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    rows = [
        f"{item + 100},{title(item)},{COLOURS[item % 8]}|{ANIMALS[item // 8]}"
        for item in range(ITEMS)
    ]
    (folder / "items.csv").write_text("\n".join(["id,name,kinds", *rows]) + "\n")
    return f"""
        --source table --path {folder}/log.csv
        --table.user who --table.item what --table.time when
        --table.items {folder}/items.csv --table.items-id id
        --table.items-title name --table.items-tags kinds
    """.split()


def make_data(folder: pathlib.Path, out: pathlib.Path, seed: int = 0) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*write_log(folder, seed), "--out", str(out), "--overwrite"]
    with contextlib.redirect_stdout(io.StringIO()):
        cli.run(prepare_main, PrepareConfig, argv=flags)
    return out


@contextlib.contextmanager
def quick_compilation():
    """Compiling is most of the time here; the same for this process and those it starts."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def _quick_compilation():
    with quick_compilation():
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> pathlib.Path:
    """Working folder with the data set in `data`; semantic IDs go to `runs` below it."""
    folder = tmp_path_factory.mktemp("world")
    make_data(folder / "source", folder / "data")
    return folder


class Trained:
    """The finished run and what its command printed."""

    def __init__(self, folder, printed, flags):
        self.folder, self.printed, self.flags = folder, printed, flags


@pytest.fixture(scope="session")
def trained(world) -> Trained:
    """A whole `experiments.pretrain`, in process. Nobody may change it: see `copied`."""
    flags = ["--data", str(world / "data"), "--run", str(world / "run"), *FLAGS]
    out = io.StringIO()
    with contextlib.chdir(world), contextlib.redirect_stdout(out), quick_compilation():
        pretrain.run_command(flags)
    return Trained(world / "run", out.getvalue(), flags)


@pytest.fixture
def copied(trained, tmp_path) -> pathlib.Path:
    """A copy of the finished run, to be changed or damaged."""
    return pathlib.Path(shutil.copytree(trained.folder, tmp_path / "copy"))


@pytest.fixture
def in_world(world, monkeypatch):
    """Commands run from the working folder, where semantic IDs already lie."""
    monkeypatch.chdir(world)
    return world


def tree(folder) -> dict:
    """Every file below a folder with its bytes."""
    folder = pathlib.Path(folder)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def refused(capfd):
    """Runs a command that must end with code 2; returns its only line on stderr."""

    def refuse(command, *flags) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            command([str(flag) for flag in flags])
        assert stop.value.code == 2
        err = capfd.readouterr().err
        assert "Traceback" not in err
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        return err

    return refuse


def start(command: list[str], cwd: pathlib.Path, *, devices: int = 8) -> subprocess.Popen:
    """A command in a process of its own, compiled and cached as in this one."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_step(process, metrics, step):
    """Until metrics.jsonl has a row of `step`; the process must still be running."""
    wanted = f'{{"step": {step}, '
    wait_for(process, f"step {step}", lambda: metrics.exists() and wanted in metrics.read_text())


def wait_for(process, what, there):
    """Until `there()`; the process must still be running."""
    limit = time.monotonic() + 240
    while not there():
        if process.poll() is not None or time.monotonic() > limit:
            process.kill()
            pytest.fail(f"{what} was not reached:\n{process.communicate()[1]}")
        time.sleep(0.002)
