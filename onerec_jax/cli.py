"""What all command lines share: flags from a dataclass, errors in one line, exit codes."""

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from onerec_jax.errors import InputError


def flag_value(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag that decides the defaults of others, before they are parsed."""
    for i, word in enumerate(argv):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
    return None


def use_deterministic_kernels() -> None:
    """On a GPU: the same bits every time, by slower kernels.

    XLA reads its flags once, when the backend starts: nothing may have touched a device before.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def run(
    main: Callable[[Any], Any],
    config_type: type,
    *,
    prog: str | None = None,
    default: Any = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse flags into a config, call `main` with it and end as a good command line does.

    `--debug` may stand anywhere among the flags: errors then come with their traceback.

    Args:
      main: called with one `config_type`.
      config_type: frozen dataclass; its fields become flags, its docstring the help.
      prog: name in the help, such as "python -m experiments.prepare".
      default: config whose values replace the defaults of `config_type`.
      argv: flags; those of the process if None.

    Raises:
      SystemExit: 2 for wrong flags or an InputError, 130 after Ctrl-C, 0 after `--help`.
        Other exceptions are bugs and pass through.
    """
    import tyro  # here, so that the library works without the command lines' packages

    flags = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in flags
    flags = [flag for flag in flags if flag != "--debug"]
    try:
        # Inside, for a config may refuse its own values.
        config = tyro.cli(
            config_type,
            prog=prog,
            description=f"{inspect.getdoc(config_type)}\n\nWith --debug, errors show a traceback.",
            args=flags,
            **({} if default is None else {"default": default}),
        )
        main(config)
    except InputError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted: the same command keeps what is finished", file=sys.stderr)
        raise SystemExit(130) from None
