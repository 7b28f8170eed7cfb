"""Many images: in parts, over all devices and processes, going on after a kill."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from varjax.core import image_io
from varjax.core.distributed import on_all_processes, on_first_process
from varjax.sampling.outputs import Output
from varjax.sampling.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class SamplingJob:
    """Lists the images to sample: `count` of each label, in this order.

    `batch_size` consecutive images are a part, which one device computes at a time, so images do
    not depend on how many devices there are.

    Attributes:
        labels: classes.
        count: images of each.
        seed: the seed of all of them.
        options: the model's own frozen dataclass.
        batch_size: images of a part.
    """

    labels: tuple[int, ...]
    count: int
    seed: int
    options: Any
    batch_size: int

    @functools.cached_property
    def label_N(self) -> np.ndarray:
        """(N,) int64, the label of every image."""
        return np.repeat(np.array(self.labels, np.int64), self.count)

    @functools.cached_property
    def parts(self) -> tuple[range, ...]:
        """The numbers of the images, part by part."""
        N, size = len(self.label_N), self.batch_size
        return tuple(range(i, min(i + size, N)) for i in range(0, N, size))

    def request(self, model: Sampler) -> dict[str, Any]:
        """Returns all that the images depend on, as JSON data."""
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
    """Samples what `output` does not have yet and finishes it; returns its message.

    Of several processes each samples its share of the parts on its own devices; the first one
    finishes. Raises InputError in all, before anything is computed, where the output holds
    something else.
    """
    process, processes = jax.process_index(), jax.process_count()
    on_first_process(lambda: output.begin(write=True))
    # The others compare with what it began: weights of another machine may be others.
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
    on_all_processes(lambda: None)  # all is drawn
    message = on_first_process(output.finish)
    return message if process == 0 else ""


def sample_parts(
    model: Sampler, job: SamplingJob, parts: Sequence[range]
) -> Iterator[tuple[range, np.ndarray]]:
    """Yields each part with its images (N, H, W, channels) uint8.

    As many parts are computed at once as there are devices.
    """
    devices, N = len(model.devices), len(job.label_N)
    pending = None
    for start in range(0, len(parts), devices):
        group = parts[start : start + devices]
        # Always the same shape, so that one compilation serves all: what is too much is dropped.
        full = [*group, *[group[-1]] * (devices - len(group))]
        index_B = np.concatenate([part.start + np.arange(job.batch_size) for part in full])
        images_BHWC = model.sample(
            job.label_N[index_B % N], job.seed, index=index_B, **dataclasses.asdict(job.options)
        )
        # The devices work on this batch while the one before it is written.
        if pending is not None:
            yield from _split(*pending, job.batch_size)
        pending = group, images_BHWC
    if pending is not None:
        yield from _split(*pending, job.batch_size)


def _split(parts, images_BHWC, size):
    images_BHWC = image_io.to_uint8(np.asarray(images_BHWC))
    for i, part in enumerate(parts):
        yield part, images_BHWC[i * size : i * size + len(part)]
