"""Tests where the cache is; test_buckets.py tests the copies of bucket objects in it."""

import os
import pathlib
import stat
import tempfile

import pytest

from varjax.errors import InputError
from varjax.storage import cache_dir


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """Leaves the user without a home folder, in both the environment and the system's accounts."""
    for name in ("VARJAX_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without a home folder
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache_dir._temporary_cache.cache_clear()
    yield tmp_path
    cache_dir._temporary_cache.cache_clear()


def test_environment_variables_set_the_cache_folder(monkeypatch, tmp_path):
    for name in ("VARJAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir.cache_folder() == tmp_path / ".cache/varjax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir.cache_folder() == tmp_path / "xdg/varjax"
    monkeypatch.setenv("VARJAX_CACHE", "~/own")
    assert cache_dir.cache_folder() == tmp_path / "own"


def test_without_a_home_folder_the_cache_is_a_private_temporary_folder(homeless, capsys):
    folder = cache_dir.cache_folder()
    assert folder == cache_dir.cache_folder() == homeless / f"varjax-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (line,) = capsys.readouterr().err.splitlines()  # printed only once
    assert "no home folder" in line and str(folder) in line and "set VARJAX_CACHE" in line


@pytest.mark.parametrize("taken", ["writable by all", "a link", "a file"])
def test_a_temporary_folder_that_others_may_have_made_is_not_trusted(homeless, taken):
    planted = homeless / f"varjax-{os.getuid()}"
    if taken == "a file":
        planted.touch()
    elif taken == "a link":
        (homeless / "elsewhere").mkdir()
        planted.symlink_to(homeless / "elsewhere")
    else:
        planted.mkdir()
        planted.chmod(0o777)
    folder = cache_dir.cache_folder()
    assert folder != planted and folder.parent == homeless and not folder.is_symlink()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and not any(pathlib.Path(folder).iterdir())


def test_a_cache_in_an_unknown_home_folder_is_refused(homeless, monkeypatch):
    monkeypatch.setenv("VARJAX_CACHE", "~/cache")
    with pytest.raises(InputError, match="VARJAX_CACHE=~/cache: .* Write the whole path"):
        cache_dir.cache_folder()
