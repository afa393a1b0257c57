"""A run as an HTTP server: `python -m experiments.serve RUN`."""

import dataclasses
import pathlib
from typing import Annotated

import tyro

from onerec_jax import cli
from onerec_jax.serving.config import HttpConfig, ServiceConfig


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Serve the best checkpoint of a run, and every better one that it writes."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """Run folder."""
    service: ServiceConfig = ServiceConfig()
    http: HttpConfig = HttpConfig()


def main(config: ServeConfig) -> None:
    """Listen, load, compile, answer."""
    from onerec_jax.serving.server import Server  # needs the extra `serve`
    from onerec_jax.serving.service import Service

    service = Service(config.run, config.service)
    Server(service, config.http, on_ready=lambda url: print(f"{url} answers", flush=True)).run()


if __name__ == "__main__":
    cli.run(main, ServeConfig, prog="python -m experiments.serve")
