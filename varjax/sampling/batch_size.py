"""How many images a device samples at a time: what is asked, or what its memory holds."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax

from varjax.runtime.distributed import on_all_processes, on_first_process
from varjax.runtime.hardware import device_memory
from varjax.sampling.sampler import Sampler

SIZES = (128, 64, 32, 16, 8, 4, 2, 1)  # more images at a time are hardly faster
LARGEST_ON_CPU = 32  # a CPU computes image by image; fewer at a time show progress earlier
WITHOUT_MEMORY = 32  # where a device does not tell its memory
USABLE = 0.8  # of a memory, for arithmetic leaves out buffers that the compiler adds


def add_batch_size_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --batch_size, a number or "auto"."""
    help = "images at a time on each device; auto for as many as fit into its memory (auto)"
    parser.add_argument("--batch_size", default="auto", type=_size_or_auto, help=help)


def choose_batch_size(
    asked: int | str,
    model: Sampler,
    options: Any,
    images: int,
    begun: Callable[[], int | None] = lambda: None,
) -> int:
    """Returns how many images each device samples at a time; says so where it is "auto".

    That is what is asked for. "auto" is the size that the output was begun with, or the largest
    of SIZES that fits into the memory of all devices and leaves none of them without work.

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
    here = [device_memory(device) for device in model.devices]
    told = on_all_processes(lambda: None if None in here else min(x for x in here if x))

    def choose() -> int:
        if (size := begun()) is not None:
            print(f"batch_size=auto: {size}, as in what is there", file=sys.stderr)
            return size
        per_device = -(-images // (len(model.devices) * jax.process_count()))
        if None in told:
            size = min(WITHOUT_MEMORY, per_device)
            print(f"batch_size=auto: {size}, for the device tells no memory", file=sys.stderr)
            return size
        memory = min(told)
        largest = min(per_device, LARGEST_ON_CPU if cpu else max(SIZES))
        size = fitting_batch_size(lambda n: model.sampling_bytes(n, options), memory, largest)
        print(
            f"batch_size=auto: {size} at a time on each device, for which it needs "
            f"{model.sampling_bytes(size, options) / 1e9:.1f} of {memory / 1e9:.1f} GB",
            file=sys.stderr,
        )
        return size

    return on_first_process(choose)


def fitting_batch_size(bytes_needed: Callable[[int], int], memory: int, largest: int) -> int:
    """Returns the largest of SIZES, cut to `largest`, that fits into a memory; 1 if none does.

    Args:
        bytes_needed: number of images -> bytes needed.
        memory: bytes of a device's memory, of which the fraction USABLE is available for sampling.
        largest: largest number of images.
    """
    sizes = (min(size, largest) for size in SIZES)
    return next((n for n in sizes if bytes_needed(n) <= USABLE * memory), 1)


def _size_or_auto(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: allowed are a number and auto") from None
