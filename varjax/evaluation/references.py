"""References for samples: a dataset or statistics, and real images measured in the same way."""

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
from tqdm import tqdm

from varjax.data.sources import dataset_of_command
from varjax.data.stream import Split
from varjax.data.transforms import Crop
from varjax.errors import InputError
from varjax.metrics.features import FeatureExtractor, feature_sizes
from varjax.metrics.image_sets import DatasetImages, parts_of
from varjax.metrics.references import Reference, read_reference, reference_of_images
from varjax.metrics.report import measure

# References that are datasets: by name, or by how they begin.
DATASET_NAMES = ("digits", "photos")
DATASET_PREFIXES = ("folder:", "tfds:", "idx:")


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationSettings:
    """Holds what all evaluations of a command share.

    Attributes:
        extract: extractor of the features.
        reference: an .npz, a folder, or a dataset as `dataset_of_command` takes it, whose images
            are cropped to the samples' size.
        split: split of the reference dataset, "train" or "held_out".
        cache: folder for statistics of references.
        crop: kind of crop of the reference dataset's photographs.
    """

    extract: FeatureExtractor
    reference: str
    split: Split
    cache: pathlib.Path
    crop: Crop = "random"


@functools.lru_cache(maxsize=1)  # all points of a sweep have the same one
def reference_of(settings: EvaluationSettings, image_shape: tuple[int, ...]) -> Reference:
    """Reads the reference, or the statistics of its images.

    Args:
        settings: settings of the evaluation.
        image_shape: (H, W, channels) of the samples.

    Raises:
        InputError: as `read_reference` and `dataset_of_command` do, or images without features.
    """
    text, extract = settings.reference, settings.extract
    sizes = feature_sizes(extract.network, image_shape)  # refuses images without features
    if is_dataset(text):
        images = DatasetImages(dataset_of(settings, image_shape), settings.split)
        return reference_of_images(images, images.digest, extract, settings.cache)
    return read_reference(text, extract, settings.cache, sizes)


def is_dataset(reference: str) -> bool:
    """Returns whether a reference names a dataset, not a file or folder of images."""
    return reference.partition(",")[0] in DATASET_NAMES or reference.startswith(DATASET_PREFIXES)


def check_reference(reference: str, split: str | None, crop: str | None) -> None:
    """Raises InputError if a split or a crop is given for a reference that is not a dataset.

    Args:
        reference: name of the reference, as in `EvaluationSettings`.
        split: split that the user chose; None for none.
        crop: crop that the user chose; None for none.
    """
    chosen = {"split": split, "crop": crop}
    given = [f"{name}={value}" for name, value in chosen.items() if value is not None]
    if given and not is_dataset(reference):
        raise InputError(
            f"{', '.join(given)}: needs a reference that is a dataset, such as folder:PATH; all "
            f"images of {reference} would be used, unchanged"
        )


@functools.lru_cache(maxsize=1)  # so that a folder is listed once
def dataset_of(settings: EvaluationSettings, image_shape: tuple[int, ...]) -> Any:
    """Returns the reference's dataset with images of a size; see `dataset_of_command`."""
    H, W, channels = image_shape
    return dataset_of_command(settings.reference, (H, W), channels, settings.crop)


@functools.lru_cache(maxsize=1)
def real_images_of(
    settings: EvaluationSettings, image_shape: tuple[int, ...], count: int
) -> DatasetImages | None:
    """Opens the images that `measure_real_images` measures, with the same arguments.

    Returns:
        Images of the reference's other split; None unless the reference is a dataset and the
        features are a classifier's, because Inception takes as long for them as for the samples.

    Raises:
        InputError: the dataset lacks that split.
    """
    if settings.extract.network.classes is None or not is_dataset(settings.reference):
        return None
    return DatasetImages(dataset_of(settings, image_shape), _other_split(settings), count)


def _other_split(settings: EvaluationSettings) -> Split:
    return "held_out" if settings.split == "train" else "train"


@functools.lru_cache(maxsize=1)
def measure_real_images(
    settings: EvaluationSettings, image_shape: tuple[int, ...], count: int
) -> dict[str, Any] | None:
    """Measures images of the reference's other split: the values that perfect samples would have.

    Args:
        settings: settings of the evaluation.
        image_shape: (H, W, channels) of the samples.
        count: number of samples; as many real images are measured if there are so many, because
            metrics depend on the number.

    Returns:
        {"split": …, "images": number, "metrics": {…}}; None if they are not measured.
    """
    images = real_images_of(settings, image_shape, count)
    if images is None:
        return None
    extract, split = settings.extract, _other_split(settings)
    parts, labels = [], []
    with tqdm(total=images.shape[0], unit=" images", desc=f"real images ({split})") as bar:
        for _, images_nHWC, label_n in images.labeled_parts(parts_of(images.shape[0])):
            if len(images_nHWC):
                parts.append(extract(images_nHWC, bar.update))
                labels.append(label_n)
    # Datasets are in the order of their classes, which the Inception Score must not be.
    label_N = np.concatenate(labels)
    order_N = np.random.default_rng(0).permutation(len(label_N))
    features = {name: np.concatenate([part[name] for part in parts])[order_N] for name in parts[0]}
    reference = reference_of(settings, image_shape)
    data, classes = dataset_of(settings, image_shape), extract.network.classes
    metrics = measure(features, reference, label_N[order_N], data.classes, classes).metrics
    if split == "train":  # a classifier knows the images that it was trained on
        metrics.pop("label_accuracy", None)
    return {"split": split, "images": len(label_N), "metrics": metrics}
