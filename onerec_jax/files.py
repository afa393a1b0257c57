"""Artefacts that appear whole or not at all."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile

import numpy as np

from onerec_jax.errors import InputError


@contextlib.contextmanager
def atomic_folder(folder):
    """Yields a temporary sibling folder that becomes `folder` if the block ends well.

    An existing `folder` is replaced only then; on an error nothing changes.
    """
    folder = pathlib.Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield tmp
        old = None
        if folder.exists():
            old = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old)  # an empty folder gives way
        os.replace(tmp, folder)
        os.chmod(folder, 0o755)  # mkdtemp's are private
        if old:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def write_text(path, text: str) -> None:
    """Writes a text file by way of a temporary sibling."""
    path = pathlib.Path(path)
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def write_parquet(path, frame) -> None:
    """Writes a Polars data frame by way of a temporary sibling; makes the folder."""
    path = pathlib.Path(path)
    path.parent.mkdir(exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp")
    frame.write_parquet(tmp)
    os.replace(tmp, path)


def write_npz(path, arrays) -> None:
    """Writes arrays by name to an .npz file by way of a temporary sibling, one for each writer.

    Args:
      arrays: name -> array.

    Raises:
      FileNotFoundError: the folder is not there, or somebody has removed the sibling.
    """
    path = pathlib.Path(path)
    number, tmp = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            np.savez(file, **arrays)
        os.chmod(tmp, 0o644)  # mkstemp's are private
        os.replace(tmp, path)
    finally:
        pathlib.Path(tmp).unlink(missing_ok=True)


def read_json(path) -> dict:
    """A JSON file of ours.

    Raises:
      InputError: missing, unreadable or damaged.
    """
    try:
        return json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it and run again") from error


def file_hash(path) -> str:
    """SHA-256 of a file's bytes, 16 hex digits.

    Raises:
      InputError: no such file.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path") from error
