"""Measures how fast a config's data are read by threads and by worker processes.

varjax benchmark data --config=configs/FILE.py[:ARGUMENT] [--batches=20]
    [--threads=1,16] [--workers=0,16] [--config.FIELD=VALUE ...]

Prints a line for each stage and each number of threads or processes:

decode    images are read and decoded (or latents are read)
augment   images are also augmented
loader    whole batches are made, as in training
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterable
from typing import Any

from varjax.benchmark.measure import print_figures
from varjax.config.config_flags import add_config_flags, config_from_flags
from varjax.data.loader import BATCHES_AHEAD, Loader
from varjax.data.stream import ExampleStream
from varjax.data.workers import ReaderPool, ReadOptions, available_cpus
from varjax.errors import InputError, check_setting
from varjax.runtime.commands import command_parser
from varjax.runtime.hardware import process_peak_gb
from varjax.storage.image_files import BrokenImage


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = command_parser("varjax benchmark data", __doc__)
    cpus = available_cpus()
    add_config_flags(parser)
    parser.add_argument("--batches", type=int, default=20, help="number of batches to measure (20)")
    parser.add_argument("--threads", default=f"1,{cpus}", help="numbers of threads to compare")
    parser.add_argument("--workers", default=f"{cpus}", help="numbers of processes to compare")
    flags, experiment = config_from_flags(parser, arguments)
    check_setting("batches", flags.batches, flags.batches >= 1, "at least 1")
    options = [ReadOptions(threads=n) for n in parse_counts("threads", flags.threads) if n]
    options += [ReadOptions(workers=n) for n in parse_counts("workers", flags.workers) if n]
    measure_reading(experiment.data, experiment.batch_size, experiment.seed, options, flags.batches)


def parse_counts(name: str, text: str) -> list[int]:
    """Returns the numbers in "1,2,4", in order; raises InputError for anything else."""
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise InputError(f"{name} is {text!r}; give numbers such as 1,2,4") from error


def measure_reading(
    data: Any, batch_size: int, seed: int, options: Iterable[ReadOptions], batches: int
) -> None:
    """Prints a line for each stage and each number of threads or processes.

    Args:
        data: dataset to read.
        batch_size: examples in a batch.
        seed: random seed of shuffling and augmentation.
        options: numbers of threads or processes to compare.
        batches: number of batches to time with each of the options.
    """
    for reading in options:
        loader = dataclasses.replace(data, reading=reading).make(batch_size, seed)
        for part, measure in {"decode": _decode, "augment": _augment, "loader": _load}.items():
            seconds = measure(loader, batches)
            print_figures(
                benchmark="data",
                part=part,
                data=type(data).__name__,
                batch_size=batch_size,
                threads=0 if reading.workers else reading.threads,
                workers=reading.workers,
                cpus=available_cpus(),
                seconds=seconds / batches,
                images_per_second=batches * batch_size / seconds,
                batch_mb=sum(x.nbytes for x in loader.train_batch(0).values()) / 1e6,
                peak_memory_gb=process_peak_gb(),
            )


def decode_examples(stream: ExampleStream, positions: Iterable[int]) -> None:
    """Reads the examples at these positions of the training split and discards them."""
    source = stream.train_source
    for position in positions:
        with contextlib.suppress(BrokenImage):
            source[position % len(source)]


def augment_examples(stream: ExampleStream, positions: Iterable[int]) -> None:
    """Makes the rows at these positions of the training stream and discards them."""
    stream.train(positions)


def _decode(loader: Loader, batches: int) -> float:
    return _seconds(loader.readers, decode_examples, loader.batch_size, batches)


def _augment(loader: Loader, batches: int) -> float:
    return _seconds(loader.readers, augment_examples, loader.batch_size, batches)


def _seconds(readers: ReaderPool, function: Any, size: int, batches: int) -> float:
    """Times a number of batches, all submitted at once."""
    parts = [range(i * size, (i + 1) * size) for i in range(batches + 1)]
    readers.submit(len, function, parts[0]).result()
    begin = time.perf_counter()
    for pending in [readers.submit(len, function, part) for part in parts[1:]]:
        pending.result()
    return time.perf_counter() - begin


def _load(loader: Loader, batches: int) -> float:
    stream = loader.train()
    # After the batches made ahead, the loader begins one batch for each that is taken.
    next(itertools.islice(stream, BATCHES_AHEAD, None))
    begin = time.perf_counter()
    next(itertools.islice(stream, batches - 1, None))
    return time.perf_counter() - begin
