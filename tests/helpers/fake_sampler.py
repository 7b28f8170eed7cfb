"""Provides a fake `Sampler` whose images have a single gray value, determined by their index."""

import dataclasses

import numpy as np

from varjax.checkpoints.class_names import numbered_classes
from varjax.sampling.pipeline import checked_keys, checked_labels
from varjax.sampling.sampler import replace_options
from varjax.var.sample import VAROptions


@dataclasses.dataclass
class FakeSampler:
    nan: frozenset = frozenset()  # indices of the images that are NaN
    image_shape: tuple = (8, 8, 1)
    devices: tuple = (0,)
    classes: int = 10
    edit_shape: tuple = (4, 4)
    calls: int = 0

    @property
    def labels(self):
        return numbered_classes(self.classes)

    def options(self, **given):
        return replace_options(VAROptions(), given).check()

    def identity(self):
        return {"weights": "fake"}

    def sampling_bytes(self, batch_size, options):
        return 0

    def advise_on_nan(self, options):
        return f"Try top_k={options.top_k + 1}"

    def sample(self, labels, seed=0, *, index=None, **options):
        label_B = checked_labels(labels, self.classes)
        checked_keys(seed, index, len(label_B))
        return self._images(np.arange(len(label_B)) if index is None else np.asarray(index))

    def edit(self, images_BHWC, keep, labels=None, seed=0, *, index=None, **options):
        return self._images(np.asarray(index))

    def _images(self, index_B):
        self.calls += 1
        gray_B = np.where(np.isin(index_B, list(self.nan)), np.nan, index_B % 256 / 255)
        return np.broadcast_to(
            gray_B[:, None, None, None].astype(np.float32), (len(index_B), *self.image_shape)
        )
