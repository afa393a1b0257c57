"""What the benchmarks share: a preset that decides the defaults, and results that add up."""

import json
import pathlib
import sys
from typing import Any

from onerec_jax import cli
from onerec_jax.config import PRESETS
from onerec_jax.errors import InputError
from onerec_jax.files import read_json, write_text


def append(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Adds a result to the list in a JSON file; the file is made if need be.

    Raises:
      InputError: the file holds something else, which stays as it is.
    """
    earlier = []
    if path.exists():
        earlier = read_json(path)
        if not isinstance(earlier, list):
            raise InputError(f"--out {path} holds no list of results: name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([*earlier, result], indent=1, default=str) + "\n")


def run_with_preset(main, config_type, *, prog: str, preset: str = "v1-0.935b") -> None:
    """`cli.run` of a config whose `--preset` gives the defaults of its `--model`."""
    argv = sys.argv[1:]
    preset = cli.flag_value(argv, "--preset") or preset
    if preset not in PRESETS:
        print(f"error: --preset {preset}: choose one of {', '.join(PRESETS)}", file=sys.stderr)
        raise SystemExit(2)
    default = config_type(preset=preset, model=PRESETS[preset])
    cli.run(main, config_type, prog=prog, default=default, argv=argv)
