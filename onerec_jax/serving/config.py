"""Settings of the server; no package of the extra `serve` is needed to read them."""

import dataclasses

from onerec_jax.errors import InputError, require_at_least


@dataclasses.dataclass(frozen=True)
class ServiceConfig:
    """Batches and limits."""

    widths: tuple[int, ...] = (64, 256)
    """Compiled beam widths. A request gets the narrowest that has its beam width and its n."""
    users: tuple[int, ...] = (1, 8, 32)
    """Compiled batch sizes. A batch is padded to the next; the last is the largest."""
    wait_ms: float = 5.0
    """Longest time that a request waits for others to share its batch."""
    max_queue: int = 512
    """Requests that may wait; more are answered 503 with Retry-After."""
    timeout_s: float = 30.0
    """A recommendation not made by then is answered 503."""
    poll_s: float = 5.0
    """How often the run folder is looked at for a newer checkpoint or catalogue."""
    filter_size: int = 1024
    """Items that the search itself leaves out or is confined to. Of a request that excludes more
    (seen items count), the rest is dropped from the list, which may come short; a request may not
    allow more."""
    max_n: int = 100
    max_history: int = 10_000
    """Actions of a history, items to exclude, authors to exclude: at most so many each."""

    def __post_init__(self):
        require_at_least(
            self, "service.", wait_ms=0, max_queue=1, max_n=1, max_history=1, filter_size=1
        )
        require_at_least(self, "service.", timeout_s=0.001, poll_s=0.001)
        for name in ("widths", "users"):
            values = tuple(sorted(set(getattr(self, name))))
            if not values or values[0] < 1:
                raise InputError(
                    f"--service.{name} {' '.join(map(str, values))}: give positive numbers"
                )
            object.__setattr__(self, name, values)
        if self.max_n > self.widths[-1]:
            raise InputError(
                f"--service.max-n {self.max_n} is more than the widest beam "
                f"({self.widths[-1]}): lower it or add a width"
            )


@dataclasses.dataclass(frozen=True)
class HttpConfig:
    """Where to listen and what to put up with."""

    host: str = "127.0.0.1"
    """This machine only; 0.0.0.0 for everyone who can reach it. There is no authentication."""
    port: int = 8000
    """0: any free one."""
    max_body: int = 1 << 20
    """Bytes of a request's body."""
    read_timeout_s: float = 10.0
    """For a request to arrive, headers and body each."""
    drain_s: float = 1.0
    """After SIGTERM /readyz says 503, and requests are still taken for so long."""
    stop_timeout_s: float = 30.0
    """For what was taken to be answered after that."""

    def __post_init__(self):
        require_at_least(self, "http.", port=0, max_body=1, read_timeout_s=0.001)
        require_at_least(self, "http.", drain_s=0, stop_timeout_s=0)
