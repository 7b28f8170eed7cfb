"""Draws what a page asks for, step by step, and says how to draw the same images elsewhere."""

import concurrent.futures
import dataclasses
import functools
import math
import queue
import shlex
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from varjax.cli.captions import class_titles
from varjax.config.numbers import seed_number, whole_number
from varjax.errors import InputError
from varjax.models import Dtype
from varjax.runtime.hardware import device_memory
from varjax.sampling.batch_size import fitting_batch_size
from varjax.sampling.job import SamplingJob, sample_parts
from varjax.sampling.outputs import check_finite_images, image_file_name
from varjax.sampling.sampler import Sampler
from varjax.storage import image_io
from varjax.storage.picture_text import COMMAND, image_text
from varjax.trees import PyTree

MOST_IMAGES = 64  # of one request
MOST_FILM_BYTES = 2**28  # of the images after all steps of one request, which the server keeps
LARGEST_PART = 8  # images; a request is cancelled between two parts
MEMORY = 2**33  # bytes, where a device does not report its memory
STREAMED_SIDE = 64  # pixels of an image's shorter side from which on drawing takes seconds on a CPU
MODEL_LOCK = threading.Lock()  # held by each computation, also by a cancelled one until it ends


@dataclasses.dataclass(frozen=True)
class DemoModel:
    """Names a model of a page.

    Attributes:
        location: run, directory or published name, as the command line gives it.
        sampler: model that draws.
        dtype: dtype that the model was loaded with; see `varjax.load`.
        keeps_scales: whether the model draws scale by scale (VAR), and can vary and upscale images.
        lpips: parameters of LPIPS, by which reconstructions are compared; None to leave it out.
    """

    location: str
    sampler: Any  # a `Sampler`; of families that keep scales, with `vary` and `upscale`
    dtype: Dtype = "auto"
    keeps_scales: bool = False
    lpips: PyTree | None = None


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Holds a request for images, checked.

        drawing = checked_drawing(model, [3, 1], count=2, seed=0, options={"guidance": 2.0})

    Attributes:
        model: model that draws.
        labels: classes to draw; the number of classes itself means "no class".
        count: number of images of each class.
        seed: random seed of all images.
        options: sampling options of the model, a frozen dataclass.
    """

    model: DemoModel
    labels: tuple[int, ...]
    count: int
    seed: int
    options: Any

    @property
    def changes(self) -> dict[str, Any]:
        """Returns the options that differ from the model's own."""
        own, chosen = (dataclasses.asdict(x) for x in (self.model.sampler.options(), self.options))
        return {name: value for name, value in chosen.items() if value != own[name]}

    @property
    def job(self) -> SamplingJob:
        """Returns the job of `varjax sample` for the same images, in parts of a page."""
        images = len(self.labels) * self.count
        size = part_size(self.model.sampler, self.options, images)
        return SamplingJob(self.labels, self.count, self.seed, self.options, size, every_step=True)

    @property
    def program(self) -> tuple[Any, ...]:
        """Returns what the compiled program depends on, so that an equal one is not compiled."""
        return "draw", self.model.location, self.job.batch_size, static_options(self.options)

    @property
    def image_names(self) -> list[str]:
        """Returns the class of each image in words."""
        return class_titles(self.job.label_N, self.model.sampler.labels)

    @property
    def file_names(self) -> list[str]:
        """Returns the name of the file of each image, as `varjax sample` names it in a folder."""
        return [image_file_name(number, label) for number, label in enumerate(self.job.label_N)]

    def command(self) -> str:
        """Returns the command line that draws the same images into a folder."""
        return shlex.join(["varjax", "sample", *self._arguments()])

    def snippet(self) -> str:
        """Returns a Python program that draws the same images."""
        labels = self.job.label_N.tolist()
        dtype = "" if self.model.dtype == "auto" else f", dtype={self.model.dtype!r}"
        given = "".join(f", {name}={value!r}" for name, value in self.changes.items())
        return (
            "import varjax\n\n"
            f"model = varjax.load({self.model.location!r}{dtype})\n"
            f"images_BHWC = model.sample({labels}, seed={self.seed}{given})\n"
            'varjax.save(images_BHWC, "samples.png")\n'
        )

    def texts(self) -> list[dict[str, str]]:
        """Returns what the file of each image says about itself."""
        request = self.job.request(self.model.sampler)
        return [
            image_text(request, number, label) | {COMMAND: self.command()}
            for number, label in enumerate(self.job.label_N)
        ]

    def _arguments(self) -> list[str]:
        none = self.model.sampler.classes
        labels = ",".join("none" if label == none else str(label) for label in self.labels)
        switches = {True: "--{}", False: "--no-{}"}
        options = [
            switches[value].format(name)
            if isinstance(value, bool)
            else f"--{name}={flag_text(value)}"
            for name, value in self.changes.items()
        ]
        return [
            f"--weights={self.model.location}",
            *([] if self.model.dtype == "auto" else [f"--dtype={self.model.dtype}"]),
            f"--labels={labels}",
            f"--count={self.count}",
            f"--seed={self.seed}",
            *options,
            "--out=samples",
        ]


@dataclasses.dataclass(frozen=True)
class DrawnStep:
    """Holds some images of a request, drawn together, after a step.

    Attributes:
        images_NHWC: uint8 images after the step.
        step: number of the step, from 1.
        steps: number of all steps.
        seconds: time that computing these images has taken so far.
    """

    images_NHWC: np.ndarray
    step: int
    steps: int
    seconds: float


def checked_drawing(
    model: DemoModel, labels: Sequence[int], count: Any, seed: Any, options: Mapping[str, Any]
) -> Drawing:
    """Checks a request for images.

    Args:
        model: model that draws.
        labels: classes to draw; none of them means "no class".
        count: number of images of each class.
        seed: random seed of all images.
        options: sampling options to replace, by name.

    Raises:
        InputError: a number out of range, or too many images.
    """
    sampler: Sampler = model.sampler
    known = tuple(whole_number("class", label, 0, sampler.classes) for label in labels)
    drawing = Drawing(
        model,
        known or (sampler.classes,),
        whole_number("count", count, 1, MOST_IMAGES),
        seed_number("seed", seed),
        sampler.options(**options),
    )
    classes, images = len(drawing.labels), len(drawing.labels) * drawing.count
    request = f"{drawing.count} images of each of {classes} classes are {images}"
    check_image_count(sampler, drawing.options, images, request)
    return drawing


def check_image_count(sampler: Sampler, options: Any, images: int, request: str) -> None:
    """Raises InputError for more images than the page keeps after all steps of one request.

    Args:
        sampler: model that draws.
        options: sampling options of the model.
        images: number of images.
        request: what asks for them, in the message.
    """
    steps = sampler.steps(options)
    film_bytes = steps * math.prod(sampler.image_shape)
    most = max(1, min(MOST_IMAGES, MOST_FILM_BYTES // film_bytes))
    if images > most:
        raise InputError(
            f"{request}; in {steps} steps, this page draws at most {most} at once (the command "
            "line draws any number)"
        )


def flag_text(value: Any) -> str:
    """Returns the value of an option as a flag takes it: "2.5", or "1.0,2.0,3.0"."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def static_options(options: Any) -> tuple[Any, ...]:
    """Returns what programs depend on: the values of static options, the shapes of others."""
    return tuple(
        value if field.metadata["static"] else np.shape(value)
        for field in dataclasses.fields(options)
        for value in [getattr(options, field.name)]
    )


def part_size(sampler: Sampler, options: Any, images: int) -> int:
    """Returns how many images a device draws at a time: a power of two, so few sizes compile.

    Args:
        sampler: model that draws.
        options: sampling options of the model.
        images: number of images of the request.
    """
    memory = device_memory(sampler.devices[0]) or MEMORY
    per_device = -(-images // len(sampler.devices))
    largest = min(LARGEST_PART, 2 ** (per_device.bit_length() - 1))
    return fitting_batch_size(lambda n: sampler.sampling_bytes(n, options), memory, largest)


def draw_steps(drawing: Drawing) -> Iterator[DrawnStep]:
    """Draws images, some at a time, until all are drawn or the caller stops iterating.

    Where drawing is slow, each step is yielded while the later ones are computed, otherwise all
    steps of a part when it is finished.

    Raises:
        InputError: NaN in an image.
    """
    job, sampler = drawing.job, drawing.model.sampler
    together = len(sampler.devices)
    if _draws_slowly(sampler):
        for part in job.parts:
            yield from _draw_part(drawing, part)
        return
    for first in range(0, len(job.parts), together):
        with MODEL_LOCK:
            start = time.perf_counter()
            parts = [*sample_parts(sampler, job, job.parts[first : first + together])]
            seconds = time.perf_counter() - start
        yield from steps_of_part(np.concatenate([images for _, images in parts]), seconds)


def _draws_slowly(sampler: Sampler) -> bool:
    """Returns whether a page should show steps while the later ones are computed.

    Elsewhere, drawing takes less time than playing, and only a program that does not call Python
    is kept on the disk, so that the page need not compile it whenever it is started.
    """
    one_cpu = [device.platform for device in sampler.devices] == ["cpu"]
    return one_cpu and min(sampler.image_shape[:2]) >= STREAMED_SIDE


def steps_of_part(images_NSHWC: np.ndarray, seconds: float) -> Iterator[DrawnStep]:
    """Yields the steps of a part that is finished.

    Args:
        images_NSHWC: uint8 images after every step.
        seconds: time that computing them took.
    """
    S = images_NSHWC.shape[1]
    for step in range(S):
        yield DrawnStep(images_NSHWC[:, step], step + 1, S, seconds)


def _draw_part(drawing: Drawing, part: range) -> Iterator[DrawnStep]:
    """Yields each step of a part while a thread computes the later ones."""
    job, sampler = drawing.job, drawing.model.sampler
    S = sampler.steps(drawing.options)
    steps: queue.SimpleQueue[DrawnStep | None] = queue.SimpleQueue()

    def draw():
        with MODEL_LOCK:
            start = time.perf_counter()

            def put_step(step, images_BHWC):
                images_NHWC = images_BHWC[: len(part)]
                numbers, labels = job.number_M[part], job.label_M[part]
                advice = functools.partial(sampler.advise_on_nan, drawing.options)
                check_finite_images(images_NHWC, numbers, labels, job.seed, advice)
                seconds = time.perf_counter() - start
                steps.put(DrawnStep(image_io.to_uint8(images_NHWC), step + 1, S, seconds))

            for _ in sample_parts(sampler, job, [part], put_step):
                pass

    # Nobody waits for the thread of a drawing that is cancelled, except for the next computation.
    threads = concurrent.futures.ThreadPoolExecutor(1)
    computation = threads.submit(draw)
    threads.shutdown(wait=False)
    computation.add_done_callback(lambda _: steps.put(None))
    while (step := steps.get()) is not None:
        yield step
    computation.result()  # raises what the computation has raised
