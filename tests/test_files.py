"""Folders and files appear whole or not at all."""

import hashlib

import pytest

from onerec_jax.errors import InputError
from onerec_jax.files import atomic_folder, file_hash, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_the_block_ends(tmp_path):
    folder = tmp_path / "deep" / "out"
    with atomic_folder(folder) as tmp:
        (tmp / "a").write_text("new")
        assert not folder.exists()
    assert (folder / "a").read_text() == "new"
    assert names(tmp_path / "deep") == ["out"]
    assert folder.stat().st_mode & 0o777 == 0o755


def fail_halfway(folder, error):
    def write():
        with atomic_folder(folder) as tmp:
            (tmp / "a").write_text("half")
            raise error

    with pytest.raises(error):
        write()


def test_an_error_leaves_nothing(tmp_path):
    fail_halfway(tmp_path / "out", ZeroDivisionError)
    assert names(tmp_path) == []


def test_an_error_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a").write_text("old")
    fail_halfway(folder, KeyboardInterrupt)
    assert (folder / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_the_new_folder_replaces_the_old_one_whole(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")
    with atomic_folder(str(folder)) as tmp:
        (tmp / "new").write_text("new")
        assert names(folder) == ["old"]
    assert names(folder) == ["new"]
    assert names(tmp_path) == ["out"]


def test_write_text_replaces(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    write_text(str(path), "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


def test_file_hash(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert file_hash(path) == hashlib.sha256(b"abc").hexdigest()[:16]
    for missing in (tmp_path / "b", tmp_path):
        with pytest.raises(InputError, match=str(missing)):
            file_hash(missing)
