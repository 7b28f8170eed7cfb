"""How many images a device samples at a time: what is asked, or what its memory holds."""

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import Any

from varjax.core.distributed import on_first_process
from varjax.core.hardware import device_memory
from varjax.sampling.sampler import Sampler

SIZES = (128, 64, 32, 16, 8, 4, 2)  # more images at a time are hardly faster
LARGEST_ON_CPU = 32  # a CPU computes image by image; fewer at a time show progress earlier
USABLE = 0.8  # of a memory, for arithmetic leaves out buffers that the compiler adds


def add_batch_size_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --batch_size, a number or "auto"."""
    help = "images at a time on each device; auto is as many as fit into its memory (auto)"
    parser.add_argument("--batch_size", default="auto", type=_size_or_auto, help=help)


def choose_batch_size(asked: int | str, model: Sampler, options: Iterable[Any]) -> int:
    """Returns the number that is asked for, or for "auto" one that fits, and says which.

    All processes get that of the first one.

    Args:
        asked: a number or "auto".
        model: that samples.
        options: the model's own, of all that it will sample.
    """
    if isinstance(asked, int):
        return asked
    device, needed = model.devices[0], list(options)

    def bytes_needed(size: int) -> int:
        return max(model.sampling_bytes(size, each) for each in needed)

    def choose() -> int:
        memory = device_memory(device)
        largest = LARGEST_ON_CPU if device.platform == "cpu" else max(SIZES)
        size = fitting_batch_size(bytes_needed, memory, largest)
        print(
            f"batch_size=auto: {size} images at a time on each device, "
            f"{bytes_needed(size) / 1e9:.1f} of {memory / 1e9:.1f} GB",
            file=sys.stderr,
        )
        return size

    return on_first_process(choose)


def fitting_batch_size(bytes_needed: Callable[[int], int], memory: int, largest: int) -> int:
    """Returns the largest of SIZES, up to `largest`, that fits into a memory; 1 if none does.

    Args:
        bytes_needed: by a number of images.
        memory: of a device, in bytes; USABLE of it are there for sampling.
        largest: the most images.
    """
    fit = (n for n in SIZES if n <= largest and bytes_needed(n) <= USABLE * memory)
    return next(fit, 1)


def _size_or_auto(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: allowed are a number and auto") from None
