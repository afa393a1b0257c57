"""Several processes, one run: who does what, and how they find each other.

Every process runs the same command. Process 0 writes files and prints; all read the same folders,
which must lie on a file system that they share. A process has the users of its own devices.
"""

import contextlib
import dataclasses
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from onerec_jax.errors import InputError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other. Under SLURM, Open MPI, Kubernetes and on Cloud
    TPUs nothing need be given: JAX reads it from the environment."""

    coordinator: str = ""
    """HOST:PORT of process 0."""
    processes: int = 0
    """How many there are."""
    process: int = -1
    """Which one this is, from 0."""
    timeout: int = 120
    """Seconds to wait for the others at the start, and for the heartbeat of one that is silent."""


def start(config: DistributedConfig) -> None:
    """Joins the run; before anything touches a device.

    Raises:
      InputError: the others cannot be reached, or flags are missing.
    """
    given = {
        "coordinator_address": config.coordinator or None,
        "num_processes": config.processes or None,
        "process_id": config.process if config.process >= 0 else None,
    }
    if any(v is not None for v in given.values()) and None in given.values():
        raise InputError(
            "--cluster.coordinator, --cluster.processes and --cluster.process belong "
            "together: give all three, or none where the environment says it"
        )
    if config.process > 0:
        _wait_for(config.coordinator, config.timeout)  # JAX itself would abort the interpreter
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=config.timeout,
            heartbeat_timeout_seconds=config.timeout,
        )
    except Exception as error:  # JAX raises what each environment and gRPC raise
        raise _unreached(config.coordinator or "named by the environment", error) from error


def _unreached(coordinator: str, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    return InputError(
        f"the coordinator {coordinator} was not reached ({reason}): is process 0 running, and the "
        "port open? --cluster.timeout waits longer"
    )


def _wait_for(coordinator: str, timeout: int) -> None:
    """Until something listens at HOST:PORT."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--cluster.coordinator {coordinator}: give HOST:PORT")
    limit = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > limit:
                raise _unreached(coordinator, error) from error
            time.sleep(0.5)


def is_first() -> bool:
    """Whether this process writes and prints."""
    return jax.process_index() == 0


def first_then_all(function: Callable[[], T]) -> T:
    """Calls the function on process 0, then on the others: what it made is there for them."""
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return function()
    result = function() if is_first() else None
    multihost_utils.sync_global_devices("first_then_all")
    return result if is_first() else function()


@contextlib.contextmanager
def quiet_unless_first():
    """Only process 0 prints."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


LOST = ("gloo", "nccl", "heartbeat", "coordination", "connection", "barrier", "socket", "peer")
"""Words in what backends and libraries raise when another process of the run is gone."""


@contextlib.contextmanager
def ends_with_others():
    """Ends this process at once when the run cannot go on, if it is one of several.

    An ordinary exit would wait for the others at a barrier, dead ones included. What is raised when
    one of them is gone depends on the backend and on what was being done.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        text, code = str(error), 1
        lines = text.splitlines() or [""]
        if isinstance(error, InputError):
            message, code = f"error: {text}", 2
        elif any(word in text.lower() for word in LOST):
            message = (
                f"error: another process of the run is gone ({lines[0][:160]}): the same command "
                "on all of them goes on from the latest checkpoint"
            )
        else:
            message = traceback.format_exc()
        print(f"process {jax.process_index()}: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)


def local_share(batch):
    """This process's users of a batch that all processes hold whole."""
    count, index = jax.process_count(), jax.process_index()

    def share(x):
        size = len(x) // count
        return x[index * size : (index + 1) * size]

    return batch if count == 1 else jax.tree.map(share, batch)


def fetch(tree):
    """Global arrays as NumPy arrays, whole, on every process."""
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree
    )
