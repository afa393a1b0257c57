"""`python -m experiments.serve RUN`: a process that starts, answers and stops in order."""

import concurrent.futures
import re
import signal
import socket
import time

import httpx
import pytest
from conftest import start

from experiments import serve
from onerec_jax import cli


def run(flags):
    cli.run(serve.main, serve.ServeConfig, argv=[str(flag) for flag in flags])


def test_until_sigterm(trained):
    """What it took by then is answered, and the exit code is 0."""
    flags = (
        "--http.port 0 --service.widths 16 --service.users 1 --service.max-n 16 --http.drain-s 3"
    )
    command = ["experiments.serve", str(trained.folder), *flags.split()]
    process = start(command, trained.folder, devices=1)
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        assert httpx.get(f"{url}/healthz", timeout=60).status_code == 200
        limit = time.monotonic() + 240
        while httpx.get(f"{url}/readyz", timeout=60).status_code == 503:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < limit
            time.sleep(0.05)

        def ask(user):
            body = {"user_id": f"u{user}", "n": 5}
            return httpx.post(f"{url}/v1/recommend", json=body, timeout=60)

        assert [item["title"][:4] for item in ask(3).json()["items"]] == ["The "] * 5
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            futures = [pool.submit(ask, user) for user in range(20)]
            next(concurrent.futures.as_completed(futures))
            process.send_signal(signal.SIGTERM)
            assert [future.result().status_code for future in futures] == [200] * 20
            assert httpx.get(f"{url}/readyz", timeout=60).status_code == 503
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "Traceback" not in err
    finally:
        process.kill()


def test_no_address_before_there_is_an_answer(tmp_path, capfd):
    """A run folder that is wrong is an error and nothing else."""
    with pytest.raises(SystemExit):
        run([tmp_path, "--http.port", 0])
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")


def test_what_cannot_be_served(trained, copied, refused, tmp_path):
    free = ["--http.port", 0]
    assert "is no run folder" in refused(run, tmp_path, *free)
    assert "--service.widths" in refused(run, trained.folder, "--service.widths", 0)
    assert "--service.max-n 300" in refused(run, trained.folder, "--service.max-n", 300)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refused(run, trained.folder, "--http.port", port)
        assert f"--http.port {port}: cannot listen there" in message
    for path in (copied / "checkpoints").glob("*/model/**/d/*"):
        path.write_bytes(path.read_bytes()[:100])
    assert str(copied / "checkpoints") in refused(run, copied, *free)
