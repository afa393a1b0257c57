"""The one exception for mistakes that a user can mend, and what its messages are made with."""


class InputError(Exception):
    """Something in the user's files, flags or machine does not fit.

    The message is one line: what is wrong, where (file, row, column or flag) and what to do.
    Command lines print it as `error: …` and exit with code 2; libraries may catch it.
    """


def shown(value, length: int = 40) -> str:
    """The beginning of a wrong value, on one line: it may come from outside."""
    return ascii(str(value)[:length])[1:-1]


def require_at_least(config, prefix: str, **minimums: float) -> None:
    """Refuses a settings dataclass with a field below its minimum.

    Args:
      prefix: of the flag, such as "train." for `--train.steps`.
      minimums: field name -> least value allowed.

    Raises:
      InputError: names the flag.
    """
    for name, minimum in minimums.items():
        value = getattr(config, name)
        if not value >= minimum:  # so that NaN is refused too
            flag = f"--{prefix}{name}".replace("_", "-")
            raise InputError(f"{flag} {value} must be at least {minimum}")
