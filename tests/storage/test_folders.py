import errno
import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from tests.helpers.paths import ROOT
from varjax.errors import InputError, StorageError
from varjax.storage import files, folders
from varjax.storage.folders import (
    check_writable,
    files_below,
    locked_work_folder,
    remove_work_folder,
)


def test_a_lock_is_held_until_its_context_or_process_ends(tmp_path):
    lock = f"with folders.lock_folder({str(tmp_path)!r}): print(); input()"
    code = f"from varjax.storage import folders\n{lock}"
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        other.stdout.readline()
        with (
            pytest.raises(ValueError, match=r"another process \(.*, \d+\) is using"),
            folders.lock_folder(tmp_path),
        ):
            pass
        other.kill()
    for _ in range(2):
        with folders.lock_folder(tmp_path):
            pass


def test_a_folder_with_foreign_files_is_not_replaceable(tmp_path):
    out = tmp_path / "out"
    folders.check_replaceable(out)
    out.mkdir()
    folders.check_replaceable(out)
    for name in ("config.json", ".git"):
        (out / name).touch()
    folders.check_replaceable(out, {"config.json", ".git", "absent"})
    with pytest.raises(InputError, match=r"contains .git, which would be lost; choose another"):
        folders.check_replaceable(out, {"config.json"})
    with pytest.raises(InputError, match=r"contains config.json, which would be lost"):
        folders.check_replaceable(out / "config.json")


def test_a_folder_is_reused_only_for_the_same_request(tmp_path):
    out, request = tmp_path / "out", {"size": (3, 4), "seed": 0}
    out.mkdir()
    (out / ".hidden").touch()
    folders.claim_folder(out, "request.json", request, write=False)
    assert not (out / "request.json").exists()
    for _ in range(2):
        folders.claim_folder(out, "request.json", request)
        (out / "0.png").touch()
    with pytest.raises(InputError, match="seed: 0 there, 1 requested") as caught:
        folders.claim_folder(out, "request.json", {"size": [3, 4], "seed": 1})
    assert "size" not in str(caught.value)
    with pytest.raises(InputError, match="cfg: absent there, 2 requested"):
        folders.claim_folder(out, "request.json", request | {"cfg": 2})
    with pytest.raises(InputError, match="holds files and no other.json"):
        folders.claim_folder(out, "other.json", request)
    with pytest.raises(InputError, match="request.json is a file; choose another folder"):
        folders.claim_folder(out / "request.json", "request.json", request)


def test_claiming_waits_for_a_request_file_that_is_not_listed_yet(tmp_path, monkeypatch):
    """A network disk may list the files of another machine before their request file."""
    monkeypatch.setattr(folders, "LISTING_SECONDS", 10.0)
    (tmp_path / "0.png").touch()
    write = lambda: files.write_json(tmp_path / "request.json", {"seed": 0})  # noqa: E731
    timer = threading.Timer(0.3, write)
    timer.start()
    begin = time.monotonic()
    folders.claim_folder(tmp_path, "request.json", {"seed": 0})
    assert 0.2 < time.monotonic() - begin < 5
    timer.join()


def test_only_one_of_several_concurrent_claims_succeeds(tmp_path, monkeypatch):
    create = folders.create_json

    def slower_than_another(path, request):
        create(path, {"seed": 1})
        return create(path, request)

    monkeypatch.setattr(folders, "create_json", slower_than_another)
    with pytest.raises(InputError, match="seed: 1 there, 0 requested"):
        folders.claim_folder(tmp_path, "request.json", {"seed": 0})
    folders.claim_folder(tmp_path, "request.json", {"seed": 1})


def test_the_lock_file_is_opened_for_writing(tmp_path, monkeypatch):
    """NFS locks only files that are open for writing."""
    flock, held = fcntl.flock, []

    def flock_on_nfs(descriptor, operation):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)
        held.append(descriptor)

    monkeypatch.setattr(fcntl, "flock", flock_on_nfs)
    with folders.lock_folder(tmp_path / "new"):
        with pytest.raises(InputError, match="is using"), folders.lock_folder(tmp_path / "new"):
            pass
    assert held and [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
    folders.claim_folder(tmp_path / "new", "request.json", {})  # hidden files do not count
    (tmp_path / "new" / "request.json").unlink()
    folders.check_replaceable(tmp_path / "new")


def test_unsupported_locks_are_reported_once(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for _ in range(2):
        with folders.lock_folder(tmp_path), folders.lock_folder(tmp_path):
            pass
    said = capsys.readouterr().err
    assert said.count("cannot be locked") == 1 and "No locks available" in said
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file cannot be locked"):
        with folders.lock_folder(tmp_path / "file"):
            pass


def test_a_user_who_may_only_read_sees_the_lock():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with folders.lock_folder(folder):
            os.chmod(os.path.join(folder, folders.LOCK_FILE), 0o444)
            as_root = os.geteuid() == 0  # root may write everywhere
            try:
                if as_root:
                    os.seteuid(65534)
                assert folders.is_locked(folder)
            finally:
                if as_root:
                    os.seteuid(0)


def test_checking_a_lock_does_not_prevent_taking_it(tmp_path, monkeypatch):
    looking = os.open(tmp_path / folders.LOCK_FILE, os.O_RDONLY | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_SH)  # as is_locked briefly does
    monkeypatch.setattr(folders.time, "sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN))
    with folders.lock_folder(tmp_path):
        pass
    os.close(looking)


def test_a_folder_removed_while_its_lock_is_awaited_is_locked_again(tmp_path):
    """Otherwise two processes could hold the lock, one of them on a deleted file."""
    folder, came = tmp_path / "d", threading.Event()

    def wait():
        with folders.lock_folder(folder, wait=True):
            came.set()
            finish.wait(10)

    finish, waiting = threading.Event(), threading.Thread(target=wait)
    with folders.lock_folder(folder):
        waiting.start()
        assert not came.wait(0.2)
        shutil.rmtree(folder)
    try:
        assert came.wait(10)
        with pytest.raises(InputError, match="is using"), folders.lock_folder(folder):
            pass
    finally:
        finish.set()
        waiting.join()


def test_a_locked_work_folder_is_refused_and_keeps_no_lock_file(tmp_path):
    folder = tmp_path / "images"
    with locked_work_folder(folder):
        (folder / "a.png").touch()
        with (
            pytest.raises(InputError, match=rf"{os.getpid()}.* is using .*images"),
            locked_work_folder(folder),
        ):
            pass
    assert [path.name for path in folder.iterdir()] == ["a.png"]
    with locked_work_folder(folder):  # it is free again
        pass


def test_a_failure_releases_the_lock_and_removes_an_empty_folder(tmp_path):
    with pytest.raises(KeyError), locked_work_folder(tmp_path / "new"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_work_folder_is_removed_with_its_lock_file(tmp_path, monkeypatch):
    folder = tmp_path / "parts"
    with locked_work_folder(folder):
        (folder / "0.npy").touch()
        remove_work_folder(folder)
        assert not folder.exists()
    assert not folder.exists()

    def as_on_nfs(path):
        (path / "0.npy").unlink()
        raise OSError(errno.ENOTEMPTY, "a file that is open stays")

    monkeypatch.setattr(folders, "remove", as_on_nfs)
    with locked_work_folder(folder):
        (folder / "0.npy").touch()
        remove_work_folder(folder)
        assert folder.exists()
    assert not folder.exists()


def test_folders_that_cannot_be_written_are_refused_in_advance(tmp_path):
    check_writable(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "x", pathlib.Path("/proc/varjax")):
        with pytest.raises(InputError, match=f"cannot write to {folder} .*; choose another folder"):
            check_writable(folder)


def test_files_are_found_through_links_and_link_loops_end(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("a/1", "a/b/2", "elsewhere/3"):
        (tmp_path / name).write_text("")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "b" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "gone").symlink_to(tmp_path / "none")
    found = sorted(str(x.relative_to(tmp_path / "a")) for x in files_below(tmp_path / "a"))
    assert found == ["1", "b/2", "gone", "linked/3"]
    for i in range(8):
        for name in ("first", "second"):
            (tmp_path / f"doubled{i}").mkdir(exist_ok=True)
            (tmp_path / f"doubled{i}" / name).symlink_to(tmp_path / f"doubled{i + 1}")
    (tmp_path / "doubled8").mkdir()
    with pytest.raises(InputError, match="reached by more than 64 ways"):
        list(files_below(tmp_path / "doubled0"))
