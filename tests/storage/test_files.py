import errno
import os
import stat
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.paths import ROOT
from varjax.errors import InputError, StorageError
from varjax.storage import files
from varjax.storage.safetensors_io import write_safetensors


def test_a_failure_leaves_the_old_content_and_no_temporary(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_replaced_as_a_whole(tmp_path):
    for content in ("old", "new"):
        with files.atomic_path(tmp_path / "d") as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["new"]


def test_tensors_round_trip_exactly(tmp_path):
    tree = {
        "a": {"kernel": np.arange(6.0).reshape(2, 3).T, "scale": jnp.float32(3)},
        "half": jnp.linspace(0, 1, 5, dtype=jnp.bfloat16),
        "flags": np.array([True, False]),
    }
    files.write_tensors(tmp_path / "t.safetensors", tree, {"from": "here"})
    read, metadata = files.read_tensors(tmp_path / "t.safetensors")
    assert metadata == {"from": "here"}
    assert read["half"].dtype == jnp.bfloat16 and read["a"]["scale"].shape == ()
    for a, b in ((tree["a"], read["a"]), (tree, read)):
        for name in a.keys() - {"a"}:
            np.testing.assert_array_equal(np.asarray(a[name]), b[name])


def test_missing_and_damaged_files_are_named(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(ValueError, match="t.safetensors does not exist"):
        files.read_tensors(path)
    files.write_tensors(path, {"a": np.ones(100)}, {})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="t.safetensors: truncated"):
        files.read_tensors(path)
    with pytest.raises(ValueError, match="is a directory"):
        files.read_json(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="t.safetensors is not valid JSON"):
        files.read_json(path)
    for text in ("5", "[1]", "null", '"a"'):
        path.write_text(text)
        with pytest.raises(InputError, match="t.safetensors contains .*, not a JSON object"):
            files.read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="t.safetensors is not valid JSON"):
        files.read_json(path)
    path.write_text("[" * 10**5)
    with pytest.raises(ValueError, match="t.safetensors is not valid JSON"):
        files.read_json(path)
    for names in (("a", "a/b"), ("a/b", "a/b/c"), ("a/b/c", "a/b")):
        write_safetensors(path, {name: np.ones(1) for name in names}, {})
        with pytest.raises(InputError, match="name of a tensor and of a group"):
            files.read_tensors(path)


def test_a_failed_write_raises_a_storage_error_that_names_the_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/a.json could not be written: .*File exists"):
        files.write_json(tmp_path / "file" / "a.json", {})
    full = OSError(28, "No space left on device")
    with (
        pytest.raises(StorageError, match="b could not be written: .*No space left"),
        files.atomic_path(tmp_path / "b") as temporary,
    ):
        temporary.write_text("half")
        raise full
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def fail_fsync(monkeypatch, code, folders):
    """Makes fsync of folders, or of files, raise an error."""
    fsync = os.fsync

    def fail(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_fsync_folders_is_supported(tmp_path, monkeypatch, code):
    fail_fsync(monkeypatch, code, folders=True)
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert files.create_json(tmp_path / "b.json", {"b": 1})
    write_folder(tmp_path / "d", "new")
    assert (tmp_path / "d/content.json").exists() and files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("code, folders", [(errno.EIO, True), (errno.EINVAL, False)])
def test_other_fsync_errors_are_raised(tmp_path, monkeypatch, code, folders):
    fail_fsync(monkeypatch, code, folders)
    with pytest.raises(StorageError, match=os.strerror(code)):
        files.write_json(tmp_path / "a.json", {"a": 1})


def test_replaced_files_and_folders_keep_their_permissions(tmp_path):
    path, folder = tmp_path / "a.json", tmp_path / "d"
    for mode in (0o600, 0o664):
        for written in (path, folder):
            files.write_json(path, {"a": 1})
            write_folder(folder, "old")
            os.chmod(written, mode | 0o100)
            files.write_json(path, {"a": 2})
            write_folder(folder, "new")
            assert stat.S_IMODE(written.stat().st_mode) == mode | 0o100
    assert files.read_json(path) == {"a": 2}


LEFT_BY_A_KILL = """
import os, sys
from varjax.storage import files
with files.atomic_path(sys.argv[1]) as temporary:
    temporary.mkdir()
    (temporary / "half").touch()
    os._exit(9)
"""


def test_writers_with_equal_process_ids_use_different_temporaries(tmp_path):
    path = tmp_path / "a"
    with files.atomic_path(path) as one, files.atomic_path(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_abandoned_temporaries_are_removed(tmp_path):
    command = [sys.executable, "-c", LEFT_BY_A_KILL, str(tmp_path / "a")]
    assert subprocess.run(command, cwd=ROOT).returncode == 9
    (dead,) = tmp_path.iterdir()
    _, name, own, _ = dead.name.split(".")
    machine, number, rest = own.split("-")
    elsewhere = "0" * len(machine)
    alive, fresh, old, written_to = (
        tmp_path / f".{name}.{who}-{rest}.tmp"
        for who in (f"{machine}-{os.getpid()}", *(f"{elsewhere}-{i}" for i in range(3)))
    )
    others = tmp_path / ".mine.tmp"
    for path in (alive, fresh, old, others):
        path.touch()
    written_to.mkdir()
    (written_to / "half").touch()
    long_ago = time.time() - 2 * files.ABANDONED_SECONDS
    for path in (old, written_to, others):
        os.utime(path, (long_ago, long_ago))
    files.write_json(tmp_path / "b", {})
    kept = {path.name for path in (alive, fresh, written_to, others)}
    assert {path.name for path in tmp_path.iterdir()} == kept | {"b"}


def write_folder(path, content):
    with files.atomic_path(path) as temporary:
        temporary.mkdir()
        files.write_json(temporary / "content.json", {"is": content})


@pytest.mark.parametrize("reader", [True, False])
def test_a_kill_while_a_folder_is_replaced_loses_nothing(tmp_path, monkeypatch, reader):
    path, rename, left = tmp_path / "d", os.rename, [1]
    monkeypatch.setattr(files, "REPLACED_SECONDS", 0.0)
    write_folder(path, "old")
    with monkeypatch.context() as patch:

        def rename_or_die(source, target):
            if not left:
                raise SystemExit
            rename(source, target)
            left.pop()

        patch.setattr(os, "rename", rename_or_die)
        with pytest.raises(SystemExit):
            write_folder(path, "new")
    assert not path.exists()
    if reader:
        assert files.read_json(path / "content.json") == {"is": "old"} and files.exists(path)
    write_folder(path, "newest")
    write_folder(path, "last")
    assert files.read_json(path / "content.json") == {"is": "last"}
    assert list(tmp_path.iterdir()) == [path]
    assert not files.exists(tmp_path / "absent") and not files.exists("absent")


def test_a_folder_that_cannot_be_replaced_is_kept(tmp_path, monkeypatch):
    write_folder(tmp_path / "d", "old")
    rename = os.rename

    def no_new_one(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", no_new_one)
    with pytest.raises(StorageError, match="d could not be written: .*Input/output"):
        write_folder(tmp_path / "d", "new")
    with pytest.raises(StorageError, match="d could not be written: .*directory"):
        files.write_json(tmp_path / "d", {"is": "a file"})
    assert files.read_json(tmp_path / "d" / "content.json") == {"is": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_links_are_kept_and_their_targets_replaced(tmp_path):
    disk, here = tmp_path / "disk", tmp_path / "here"
    disk.mkdir()
    here.mkdir()
    for name in ("file", "folder", "absent"):
        (here / name).symlink_to(disk / name)
    files.write_json(disk / "file", {"is": "old"})
    write_folder(disk / "folder", "old")
    for name in ("file", "absent"):
        files.write_json(here / name, {"is": "new"})
        assert files.read_json(disk / name) == {"is": "new"}
    write_folder(here / "folder", "new")
    assert files.read_json(disk / "folder" / "content.json") == {"is": "new"}
    assert all(path.is_symlink() for path in here.iterdir())
    assert len(list(disk.iterdir())) == len(list(here.iterdir())) == 3


@pytest.mark.parametrize("links", [True, False])
def test_create_json_creates_a_file_only_once(tmp_path, monkeypatch, links):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    assert files.create_json(tmp_path / "a", {"is": 1})
    assert not files.create_json(tmp_path / "a", {"is": 2})
    assert files.read_json(tmp_path / "a") == {"is": 1} and len(list(tmp_path.iterdir())) == 1
