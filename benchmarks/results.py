"""What the benchmarks share: a preset that decides the defaults, and results that add up."""

import contextlib
import json
import pathlib
import sys
from typing import Any

from onerec_jax import cli
from onerec_jax.config import PRESETS
from onerec_jax.files import write_text


def append(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Adds a result to the list in a JSON file; the file is made if need be."""
    earlier = []
    with contextlib.suppress(OSError, ValueError):
        earlier = json.loads(path.read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([*earlier, result], indent=1, default=str) + "\n")


def run_with_preset(main, config_type, *, prog: str, preset: str = "v1-0.935b") -> None:
    """`cli.run` of a config whose `--preset` gives the defaults of its `--model`."""
    argv = sys.argv[1:]
    preset = cli.flag_value(argv, "--preset") or preset
    if preset not in PRESETS:
        raise SystemExit(f"error: --preset {preset}: choose one of {', '.join(PRESETS)}")
    default = config_type(preset=preset, model=PRESETS[preset])
    cli.run(main, config_type, prog=prog, default=default, argv=argv)
