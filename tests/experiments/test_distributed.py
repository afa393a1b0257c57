"""A run of two processes: one dies, the other says so, and one alone goes on to the same end."""

import signal
import socket

import helpers
import numpy as np
import pytest
from conftest import FLAGS, start, wait_for, wait_for_step


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def cluster(port, process, processes=2, timeout=20):
    return [
        *("--distributed", "--cluster.coordinator", f"localhost:{port}"),
        *("--cluster.processes", str(processes), "--cluster.process", str(process)),
        *("--cluster.timeout", str(timeout)),
    ]


def test_a_process_dies_and_one_alone_goes_on(trained, world, tmp_path):
    """The checkpoint of two processes opens in one, and the losses are those of one throughout."""
    run, port = tmp_path / "run", free_port()
    flags = ["--data", str(world / "data"), "--run", str(run), *FLAGS, "--evaluation.no-baselines"]
    flags += ["--mesh.data", "0"]
    first, second = (
        start(["experiments.pretrain", *flags, *cluster(port, i)], world, devices=1) for i in (0, 1)
    )
    wait_for_step(first, run / "metrics.jsonl", 40)
    wait_for(first, "the checkpoint of step 30", (run / "checkpoints" / "30").exists)
    second.send_signal(signal.SIGKILL)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 1, err
    assert "another process of the run is gone" in err.splitlines()[-1]
    assert "goes on from the latest checkpoint" in err
    assert "mesh data 2 x" in out
    assert "step" not in second.communicate()[0]  # one process prints
    alone = start(["experiments.pretrain", *flags, "--mesh.data", "1"], world)
    out, err = alone.communicate(timeout=300)
    assert alone.returncode == 0, err
    assert "resuming at step 30" in out
    ours, theirs = (
        [row for row in helpers.logged(f / "metrics.jsonl") if "loss_level" in row]
        for f in (run, trained.folder)
    )
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(row["loss"], expected["loss"], rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (cluster(1, 1, timeout=3), "coordinator localhost:1 was not reached"),
        ([*cluster(1, 1)[:2], "here", *cluster(1, 1)[3:]], "--cluster.coordinator here"),
        (["--distributed", "--cluster.process", "1"], "belong together"),
    ],
)
def test_no_coordinator(world, tmp_path, flags, words):
    flags = ["--data", str(world / "data"), "--run", str(tmp_path / "run"), *FLAGS, *flags]
    process = start(["experiments.pretrain", *flags], world)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert words in err.splitlines()[-1]
