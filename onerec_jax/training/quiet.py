"""Silence for what Orbax says of a damaged checkpoint beside the error that it raises.

It logs each part that it cannot read, and the reads that it gives up complain one by one when they
are collected or come back: thousands of lines around the one that says what is wrong.
"""

import contextlib
import gc
import logging
import sys
import threading
import traceback
import warnings

LOGGERS = ("absl", "asyncio")
_lock = threading.Lock()
_within = 0
_levels: dict[str, int] = {}


@contextlib.contextmanager
def _silent_loggers():
    """Blocks of several threads may overlap: the first silences, the last restores."""
    global _within
    with _lock:
        _within += 1
        if _within == 1:
            for name in LOGGERS:
                _levels[name] = logging.getLogger(name).level
                logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if _within == 0:
                for name in LOGGERS:
                    logging.getLogger(name).setLevel(_levels[name])


@contextlib.contextmanager
def quiet():
    """For the block, no logs and warnings of Orbax; if it fails, nothing of abandoned reads either.

    Reads come back from their own threads whenever they do: after a failure, complaints of theirs
    (and no others) stay dropped for the rest of the process.
    """
    with _silent_loggers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:
            _drop_complaints()
            for one in _chain(error):
                traceback.clear_frames(one.__traceback__)  # they hold the reads
            gc.collect()
            raise


def first_cause(error: BaseException) -> BaseException:
    """The exception that all others of a chain come from."""
    return _chain(error)[-1]


def _chain(error: BaseException) -> list[BaseException]:
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _drop_complaints() -> None:
    before = sys.unraisablehook
    if getattr(before, "drops_complaints", False):
        return

    def hook(unraisable):
        if not _of_a_read(unraisable):
            before(unraisable)

    hook.drops_complaints = True
    sys.unraisablehook = hook


def _of_a_read(unraisable) -> bool:
    code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
    if code is not None and "orbax" in code.co_filename:
        return True
    # TensorStore calls back into an event loop that Orbax has left.
    return unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
