"""How fast a config's data are read, decoded and augmented, by threads and worker processes.

python -m varjax.benchmark data --config=configs/FILE.py[:ARGUMENT] [--batches=20]
    [--threads=1,16] [--workers=0,16] [--config.FIELD=VALUE ...]

One line for each part and each way to read:

decode    images read and decoded, not augmented; tokens where the data are tokens
augment   and augmented
loader    whole batches, as training gets them
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import resource
import time
from collections.abc import Iterable
from typing import Any

from varjax.benchmark.measure import show
from varjax.core.config_flags import add_config_flags, config_from_flags
from varjax.core.errors import InputError
from varjax.data.decoding import BrokenImage
from varjax.data.loader import AHEAD, Loader
from varjax.data.stream import Examples
from varjax.data.workers import Readers, Reading


def main(arguments: list[str]) -> None:
    """Reads the command line; `run` does it."""
    parser = argparse.ArgumentParser(
        "varjax.benchmark data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cpus = os.cpu_count() or 1
    add_config_flags(parser)
    parser.add_argument("--batches", type=int, default=20, help="to measure, of each kind")
    parser.add_argument("--threads", default=f"1,{cpus}", help="numbers of threads")
    parser.add_argument("--workers", default=f"{cpus}", help="numbers of processes, 0 for none")
    flags, experiment = config_from_flags(parser, arguments)
    if flags.batches < 1:
        raise InputError(f"batches is {flags.batches}, but must be at least 1")
    ways = [Reading(threads=n) for n in numbers("threads", flags.threads) if n]
    ways += [Reading(workers=n) for n in numbers("workers", flags.workers) if n]
    run(experiment.data, experiment.batch_size, experiment.seed, ways, flags.batches)


def numbers(name: str, text: str) -> list[int]:
    """Those of "1,2,4", in order; ValueError for anything else."""
    try:
        return sorted({int(word) for word in text.split(",")})
    except ValueError as error:
        raise InputError(f"{name} is {text!r}; give numbers, say 1,2,4") from error


def run(data: Any, batch_size: int, seed: int, ways: Iterable[Reading], batches: int) -> None:
    """Prints a line for each part and each of `ways`."""
    for reading in ways:
        loader = dataclasses.replace(data, reading=reading).make(batch_size, seed)
        for part, measure in {"decode": _decode, "augment": _augment, "loader": _load}.items():
            took = measure(loader, batches)
            show(
                benchmark="data",
                part=part,
                data=type(data).__name__,
                batch_size=batch_size,
                threads=0 if reading.workers else reading.threads,
                workers=reading.workers,
                cpus=os.cpu_count(),
                seconds=took / batches,
                images_per_second=batches * batch_size / took,
                batch_mb=sum(x.nbytes for x in loader.train_batch(0).values()) / 1e6,
                peak_memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            )


def decode(examples: Examples, positions: Iterable[int]) -> None:
    """Reads these images, in the order in which they lie there, and forgets them."""
    source = examples.train_source
    for position in positions:
        with contextlib.suppress(BrokenImage):
            source[position % len(source)]


def augment(examples: Examples, positions: Iterable[int]) -> None:
    """Makes the rows at these positions of the training stream and forgets them."""
    examples.train(positions)


def _decode(loader: Loader, batches: int) -> float:
    return _seconds(loader.readers, decode, loader.batch_size, batches)


def _augment(loader: Loader, batches: int) -> float:
    return _seconds(loader.readers, augment, loader.batch_size, batches)


def _seconds(readers: Readers, function: Any, size: int, batches: int) -> float:
    """For so many batches, all submitted at once."""
    parts = [range(i * size, (i + 1) * size) for i in range(batches + 1)]
    readers.submit(len, function, parts[0]).result()
    begin = time.perf_counter()
    for pending in [readers.submit(len, function, part) for part in parts[1:]]:
        pending.result()
    return time.perf_counter() - begin


def _load(loader: Loader, batches: int) -> float:
    stream = loader.train()
    next(itertools.islice(stream, AHEAD, None))  # from here on as many are begun as are taken
    begin = time.perf_counter()
    next(itertools.islice(stream, batches - 1, None))
    return time.perf_counter() - begin
