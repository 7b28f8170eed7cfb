"""The lock of a folder that is filled step by step: one command at a time, no trace afterwards."""

import errno
import os
import pathlib

import pytest

from varjax.errors import InputError
from varjax.storage import files
from varjax.storage.work_folders import check_writable, locked_work_folder, remove_work_folder


def test_a_second_one_is_told_and_nothing_of_the_lock_stays(tmp_path):
    folder = tmp_path / "images"
    with locked_work_folder(folder):
        (folder / "a.png").touch()
        with (
            pytest.raises(InputError, match=rf"{os.getpid()}.* is at work in .*images"),
            locked_work_folder(folder),
        ):
            pass
    assert [path.name for path in folder.iterdir()] == ["a.png"]
    with locked_work_folder(folder):  # it is free again
        pass


def test_a_failure_gives_the_lock_back_and_an_empty_folder_is_removed(tmp_path):
    with pytest.raises(KeyError), locked_work_folder(tmp_path / "new"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_folder_is_removed_with_the_lock_in_it(tmp_path, monkeypatch):
    folder = tmp_path / "parts"
    with locked_work_folder(folder):
        (folder / "0.npy").touch()
        remove_work_folder(folder)
        assert not folder.exists()
    assert not folder.exists()

    def as_on_nfs(path):
        (path / "0.npy").unlink()
        raise OSError(errno.ENOTEMPTY, "a file that is open stays")

    monkeypatch.setattr(files, "remove", as_on_nfs)
    with locked_work_folder(folder):
        (folder / "0.npy").touch()
        remove_work_folder(folder)
        assert folder.exists()
    assert not folder.exists()


def test_where_nothing_can_be_written_is_said_beforehand(tmp_path):
    check_writable(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "x", pathlib.Path("/proc/varjax")):
        with pytest.raises(InputError, match=f"cannot write to {folder} .*; choose another out"):
            check_writable(folder)
