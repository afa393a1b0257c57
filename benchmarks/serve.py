"""How many requests a second a server answers: `python -m benchmarks.serve RUN`.

Starts `experiments.serve` on a free port and drives it with hey (https://github.com/rakyll/hey,
`apt-get install hey`): so many clients, each with the next request as soon as it has the answer to
the last. One row a kind of request: a user of the data set, a history in the request, the same with
items and an allowed subset to filter. Memory is the server's resident set, before and after.

    python -m benchmarks.serve runs/RUN --seconds 600 --clients 64
"""

import dataclasses
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from typing import Annotated

import jax
import rich.console
import rich.table
import tyro

from onerec_jax import cli
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.files import write_text
from onerec_jax.serving.config import ServiceConfig

KINDS = ("user", "history", "filtered")
STAGES = ("queue", "gather", "wait", "search", "lists")


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Saturate a server."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """Run folder."""
    seconds: int = 60
    """Of each kind of request."""
    clients: int = 32
    n: int = 10
    kinds: tuple[str, ...] = KINDS
    service: ServiceConfig = ServiceConfig()
    out: pathlib.Path = pathlib.Path("runs/benchmarks/serve.json")
    """JSON to write."""

    def __post_init__(self):
        require_at_least(self, "", seconds=1, clients=1, n=1)
        if not set(self.kinds) <= set(KINDS) or not self.kinds:
            raise InputError(f"--kinds {' '.join(self.kinds)}: choose among {', '.join(KINDS)}")
        if shutil.which("hey") is None:
            raise InputError("the load generator hey is missing: apt-get install hey")


class Server:
    """A server process of its own."""

    def __init__(self, config: BenchmarkConfig):
        flags = ["--http.port", "0"]
        for field in dataclasses.fields(config.service):
            value = getattr(config.service, field.name)
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--service.{field.name.replace('_', '-')}", *map(str, values)]
        begin = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.serve", str(config.run), *flags],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        line = self.process.stdout.readline()
        if not line:
            raise InputError(f"the server did not start: see its message (code {self.stop()})")
        self.url = re.search(r"http://\S+", line)[0]
        while not self._ready():
            if self.process.poll() is not None:
                raise InputError("the server did not get ready: see its message")
            time.sleep(0.1)
        self.start_s = time.perf_counter() - begin

    def _ready(self) -> bool:
        try:
            return self.get("/readyz") is not None
        except (urllib.error.URLError, ConnectionError):
            return False

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics").splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


def body_of(kind: str, server: Server, n: int) -> dict:
    """A request of the kind, about the first user of the data set and the most popular items."""
    (user,) = json.loads(server.get("/v1/users?limit=1"))["users"]
    popular = [item["item_id"] for item in json.loads(server.get("/v1/items?limit=100"))["items"]]
    if kind == "user":
        return {"user_id": user, "n": n}
    known = json.loads(server.get(f"/v1/users/{user}?limit=50"))["history"]
    history = {"history": [item["item_id"] for item in known[::-1]], "n": n}
    if kind == "history":
        return history
    return history | {"exclude_items": popular[:20], "allowed_items": popular}


def drive(server: Server, body: dict, clients: int, seconds: int) -> dict:
    """What hey says of one load, and the batches that the server made of it."""
    before = server.metrics()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(body, file)
        file.flush()
        command = ["hey", "-z", f"{seconds}s", "-c", str(clients), "-m", "POST", "-t", "60"]
        command += ["-T", "application/json", "-D", file.name, f"{server.url}/v1/recommend"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = server.metrics()

    def number(pattern):
        found = re.search(pattern, text)
        return float(found[1]) if found else None

    statuses = {code: int(count) for code, count in re.findall(r"\[(\d{3})\]\s+(\d+) resp", text)}
    errors = text.partition("Error distribution:")[2]
    lost = sum(int(count) for count in re.findall(r"\[(\d+)\]", errors))
    answered = statuses.get("200", 0)

    def mean(name, labels=""):
        names = (name + part + labels for part in ("_sum", "_count"))
        total, count = (after[name] - before[name] for name in names)
        return total / max(count, 1)

    return {
        "requests": sum(statuses.values()) + lost,
        "failed": sum(statuses.values()) - answered + lost,
        "requests_s": answered / seconds,
        "p50_ms": 1e3 * (number(r"50%+ in ([\d.]+)") or float("nan")),
        "p99_ms": 1e3 * (number(r"99%+ in ([\d.]+)") or float("nan")),
        "users_a_batch": mean("onerec_batch_users"),
        "stages_ms": {
            stage: 1e3 * mean("onerec_stage_seconds", f'{{stage="{stage}"}}') for stage in STAGES
        },
        "rss_mib_before": before["process_resident_memory_bytes"] / 2**20,
        "rss_mib_after": after["process_resident_memory_bytes"] / 2**20,
    }


def main(config: BenchmarkConfig) -> None:
    """Start, saturate, stop, print, write."""
    server = Server(config)
    try:
        rows = {}
        for kind in config.kinds:
            body = body_of(kind, server, config.n)
            drive(server, body, config.clients, 2)  # connections, allocators
            rows[kind] = drive(server, body, config.clients, config.seconds)
    finally:
        code = server.stop()
    table = rich.table.Table(
        "", "requests/s", "p50 ms", "p99 ms", "users a batch", "failed", "MiB before", "after"
    )
    stages = rich.table.Table("mean ms", *STAGES)
    for kind, row in rows.items():
        table.add_row(
            kind, f"{row['requests_s']:,.0f}", f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}",
            f"{row['users_a_batch']:.1f}", f"{row['failed']}", f"{row['rss_mib_before']:,.0f}",
            f"{row['rss_mib_after']:,.0f}",
        )  # fmt: skip
        stages.add_row(kind, *(f"{ms:.1f}" for ms in row["stages_ms"].values()))
    rich.console.Console().print(table, stages)
    print(f"ready after {server.start_s:.1f} s; exit code {code} after SIGTERM")
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.serve", *sys.argv[1:]]),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "settings": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "start_s": server.start_s,
        "exit_code": code,
        "loads": rows,
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.out, json.dumps(result, indent=1) + "\n")
    print(f"written to {config.out}")


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, prog="python -m benchmarks.serve")
