"""Keeps the buckets of Google and S3 in memory, with fsspec's memory file system."""

import importlib

from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

REGISTRY = importlib.import_module(
    "fsspec.registry"
)  # the attribute fsspec.registry is something else


class MemoryBuckets(MemoryFileSystem):
    """Holds all buckets of both services; records writes and reads, and fails on request."""

    protocol = ("gs", "gcs", "s3")
    store, pseudo_dirs = {}, [""]
    calls: list[tuple[str, str]] = []
    failing = ""  # suffix of names that cannot be written

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).partition("://")[2].strip("/") if "://" in str(path) else str(path)

    def put_file(self, lpath, rpath, **kwargs):
        if self.failing and str(rpath).endswith(self.failing):
            raise ConnectionError("the line is cut")
        self.calls.append(("put", str(rpath)))
        super().put_file(lpath, rpath, **kwargs)

    def get_file(self, rpath, lpath, **kwargs):
        self.calls.append(("get", str(rpath)))
        super().get_file(rpath, lpath, **kwargs)


def use_memory_buckets(setitem, setattr) -> None:
    """Replaces both services by MemoryBuckets, with functions like those of monkeypatch."""
    for scheme in MemoryBuckets.protocol:
        setitem(REGISTRY._registry, scheme, MemoryBuckets)
    # epath caches its file systems
    setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda *_: MemoryBuckets())
    setattr(MemoryBuckets, "store", {})
    setattr(MemoryBuckets, "pseudo_dirs", [""])
    setattr(MemoryBuckets, "calls", [])
