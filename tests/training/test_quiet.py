"""What is dropped around a damaged checkpoint, and that nothing else is."""

import gc
import logging
import sys
import types
import warnings

import pytest

from onerec_jax.training.quiet import first_cause, quiet

CODE = """
import types

@types.coroutine
def pause():
    yield

async def read():
    try:
        await pause()
    finally:
        raise ValueError("a read that was given up")
"""


def reader(filename):
    """A coroutine that complains when it is collected, from a file of that name."""
    space = {}
    exec(compile(CODE, filename, "exec"), space)
    coroutine = space["read"]()
    coroutine.send(None)
    return coroutine


@pytest.fixture
def complaints(monkeypatch):
    found = []
    monkeypatch.setattr(sys, "unraisablehook", lambda one: found.append(str(one.exc_value)))
    return found


def test_logs_and_warnings_are_dropped_within(caplog):
    logger = logging.getLogger("absl")
    level = logger.level
    with quiet(), warnings.catch_warnings(record=True) as warned:
        logger.error("a part cannot be read")
        warnings.warn("a part cannot be read")
    assert not caplog.records
    assert not warned
    assert logger.level == level
    logger.error("something else")
    assert [record.message for record in caplog.records] == ["something else"]


def test_blocks_that_overlap_restore_what_was_there():
    logger = logging.getLogger("absl")
    level, first, second = logger.level, quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logger.level > logging.CRITICAL
    second.__exit__(None, None, None)
    assert logger.level == level


def test_reads_given_up_are_dropped_after_a_failure_and_nothing_else(complaints):
    def fail():
        reads = [reader("/x/orbax/reads.py")]
        raise KeyError(len(reads))  # the frame holds them

    with pytest.raises(KeyError), quiet():
        fail()
    gc.collect()
    assert complaints == []
    closed = types.SimpleNamespace(object=None, exc_value=RuntimeError("Event loop is closed"))
    sys.unraisablehook(closed)
    assert complaints == []
    other = reader("/x/ours.py")
    del other
    gc.collect()
    assert complaints == ["a read that was given up"]


def test_where_nothing_fails_all_complaints_pass(complaints):
    with quiet():
        pass
    other = reader("/x/orbax/reads.py")
    del other
    gc.collect()
    assert complaints == ["a read that was given up"]


def test_first_cause():
    def fail():
        try:
            try:
                raise ValueError("first")
            except ValueError as error:
                raise KeyError("second") from error
        except KeyError:
            raise RuntimeError("third")  # noqa: B904

    with pytest.raises(RuntimeError) as error:
        fail()
    assert str(first_cause(error.value)) == "first"
