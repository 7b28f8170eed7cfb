"""Samples many images in parts, over all devices and processes, and continues after a kill."""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from varjax.errors import InputError
from varjax.runtime.distributed import on_all_processes, on_first_process
from varjax.runtime.first_call import FirstCall, announce_compilation
from varjax.sampling.outputs import Output, check_finite_images
from varjax.sampling.sampler import Sampler, StepListener
from varjax.storage import image_io
from varjax.storage.folders import locked_work_folder

MOST_IMAGES = 10**8  # a longer list does not fit into memory


@dataclasses.dataclass(frozen=True)
class SamplingJob:
    """Lists the images to sample: `count` of each label, in order.

    A part is `batch_size` consecutive images, which one device computes at a time, so images do
    not depend on the number of devices. Raises InputError for too many images.

    If a classifier accepts a fraction of the images only, count / accept candidates of each label
    are drawn, M in all, from which `varjax.sampling.rejection` chooses.

    Attributes:
        labels: classes to sample, or mixes of classes such as "207:0.5+980:0.5".
        count: number of images of each class.
        seed: random seed of all images.
        options: sampling options of the model, a frozen dataclass.
        batch_size: number of images in a part.
        accept: fraction of the candidates that is kept, in (0, 1].
        classifier: JSON data that identify the classifier; None to keep all images.
        every_step: whether a part holds each image after every step, (N, S, H, W, channels).
    """

    labels: tuple[int | str, ...]
    count: int
    seed: int
    options: Any
    batch_size: int
    accept: float = 1.0
    classifier: Mapping[str, Any] | None = None
    every_step: bool = False

    def __post_init__(self) -> None:
        if (images := len(self.labels) * self.candidates) > MOST_IMAGES:
            accepted = "" if self.accept == 1 else f" at accept={self.accept}"
            raise InputError(
                f"count={self.count} of {len(self.labels)} classes{accepted} are {images:,} "
                f"images; at most {MOST_IMAGES:,} are drawn at once"
            )

    @functools.cached_property
    def candidates(self) -> int:
        """Returns the number of candidates of each label, `count` if all are kept."""
        return math.ceil(Fraction(self.count) / Fraction(str(self.accept)))  # exact: 3 / 0.1 is 30

    @functools.cached_property
    def label_N(self) -> np.ndarray:
        """Returns the label of every image that is kept, (N,) int64; text if any is a mix."""
        return np.repeat(self._labels, self.count)

    @functools.cached_property
    def label_M(self) -> np.ndarray:
        """Returns the label of every candidate, (M,) as those of `label_N`."""
        return np.repeat(self._labels, self.candidates)

    @functools.cached_property
    def _labels(self) -> np.ndarray:
        if any(isinstance(label, str) for label in self.labels):
            return np.array([x if isinstance(x, str) else f"{x}:1" for x in self.labels])
        return np.array(self.labels, np.int64)

    @functools.cached_property
    def number_M(self) -> np.ndarray:
        """Returns the number of every candidate, (M,) int64, which its random key derives from.

        The first `count` candidates of each label have the numbers of a job that keeps all of its
        images, the next ones continue after these, and so on. So with a smaller `accept`, the same
        candidates and more are drawn.
        """
        rank_m, N = np.arange(self.candidates), len(self.label_N)
        number_m = rank_m // self.count * N + rank_m % self.count
        return (np.arange(len(self.labels))[:, None] * self.count + number_m[None]).reshape(-1)

    @functools.cached_property
    def parts(self) -> tuple[range, ...]:
        """Returns the positions of the candidates in each part."""
        return divided(len(self.label_M), self.batch_size)

    def request(self, model: Sampler) -> dict[str, Any]:
        """Returns everything that the images depend on, as JSON data."""
        everything = self.labels == tuple(range(model.classes))
        return {
            "labels": "all" if everything else ",".join(map(str, self.labels)),
            "count": self.count,
            "seed": self.seed,
            **dataclasses.asdict(self.options),
            "batch_size": self.batch_size,
            **({"accept": self.accept, "classifier": self.classifier} if self.classifier else {}),
            **model.identity(),
        }


def divided(images: int, size: int) -> tuple[range, ...]:
    """Divides a number of images into ranges of `size`, the last one perhaps shorter."""
    return tuple(range(i, min(i + size, images)) for i in range(0, images, size))


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
    model: Sampler,
    job: SamplingJob,
    parts: Sequence[range],
    listener: StepListener | None = None,
) -> Iterator[tuple[range, np.ndarray]]:
    """Yields each part with its images (N, H, W, channels) uint8.

    One part per device is computed at a time.

    Args:
        model: model that samples.
        job: job of which the parts are sampled.
        parts: parts of the job.
        listener: function that gets the images after each step while they are drawn, in place of
            `job.every_step`; the last part is filled up to `job.batch_size` images.

    Raises:
        InputError: NaN in an image.
    """
    every_step = listener or job.every_step
    devices, M = len(model.devices), len(job.label_M)
    sample = FirstCall(model.sample, lambda: announce_compilation("the sampler"))
    pending = None
    for start in range(0, len(parts), devices):
        group = parts[start : start + devices]
        # The shape is always the same, so that one compilation serves all; the excess is dropped.
        full = [*group, *[group[-1]] * (devices - len(group))]
        position_B = np.concatenate([part.start + np.arange(job.batch_size) for part in full]) % M
        images_BHWC = sample(
            job.label_M[position_B],
            job.seed,
            index=job.number_M[position_B],
            **({"every_step": every_step} if every_step else {}),
            **dataclasses.asdict(job.options),
        )
        if every_step is True:
            images_BHWC = jnp.moveaxis(images_BHWC, 1, 0)  # (B, S, H, W, channels)
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
        number_N, label_N = job.number_M[part], job.label_M[part]
        check_finite_images(
            images_NHWC, number_N, label_N, job.seed, lambda: model.advise_on_nan(job.options)
        )
        yield part, image_io.to_uint8(images_NHWC)
