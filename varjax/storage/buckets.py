"""Uses buckets like folders: paths gs://BUCKET/… and s3://BUCKET/…, uploads, and local mirrors.

An object is complete or absent, even if its writer is killed. Objects cannot be appended to,
locked, or renamed in one step. Files are therefore made on the local disk and uploaded when they
are complete (`varjax.storage.files.atomic_path`).

epath gives such paths the methods of pathlib.Path, and fsspec transfers the bytes. gcsfs or s3fs,
which varjax does not depend on, connect to the service.
"""

import contextlib
import functools
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any, cast

import fsspec
from etils import epath
from fsspec import config as fsspec_config

from varjax.errors import InputError, StorageError, needs_extra
from varjax.storage.untrusted import check_relative_name

# By the scheme of an address.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
EXTRAS = {"gs": "gcs", "s3": "s3"}
# pathlib.Path("gs://bucket") has one slash less.
ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):/(?P<slash>/?)(?P<rest>.*)", re.DOTALL)
# Each service has some of these fields, and at least one of them changes with an object's content.
VERSION_FIELDS = "size", "generation", "etag", "ETag", "mtime", "LastModified", "created"
MAX_NAME_BYTES = 255  # of ext4, XFS, APFS and most others
# Files that describe the others in their folder. Readers open them first, so they are written last.
INDEX_FILES = "config.json", "dataset_info.json"


def as_path(location: str | os.PathLike) -> pathlib.Path:
    """Returns a path on a disk or in a bucket; both have the methods of pathlib.Path.

    A path in a bucket lacks the methods that a bucket does not support, and its `stat` returns
    `length` and `mtime`.

    Raises:
        InputError: the name is empty or too long, the address is neither gs://… nor s3://…, or the
            package for it is missing.
    """
    text = os.fspath(location)
    if not text.strip():  # pathlib would use the current folder
        raise InputError("the name of a file or folder is empty; use . for the current folder")
    match = ADDRESS.match(text)
    if match is None or not (match["slash"] or match["scheme"] in PACKAGES):
        return _local_path(pathlib.Path(location))
    scheme, rest = match["scheme"], match["rest"].strip("/")
    # The last part becomes the name of a local copy.
    if scheme not in PACKAGES or not rest or {".", ".."} & set(rest.split("/")):
        raise InputError(
            f"{text} is not a supported address; use a folder or file, gs://BUCKET/… or "
            "s3://BUCKET/…"
        )
    _set_up(scheme)
    return cast(pathlib.Path, epath.Path(f"{scheme}://{rest}"))


def _local_path(path: pathlib.Path) -> pathlib.Path:
    """Returns a path with its ~ expanded, because shells do not do that in --out=~/images."""
    if path.parts[:1] == ("~",):
        path = path.expanduser()
    longest = max((os.fsencode(part) for part in path.parts), key=len, default=b"")
    if len(longest) > MAX_NAME_BYTES:
        raise InputError(
            f"{os.fsdecode(longest[:40])}… has {len(longest)} bytes; the name of a file or folder "
            f"has at most {MAX_NAME_BYTES}"
        )
    return path


def real_path(location: str | os.PathLike) -> str:
    """Returns the one name that all names of a folder lead to, through links and ~."""
    path = as_path(location)
    return os.fspath(path) if in_bucket(path) else os.path.realpath(path)


def short_path(location: str | os.PathLike) -> str:
    """Returns the end of a path for a title: "runs/digits"."""
    return "/".join(pathlib.PurePath(location).parts[-2:])


def in_bucket(path: str | os.PathLike) -> bool:
    """Returns whether a path is in a bucket."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in PACKAGES))


def absolute(path: pathlib.Path) -> pathlib.Path:
    """Returns the absolute path; a path in a bucket is returned unchanged."""
    return path if in_bucket(path) else path.absolute()


def upload(local: pathlib.Path, path: pathlib.Path) -> None:
    """Uploads a file or folder; each object is complete or absent.

    When a folder is replaced, its INDEX_FILES are removed first and uploaded last, so that a
    mixture of old and new files never looks complete. If the service refuses, raises StorageError
    and removes the folder.
    """
    fs = _file_system(path)
    with storage_errors(path, "written"):
        if local.is_file():
            fs.put_file(str(local), str(path))
            return
        names = [str(file.relative_to(local)) for file in local.rglob("*") if file.is_file()]
        before = set(object_versions(path)) if path.is_dir() else set()
        for name in sorted(before - set(names) | before & set(INDEX_FILES), key=_index_first):
            fs.rm_file(str(path / name))
        try:
            for name in sorted(names, key=lambda name: (name in INDEX_FILES, name)):
                fs.put_file(str(local / name), str(path / name))
        except Exception:
            with contextlib.suppress(Exception):  # the network may have failed
                fs.rm(str(path), recursive=True)
            raise


def create_object(path: pathlib.Path, data: bytes) -> bool:
    """Writes an object unless it exists; returns True to the one writer that created it."""
    with storage_errors(path, "written"):
        try:
            _file_system(path).pipe_file(str(path), data, mode="create")
        except FileExistsError:
            return False
    return True


def object_versions(path: pathlib.Path) -> dict[str, str]:
    """Lists the objects below a folder; the object at `path` itself has the name "".

    Returns:
        {path below `path`: text that changes with the content}; {} if nothing exists.

    Raises:
        InputError: an object's name leads out of the folder; see `untrusted.check_relative_name`.
        StorageError: the bucket cannot be read.
    """
    with storage_errors(path, "read"):
        fs = _file_system(path)
        root = fs._strip_protocol(str(path))
        objects = fs.find(str(path), detail=True)
    versions = {}
    for key, info in sorted(cast("dict[str, dict[str, Any]]", objects).items()):
        if info["type"] != "file" or key.endswith("/"):  # placeholder of an empty folder
            continue
        if name := key[len(root) :].removeprefix("/"):
            check_relative_name(name, path)
        versions[name] = repr([info.get(field) for field in VERSION_FIELDS])
    return versions


def remove_objects(path: pathlib.Path) -> None:
    """Removes an object, or all objects below a folder, if any exist."""
    with storage_errors(path, "removed"):
        if path.exists():
            _file_system(path).rm(str(path), recursive=True)


def move_objects(path: pathlib.Path, to: pathlib.Path) -> None:
    """Moves all objects below a folder, one by one."""
    with storage_errors(path, "moved"):
        _file_system(path).mv(str(path), str(to), recursive=True)


def list_folder(path: pathlib.Path) -> tuple[list[str], list[str]]:
    """Returns the names of the folders and the names of the objects in a folder, if it exists."""
    folders, objects = [], []
    with storage_errors(path, "read"), contextlib.suppress(FileNotFoundError):
        fs = _file_system(path)
        for entry in fs.ls(str(path), detail=True):
            key = entry["name"].strip("/")
            if key == fs._strip_protocol(str(path)).strip("/"):
                continue  # placeholder of the folder itself
            name = key.rpartition("/")[2]
            (folders if entry["type"] == "directory" else objects).append(name)
    return folders, objects


def download_object(path: pathlib.Path, local: pathlib.Path) -> None:
    """Copies an object to a local file; raises StorageError if it cannot be read."""
    options = {"desc": f"copying {path.name}", "unit": "B", "unit_scale": True, "delay": 2}
    with storage_errors(path, "read"):
        bar = fsspec.callbacks.TqdmCallback(tqdm_kwargs=options)
        _file_system(path).get_file(str(path), str(local), callback=bar)


class LocalMirror:
    """Mirrors a folder of a bucket on the local disk, for files that grow.

        mirror = LocalMirror(run_dir)
        open(mirror.folder / "metrics.jsonl", "a").write("…")
        mirror.upload()
        mirror.close()

    If the path is on a disk, `folder` is the path itself and the methods do nothing.

    Args:
        path: remote folder that the local folder mirrors.
        names: files to download first, if they exist.

    Attributes:
        folder: path of the local folder.
    """

    def __init__(self, path: pathlib.Path, names: tuple[str, ...] = ()):
        self._path, self._sent, self._uploaded = path, {}, time.monotonic()
        self.folder = path
        if in_bucket(path):
            self.folder = pathlib.Path(tempfile.mkdtemp(prefix="varjax_"))
            for name in names:
                if (path / name).exists():
                    download_object(path / name, self.folder / name)

    def upload(self, every: float = 0.0) -> None:
        """Uploads the files that have changed; raises StorageError if that fails.

        Does nothing within `every` seconds of the last upload.
        """
        if self.folder == self._path or time.monotonic() - self._uploaded < every:
            return
        for file in sorted(self.folder.rglob("*")):
            stat = file.stat()
            if file.is_file() and self._sent.get(file) != (state := (stat.st_size, stat.st_mtime)):
                upload(file, self._path / file.relative_to(self.folder))
                self._sent[file] = state
        self._uploaded = time.monotonic()

    def close(self) -> None:
        """Uploads the files and removes the local folder."""
        self.upload()
        if self.folder != self._path:
            shutil.rmtree(self.folder)


def _index_first(name: str) -> tuple[bool, str]:
    return name not in INDEX_FILES, name


@functools.cache
def _set_up(scheme: str) -> None:
    # epath would use TensorFlow's client if that is installed.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # Other processes also write to the bucket, so listings must not be cached.
    fsspec_config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    with needs_extra(EXTRAS[scheme], PACKAGES[scheme], f"{scheme}://"):
        fsspec.get_filesystem_class(scheme)


def _file_system(path: pathlib.Path) -> Any:
    return fsspec.filesystem(str(path).partition("://")[0])


@contextlib.contextmanager
def storage_errors(path: pathlib.Path, verb: str) -> Iterator[None]:
    """Turns exceptions of a bucket into StorageError; those of a path on a disk pass through.

    The services' packages raise many types of exceptions for a missing permission or network.

    Args:
        path: file or folder being accessed.
        verb: participle for the message, "read" or "written".
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not in_bucket(path):
            raise
        reason = f"{type(error).__name__}: {error}"[:500]
        raise StorageError(f"{path} could not be {verb}: {reason}") from error
