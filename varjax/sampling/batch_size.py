"""Chooses how many images each device samples at a time: as requested, or as memory allows."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax

from varjax.runtime.distributed import on_all_processes, on_first_process
from varjax.runtime.hardware import device_memory
from varjax.sampling.sampler import Sampler

SIZES = (128, 64, 32, 16, 8, 4, 2, 1)  # larger batches are hardly faster
LARGEST_ON_CPU = 32  # a CPU computes image by image; smaller batches show progress earlier
WITHOUT_MEMORY = 32  # if a device does not report its memory
USABLE = 0.8  # fraction of memory; the estimate omits buffers that the compiler adds


def add_batch_size_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --batch_size, a number or "auto"."""
    help = "images at a time on each device; auto for as many as fit into its memory (auto)"
    parser.add_argument("--batch_size", default="auto", type=size_or_auto, help=help)


def choose_batch_size(
    asked: int | str,
    model: Sampler,
    options: Any,
    images: int,
    begun: Callable[[], int | None] = lambda: None,
) -> int:
    """Chooses how many images each device samples at a time.

    "auto" is the size with which the output was started, or else the largest of SIZES that fits
    into the memory of every device and leaves no device idle. It is printed where memory, or an
    unknown memory, limits it.

    Args:
        asked: batch size, a number or "auto".
        model: model that samples.
        options: sampling options of the model.
        images: total number of images, on all devices of all processes.
        begun: function that returns the batch size with which the output was started, or None.
    """
    if isinstance(asked, int):
        return min(asked, images)
    cpu = model.devices[0].platform == "cpu"
    local = [device_memory(device) for device in model.devices]
    smallest = on_all_processes(lambda: None if None in local else min(x for x in local if x))

    def choose() -> int:
        if (size := begun()) is not None:
            print(f"batch_size=auto: {size}, as in the existing output", file=sys.stderr)
            return size
        per_device = -(-images // (len(model.devices) * jax.process_count()))
        if None in smallest:
            if per_device >= WITHOUT_MEMORY:
                print(
                    f"batch_size=auto: {WITHOUT_MEMORY}, because the device does not report its "
                    "memory",
                    file=sys.stderr,
                )
            return min(WITHOUT_MEMORY, per_device)
        memory = min(smallest)
        largest = min(per_device, LARGEST_ON_CPU if cpu else max(SIZES))
        size = fitting_batch_size(lambda n: model.sampling_bytes(n, options), memory, largest)
        needed = model.sampling_bytes(size, options)
        if size < min(largest, max(SIZES)) or needed > USABLE * memory:
            print(
                f"batch_size=auto: {size} per device, which needs {needed / 1e9:.1f} of "
                f"{memory / 1e9:.1f} GB",
                file=sys.stderr,
            )
        return size

    return on_first_process(choose)


def fitting_batch_size(bytes_needed: Callable[[int], int], memory: int, largest: int) -> int:
    """Returns the largest of SIZES, capped at `largest`, that fits into memory; 1 if none does.

    Args:
        bytes_needed: number of images -> bytes needed.
        memory: bytes of a device's memory; the fraction USABLE of it is available for sampling.
        largest: largest number of images.
    """
    sizes = (min(size, largest) for size in SIZES)
    return next((n for n in sizes if bytes_needed(n) <= USABLE * memory), 1)


def size_or_auto(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be a number or auto") from None
