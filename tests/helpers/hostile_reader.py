"""Reads files as the converter does, in one process with little memory; prints a line for each.

python -m tests.helpers.hostile_reader FOLDER [SECONDS]: FOLDER/good.* are read first.
"""

import atexit
import json
import operator
import os
import pathlib
import resource
import shutil
import signal
import sys
import tempfile
import time
import types
import typing

from PIL import Image

from tests.helpers.guard import ForbiddenError, Guard
from tests.helpers.memory_buckets import MemoryBuckets, use_memory_buckets
from varjax.analysis.run_log import read_run_log
from varjax.checkpoints.saved_steps import SavedSteps
from varjax.checkpoints.weights import open_weights
from varjax.convert.apply_map import lazy_leaves
from varjax.convert.from_torch import find_kind, infer_configs
from varjax.convert.inception import read_graph
from varjax.convert.name_maps.name_map import Source
from varjax.convert.official_files import find_state_dicts, own_tensors
from varjax.convert.pth.read import read_checkpoint
from varjax.data import transforms
from varjax.errors import InputError
from varjax.metrics import references
from varjax.metrics.features import pixel_network
from varjax.metrics.image_sets import open_image_set, parts_of
from varjax.storage import files, read_errors
from varjax.storage.image_files import DECODING_BYTES, decode_file
from varjax.storage.image_io import read_image
from varjax.storage.npz import NpzArchive
from varjax.storage.untrusted import MAX_PIXELS, bytes_on_disk

ROOM, RATIO = 2**27, 16  # bytes of memory for reading: in any case, and per byte of the file
DATA = {"npz", "json", "run", "bucket", "orbax"}
OPTIONS = {
    "var": dict(),
    "tokenizer": dict(groups=4, scales=(1, 2)),
    "kl": dict(groups=4),
    "mar": dict(latent_channels=4, mar_heads=(2, 2)),
}


class OvertimeError(BaseException):
    """Reports a reader that takes too long; not an Exception, because readers may catch those."""


def read_data(kind: str, path: pathlib.Path) -> None:
    """Reads untrusted data in every way that commands do."""
    match kind:
        case "npz":
            archive = NpzArchive(path)
            if "mu" in archive.names:
                # Statistics need no extractor.
                extract = typing.cast(typing.Any, types.SimpleNamespace(network=pixel_network()))
                references.read_reference(path, extract, path, {"pool_ND": 8})
                return
            images = open_image_set(path)
            for _ in images.parts(parts_of(images.shape[0])):
                pass
        case "json":
            files.read_json(path)
        case "run":
            read_run_log(path)
            open_weights(path)
        case "bucket":
            for name in json.loads(path.read_text()):
                MemoryBuckets().pipe_file("gs://b/d/good", b"x")
                MemoryBuckets.store[f"/b/d/{name}"] = MemoryBuckets.store.pop("/b/d/good")
            try:
                files.local_copy("gs://b/d")
            finally:
                MemoryBuckets.store.clear()
        case "orbax":
            saved = SavedSteps(path)
            saved.params(saved.steps()[-1])
            saved.meta(saved.steps()[-1])


def describe(path: pathlib.Path) -> None:
    """Reads a file as commands do, official weights as `convert` does before it writes."""
    flag, kind, *_ = path.name.split(".")
    if (kind := kind if flag == "good" else flag) in DATA:
        read_data(kind, path)
        return
    if flag == "image":
        image_HWC = decode_file(path)
        transforms.center_crop(image_HWC, (256, 256))
        transforms.adm_center_crop(image_HWC, (256, 256))
        read_image(path, (256, 256, 3))
        return
    if flag == "inception":
        read_graph(path)
        return
    flag = "var" if flag == "good" else flag
    found = find_state_dicts(read_checkpoint(path))
    tensors = found.get(flag) or found[""]
    kind = find_kind(tensors, flag)
    own, _ = own_tensors(kind, tensors)
    config = infer_configs({kind.part: Source(path, kind, own)}, OPTIONS[flag])[kind.part]
    lazy_leaves(config, own, kind.own_options(OPTIONS[flag]))


def memory_used() -> int:
    """Returns the size of the process's address space, in bytes."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def main(folder: str, seconds: str = "10") -> None:
    def stop(*_):
        raise OvertimeError(f"after {seconds} s")

    read_errors.READ_PAUSES = (0.0,)
    use_memory_buckets(operator.setitem, setattr)
    target = tempfile.mkdtemp(prefix="varjax_hostile_")
    atexit.register(shutil.rmtree, target)
    os.environ["VARJAX_CACHE"] = target
    Image.init()  # otherwise Pillow imports the reader of a format on first use
    guard = Guard(pathlib.Path(target))
    signal.signal(signal.SIGALRM, stop)
    paths = pathlib.Path(folder).iterdir()
    for path in sorted(paths, key=lambda path: (not path.name.startswith("good."), path)):
        room = resource.RLIM_INFINITY
        if not path.name.startswith("good."):
            guard.complete = True
            room = memory_used() + ROOM + RATIO * bytes_on_disk(path)
            if path.name.startswith("image."):  # any file may be an image of 8192x8192
                room += DECODING_BYTES * MAX_PIXELS
        resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
        start, outcome, message = time.monotonic(), "read", ""
        signal.alarm(int(seconds))
        try:
            describe(path)
        except InputError as error:
            outcome, message = "refused", str(error)
        except (Exception, OvertimeError, ForbiddenError) as error:
            outcome, message = type(error).__name__, str(error)
        if guard.broken:
            outcome, message = "forbidden", "\n".join(guard.broken)
            guard.broken = []
        signal.alarm(0)
        spent = time.monotonic() - start
        line = {"name": path.name, "outcome": outcome, "seconds": spent, "length": len(message)}
        print(json.dumps(line | {"message": message[:300]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
