"""A newer catalogue for a run that is served: `python -m experiments.publish RUN`.

    python -m experiments.publish RUN --data runs/data/grown --semantic-ids runs/ids-2

Servers of the run take it up by themselves; the others when they load the run again.
"""

import dataclasses
import pathlib
from typing import Annotated

import tyro

from onerec_jax import cli
from onerec_jax.serving.catalogue import publish


@dataclasses.dataclass(frozen=True)
class PublishConfig:
    """Make a run serve another data set and semantic IDs than it was trained on."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """Run folder."""
    data: pathlib.Path
    """From experiments.prepare, of the same source: more items, newer histories or both."""
    semantic_ids: pathlib.Path
    """Of its items, under the run's codebooks: from `experiments.tokenize --extend`."""
    lifelong: pathlib.Path | None = None
    """Compressed lives of it, from experiments.compress, for a run that reads them."""


def main(config: PublishConfig) -> None:
    """Check, write, say what is served."""
    run = publish(config.run, config.data, config.semantic_ids, config.lifelong)
    before = run.trained_on
    items, users = run.dataset.num_items, len(run.dataset.users)
    print(
        f"{config.run} serves {config.data}: {items:,} items ({items - before.num_items:+,} to the "
        f"training), {users:,} users ({users - len(before.users):+,})"
    )


if __name__ == "__main__":
    cli.run(main, PublishConfig, prog="python -m experiments.publish")
