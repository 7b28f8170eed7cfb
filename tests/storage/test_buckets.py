"""Tests bucket paths on fsspec's in-memory file system; test_bucket_server.py uses a server."""

import os
import pathlib
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest

from tests.helpers.memory_buckets import MemoryBuckets, use_memory_buckets
from tests.helpers.paths import ROOT
from varjax.errors import InputError, StorageError
from varjax.storage import buckets, cache_dir, files, folders
from varjax.storage.cache_dir import cache_folder


@pytest.fixture(autouse=True)
def memory(monkeypatch, tmp_path):
    use_memory_buckets(monkeypatch.setitem, monkeypatch.setattr)
    monkeypatch.setenv("VARJAX_CACHE", str(tmp_path / "cache"))
    return MemoryBuckets


BOTH = pytest.mark.parametrize("root", ["gs://b/x", "s3://b/x"])


def names():
    return sorted(MemoryBuckets.store)


def test_paths_on_disks_and_in_buckets_are_distinguished():
    for text in "runs/a", "/data", "a:b", "~x":
        path = buckets.as_path(text)
        assert path == pathlib.Path(text) and not buckets.in_bucket(path)
    path = buckets.as_path("gs://b/x/")
    assert str(path / "y.png") == "gs://b/x/y.png" and buckets.in_bucket(path / "y.png")
    assert str(buckets.as_path(pathlib.Path("s3://b/x"))) == "s3://b/x"  # pathlib removes a slash


@pytest.mark.parametrize("text", ["http://a/b", "gs://", "file:///a", "GS://b/x"])
def test_unsupported_addresses_are_refused(text):
    with pytest.raises(InputError, match="gs://BUCKET/"):
        buckets.as_path(text)


def test_a_missing_package_is_named(monkeypatch):
    def missing(_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    buckets._set_up.cache_clear()
    with pytest.raises(InputError, match=r'pip install s3fs, or pip install "\.\[s3\]"'):
        buckets.as_path("s3://b/x")
    buckets._set_up.cache_clear()


@BOTH
def test_a_file_is_complete_or_absent(root, memory):
    path = f"{root}/a/b.json"
    files.write_json(path, {"a": 1})
    assert files.read_json(path) == {"a": 1} and names() == ["/b/x/a/b.json"]
    with pytest.raises(KeyError), files.atomic_path(path) as temporary:
        temporary.write_text("half of i")
        raise KeyError
    memory.failing = "b.json"
    with pytest.raises(StorageError, match="ConnectionError: the line is cut"):
        files.write_json(path, {"a": 2})
    memory.failing = ""
    assert files.read_json(path) == {"a": 1} and names() == ["/b/x/a/b.json"]
    with pytest.raises(InputError, match="does not exist"):
        files.read_json(f"{root}/c.json")


def write_folder(path, **texts):
    with files.atomic_path(path) as temporary:
        temporary.mkdir()
        for name, text in texts.items():
            (temporary / name.replace("_", ".")).write_text(text)


@BOTH
def test_the_index_file_of_a_folder_is_uploaded_last(root, memory):
    write_folder(f"{root}/w", config_json="1", a_bin="1", z_bin="1")
    assert [name for _, name in memory.calls] == [
        f"{root}/w/{name}" for name in ("a.bin", "z.bin", "config.json")
    ]
    # A kill during a replacement leaves no index file, so the mixture does not look complete.
    memory.failing = "z.bin"
    with pytest.MonkeyPatch.context() as killed, pytest.raises(StorageError):
        killed.setattr(memory, "rm", lambda *_, **__: None)
        write_folder(f"{root}/w", config_json="2", a_bin="2", z_bin="2")
    assert names() == ["/b/x/w/a.bin", "/b/x/w/z.bin"]
    # After a network failure, nothing is left.
    with pytest.raises(StorageError):
        write_folder(f"{root}/w", config_json="2", a_bin="2", z_bin="2")
    assert names() == []
    memory.failing = ""
    write_folder(f"{root}/w", config_json="3", a_bin="3")
    assert names() == ["/b/x/w/a.bin", "/b/x/w/config.json"]
    assert {(buckets.as_path(root) / "w" / n).read_text() for n in ("a.bin", "config.json")} == {
        "3"
    }


@BOTH
def test_only_one_of_several_writers_creates_a_file(root):
    assert files.create_json(f"{root}/r.json", {"a": 1})
    assert not files.create_json(f"{root}/r.json", {"a": 2})
    assert files.read_json(f"{root}/r.json") == {"a": 1}


@BOTH
def test_a_local_copy_is_made_once_per_content(root, memory):
    path = buckets.as_path(root) / "t.safetensors"
    assert files.local_copy(path) == path  # the object does not exist
    assert files.local_copy("here.txt") == pathlib.Path("here.txt")
    for number in 1, 2:
        files.write_tensors(path, {"a": np.full(3, number)}, {})
        for _ in range(2):
            tree, _ = files.read_tensors(path)
            np.testing.assert_array_equal(tree["a"], number)
        assert [kind for kind, _ in memory.calls].count("get") == number
    assert files.local_copy(path).name == path.name


@BOTH
def test_an_interrupted_local_copy_of_a_folder_is_completed(root, memory, monkeypatch):
    for name in "a/1.txt", "a/2.txt", "b/3.txt":
        with files.atomic_path(f"{root}/d/{name}") as temporary:
            temporary.write_text(name)
    (copy := files.local_copy(f"{root}/d")).joinpath("a/2.txt").unlink()
    memory.calls.clear()
    assert files.local_copy(f"{root}/d") == copy
    assert memory.calls == [("get", f"{root}/d/a/2.txt")]
    found = {str(p.relative_to(copy)): p.read_text() for p in copy.rglob("*.txt")}
    assert found == {name: name for name in ("a/1.txt", "a/2.txt", "b/3.txt")}


@BOTH
def test_a_mirror_uploads_only_changed_files(root, memory):
    path = buckets.as_path(root) / "run"
    with files.atomic_path(path / "log") as temporary:
        temporary.write_text("1\n")
    mirror = buckets.LocalMirror(path, ("log", "missing"))
    with open(mirror.folder / "log", "a") as file:
        file.write("2\n")
    (mirror.folder / "board").mkdir()
    (mirror.folder / "board" / "events").write_text("e")
    memory.calls.clear()
    for _ in range(2):
        mirror.upload()
        assert sorted(name for _, name in memory.calls) == [f"{path}/board/events", f"{path}/log"]
    assert (path / "log").read_text() == "1\n2\n"
    (mirror.folder / "log").write_text("3\n")
    mirror.upload(every=60)
    assert (path / "log").read_text() == "1\n2\n"
    mirror.close()
    assert (path / "log").read_text() == "3\n"
    assert not mirror.folder.exists()


def test_a_mirror_of_a_folder_on_a_disk_is_the_folder_itself(tmp_path):
    mirror = buckets.LocalMirror(tmp_path)
    mirror.close()
    assert mirror.folder == tmp_path and tmp_path.is_dir()


@BOTH
def test_objects_are_listed_moved_and_removed(root):
    path = buckets.as_path(root)
    for name in "a/1.txt", "a/2.txt", "3.txt":
        with files.atomic_path(path / name) as temporary:
            temporary.write_text(name)
    found, objects = buckets.list_folder(path)
    assert (found, objects) == (["a"], ["3.txt"]) and buckets.list_folder(path / "c") == ([], [])
    assert list(buckets.object_versions(path)) == ["3.txt", "a/1.txt", "a/2.txt"]
    files.move(path / "a", path / "c")
    assert names() == ["/b/x/3.txt", "/b/x/c/1.txt", "/b/x/c/2.txt"]
    for _ in range(2):
        files.remove(path / "c")
    assert names() == ["/b/x/3.txt"]


@BOTH
def test_a_folder_in_a_bucket_can_be_claimed_but_not_locked(root, capsys):
    folders.claim_folder(buckets.as_path(root) / "o", "request.json", {"a": 1})
    with pytest.raises(InputError, match="made with other settings"):
        folders.claim_folder(buckets.as_path(root) / "o", "request.json", {"a": 2})
    with folders.lock_folder(root), folders.lock_folder(root):
        assert not folders.is_locked(root)
    assert "a bucket has no locks" in capsys.readouterr().err


@BOTH
@pytest.mark.parametrize(
    "name", ["../../../.bashrc", "a/../../b", "./a", "/etc/passwd", "a//b", "a\0b", "\ud800"]
)
def test_an_object_whose_name_leads_elsewhere_is_not_copied(root, memory, tmp_path, name):
    (tmp_path / "cache").mkdir()
    memory().pipe_file(f"{root}/d/good.txt", b"good")
    place = f"/b/x/d/{name}"
    memory.store[place] = memory.store["/b/x/d/good.txt"]
    with pytest.raises(InputError, match="names a file .*names must be relative") as caught:
        files.local_copy(f"{root}/d")
    assert str(caught.value).isprintable() and not memory.calls
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(InputError, match="is not a supported address"):
        files.local_copy(f"{root}/d/../e")


@BOTH
def test_only_copies_that_no_process_uses_are_removed(root, tmp_path, monkeypatch):
    """Copies beyond the limit are removed, except those that this or another process uses."""
    for name in "abcd":
        with files.atomic_path(f"{root}/{name}") as temporary:
            temporary.write_bytes(bytes(100))
    copies = [files.local_copy(f"{root}/{name}") for name in "abc"]
    for age, copy in zip((3, 2, 1), copies, strict=True):
        os.utime(copy.parent, (time.time() - age * 86400,) * 2)
    monkeypatch.setattr(cache_dir, "MAX_COPY_BYTES", 150)
    files.local_copy(f"{root}/d")
    assert all(copy.exists() for copy in copies)  # this process uses them

    for descriptor in cache_dir._locks.values():
        os.close(descriptor)  # as if this process had ended
    cache_dir._locks.clear()
    used = f"import time; from varjax.storage import cache_dir; cache_dir.use_copy({copies[1].parent.name!r}); print(1, flush=True); time.sleep(60)"  # noqa: E501
    other = subprocess.Popen([sys.executable, "-c", used], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline()
        os.utime(copies[1].parent, (time.time() - 2 * 86400,) * 2)
        cache_dir.prune_copies()
        assert [copy.exists() for copy in copies] == [False, True, False]
        assert len(list((tmp_path / "cache/buckets").iterdir())) == 2  # b and d
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    monkeypatch.setattr(cache_dir, "COPY_DAYS", 1)
    cache_dir.prune_copies()
    assert [copy.exists() for copy in copies] == [False, False, False]
    left = {path.name for path in (tmp_path / "cache/buckets").iterdir()}
    assert len(left) == 1  # d, the most recently used one


def test_a_cache_in_a_bucket_is_refused(monkeypatch):
    monkeypatch.setenv("VARJAX_CACHE", "gs://b/cache")
    with pytest.raises(InputError, match="must be a folder on a disk"):
        cache_folder()


def test_only_listed_modules_call_pathlib_path():
    """pathlib.Path would turn an address into a local folder "gs:"."""
    local = {
        "storage/buckets.py",
        "storage/files.py",
        "storage/cache_dir.py",
        "config/config_flags.py",
        "training/metric_writers.py",
    }
    local |= {"convert/pretrained.py", "data/array_record.py"}  # files of the Hub; temporary files
    local |= {"benchmark/partitioning.py", "evaluation/digits_report.py"}
    local |= {"benchmark/checksum.py", "data/sources/tfds.py"}  # a temporary file; a local copy
    local |= {"sampling/rejection.py", "demo/__main__.py", "demo/draw_tab.py"}  # temporary folders
    local |= {"checkpoints/class_names.py"}  # a file of the package
    local |= {"export/exported_model.py", "export/run.py"}  # they run without varjax
    local |= {"export/folder.py"}  # files of installed packages
    local |= {"runtime/hardware.py"}  # a container's limits on Linux
    found = {
        str(file.relative_to(ROOT / "varjax"))
        for file in (ROOT / "varjax").rglob("*.py")
        if "pathlib.Path(" in file.read_text()
    }
    assert found <= local


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_path_is_refused(text):
    """pathlib.Path would use the current folder."""
    with pytest.raises(InputError, match="name of a file or folder is empty; use . for"):
        buckets.as_path(text)
    assert buckets.as_path(".") == pathlib.Path()


def test_a_leading_tilde_is_expanded(monkeypatch, tmp_path):
    """bash does not expand it in --out=~/images."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert buckets.as_path("~/runs/x") == tmp_path / "runs/x"
    assert buckets.as_path("runs/~") == pathlib.Path("runs/~")


def test_a_name_too_long_for_file_systems_is_refused():
    with pytest.raises(InputError, match="aaa… has 256 bytes; the name of a file or folder has at"):
        files.exists("runs/" + 256 * "a")
    assert not files.exists("runs/" + 255 * "a")
