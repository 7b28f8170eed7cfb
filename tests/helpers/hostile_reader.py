"""Reads files as the converter does, in one process with little memory; prints a line for each.

python -m tests.helpers.hostile_reader FOLDER [SECONDS]: FOLDER/good.* are read first.
"""

import json
import pathlib
import resource
import signal
import sys
import time

from varjax.convert.apply_map import lazy_leaves
from varjax.convert.inception import read_graph
from varjax.convert.infer_config import Source, find_kind, infer_configs
from varjax.convert.name_maps.name_map import ConvertOptions
from varjax.convert.pth.read import read_checkpoint
from varjax.convert.state_dicts import find_state_dicts, own_tensors
from varjax.core.errors import InputError
from varjax.core.image_files import MAX_DECODING_BYTES
from varjax.core.image_io import read_image
from varjax.data import transforms
from varjax.data.decoding import decode_file

ROOM, RATIO = 2**27, 16  # bytes that reading may take, and for each byte of the file
OPTIONS = {
    "var": ConvertOptions(),
    "tokenizer": ConvertOptions(groups=4, scales=(1, 2)),
    "kl": ConvertOptions(groups=4),
    "mar": ConvertOptions(latent_channels=4, mar_heads=(2, 2)),
}


class OvertimeError(BaseException):
    """Is no Exception, which a reader could take for a fault of the file."""


class ExecutionError(BaseException):
    """Is no Exception either."""


def describe(path: pathlib.Path) -> None:
    """Does what `convert` does before it writes; reads and crops an image."""
    flag = path.name.partition(".")[0]
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
    lazy_leaves(config, own, OPTIONS[flag])


def memory_used() -> int:
    """Bytes of addresses that the process has."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def main(folder: str, seconds: str = "10") -> None:
    def stop(*_):
        raise OvertimeError(f"after {seconds} s")

    def forbid(event: str, arguments: tuple) -> None:
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
            raise ExecutionError(f"{event} {arguments}"[:300])

    sys.addaudithook(forbid)
    signal.signal(signal.SIGALRM, stop)
    paths = pathlib.Path(folder).iterdir()
    for path in sorted(paths, key=lambda path: (not path.name.startswith("good."), path)):
        room = resource.RLIM_INFINITY
        if not path.name.startswith("good."):
            room = memory_used() + ROOM + RATIO * path.stat().st_size
            if path.name.startswith("image."):  # an image of 8192x8192 may have any file
                room += MAX_DECODING_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
        start, outcome, message = time.monotonic(), "read", ""
        signal.alarm(int(seconds))
        try:
            describe(path)
        except InputError as error:
            outcome, message = "refused", str(error)
        except (Exception, OvertimeError, ExecutionError) as error:
            outcome, message = type(error).__name__, str(error)
        signal.alarm(0)
        spent = time.monotonic() - start
        line = {"name": path.name, "outcome": outcome, "seconds": spent, "length": len(message)}
        print(json.dumps(line | {"message": message[:300]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
