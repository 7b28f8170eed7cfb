"""Samples many images in parts, over all devices and processes, and continues after a kill."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from varjax.errors import InputError
from varjax.runtime.distributed import on_all_processes, on_first_process
from varjax.sampling.finite_images import check_finite_images
from varjax.sampling.outputs import Output
from varjax.sampling.sampler import Sampler
from varjax.storage import image_io
from varjax.storage.folders import locked_work_folder

MOST_IMAGES = 10**8  # a longer list does not fit into memory


@dataclasses.dataclass(frozen=True)
class SamplingJob:
    """Lists the images to sample: `count` of each label, in order.

    A part is `batch_size` consecutive images, which one device computes at a time, so images do
    not depend on the number of devices. Raises InputError for too many images.

    Attributes:
        labels: classes to sample.
        count: number of images of each class.
        seed: random seed of all images.
        options: sampling options of the model, a frozen dataclass.
        batch_size: number of images in a part.
    """

    labels: tuple[int, ...]
    count: int
    seed: int
    options: Any
    batch_size: int

    def __post_init__(self) -> None:
        if (images := len(self.labels) * self.count) > MOST_IMAGES:
            raise InputError(
                f"count={self.count} of {len(self.labels)} classes are {images:,} images; at most "
                f"{MOST_IMAGES:,} are drawn at once"
            )

    @functools.cached_property
    def label_N(self) -> np.ndarray:
        """Returns the label of every image, (N,) int64."""
        return np.repeat(np.array(self.labels, np.int64), self.count)

    @functools.cached_property
    def parts(self) -> tuple[range, ...]:
        """Returns the numbers of the images in each part."""
        N, size = len(self.label_N), self.batch_size
        return tuple(range(i, min(i + size, N)) for i in range(0, N, size))

    def request(self, model: Sampler) -> dict[str, Any]:
        """Returns everything that the images depend on, as JSON data."""
        everything = self.labels == tuple(range(model.classes))
        return {
            "labels": "all" if everything else ",".join(map(str, self.labels)),
            "count": self.count,
            "seed": self.seed,
            **dataclasses.asdict(self.options),
            "batch_size": self.batch_size,
            **model.identity(),
        }


def run_job(model: Sampler, job: SamplingJob, output: Output) -> str:
    """Samples the parts that `output` lacks and finishes it; returns its message.

    Each of several processes samples some of the parts on its own devices; the first one finishes
    the output. The caller keeps other jobs out of the output with `locked_for_job`.

    Raises:
        InputError: in all processes, before anything is computed, if the output holds something
            else; in one process, if an image is NaN, after the good parts before it are written.
    """
    process, processes = jax.process_index(), jax.process_count()
    on_first_process(lambda: output.begin(write=True))
    # The other processes compare their requests with it: their machines' weights may differ.
    on_all_processes(lambda: output.begin(write=False) if process else None)
    mine = job.parts[process::processes]
    missing = [part for part in mine if not output.has(part)]
    total, left = sum(map(len, mine)), sum(map(len, missing))
    with tqdm(
        total=total, initial=total - left, unit="image", desc="sampling", disable=process > 0
    ) as bar:
        for part, images_NHWC in sample_parts(model, job, missing):
            output.add(part, images_NHWC)
            bar.update(len(part))
    on_all_processes(lambda: None)  # waits until all parts are drawn
    message = on_first_process(output.finish)
    return message if process == 0 else ""


@contextlib.contextmanager
def locked_for_job(folder: Callable[[], pathlib.Path | None]) -> Iterator[None]:
    """Keeps other commands out of a folder until this job ends or dies.

    The first of several processes holds the lock.

    Args:
        folder: function that returns the folder, called in the first process; it returns None if
            no lock is needed.

    Raises:
        InputError: in all processes, if another command is using the folder.
    """
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            if (path := folder()) is not None:
                stack.enter_context(locked_work_folder(path))

        on_first_process(lock)
        yield


def sample_parts(
    model: Sampler, job: SamplingJob, parts: Sequence[range]
) -> Iterator[tuple[range, np.ndarray]]:
    """Yields each part with its images (N, H, W, channels) uint8.

    One part per device is computed at a time. Raises InputError for NaN in an image.
    """
    devices, N = len(model.devices), len(job.label_N)
    pending = None
    for start in range(0, len(parts), devices):
        group = parts[start : start + devices]
        # The shape is always the same, so that one compilation serves all; the excess is dropped.
        full = [*group, *[group[-1]] * (devices - len(group))]
        index_B = np.concatenate([part.start + np.arange(job.batch_size) for part in full])
        images_BHWC = model.sample(
            job.label_N[index_B % N], job.seed, index=index_B, **dataclasses.asdict(job.options)
        )
        # The devices compute this batch while the previous one is written.
        if pending is not None:
            yield from _split(model, job, *pending)
        pending = group, images_BHWC
    if pending is not None:
        yield from _split(model, job, *pending)


def _split(model, job, parts, images_BHWC):
    images_BHWC, size = np.asarray(images_BHWC), job.batch_size
    for i, part in enumerate(parts):
        images_NHWC = images_BHWC[i * size : i * size + len(part)]
        label_N = job.label_N[part.start : part.stop]
        check_finite_images(
            images_NHWC, part, label_N, job.seed, lambda: model.advise_on_nan(job.options)
        )
        yield part, image_io.to_uint8(images_NHWC)
