"""Measures images in Python: FID and the other metrics of arrays, iterators, files and folders.

varjax.fid(model.sample(labels), "reference.npz", inception="weights/inception")
"""

import functools
import os
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import numpy as np

from varjax.data.stream import Split
from varjax.errors import InputError
from varjax.evaluation.image_crop import AUTO, choose_crop
from varjax.evaluation.references import EvaluationSettings, check_reference, reference_of
from varjax.metrics import fid as metrics
from varjax.metrics.features import FeatureExtractor, feature_network
from varjax.metrics.image_sets import open_image_set, parts_of
from varjax.metrics.references import Reference, default_cache, reference_of_features
from varjax.metrics.report import SampleMetrics, measure
from varjax.runtime.compilation_cache import use_compilation_cache
from varjax.sampling.pictures import checked_pictures

LEAST_IMAGES = 2


class Features:
    """Features of a set of images, computed once and compared any number of times.

        real = varjax.Features("photos/", inception="weights/inception")
        for guidance in (1.5, 2.0):
            print(varjax.fid(model.sample(labels, guidance=guidance), real))

    Args:
        images: an array (N, H, W, 1 or 3), uint8 or floats in [0, 1]; an iterable of such arrays,
            which need not fit into memory together; or the path of an .npz ("arr_0") or a folder.
        inception: directory of Inception's weights, written by `varjax convert --inception=FILE`.
        features: kind of features, as `--features` of `varjax evaluate`: "inception"; "pixels" for
            tiny images; or the directory of a classifier.
        extract: extractor to use instead; None to make one.

    Attributes:
        arrays: features by name: "pool_ND", and with Inception "spatial_ND" and "logits_NV".
        label_N: classes of the images, if an .npz or file names contain them, else None.
        extract: extractor that computed them.
        image_shape: (H, W, channels) of an image.

    Raises:
        InputError: images of another shape or type, fewer than two, or weights that are missing.
    """

    def __init__(
        self,
        images: Any,
        inception: str | os.PathLike = "",
        features: str | os.PathLike = "inception",
        extract: FeatureExtractor | None = None,
    ):
        self.extract = extract or _extractor(os.fspath(features), os.fspath(inception))
        self.arrays, self.label_N, self.image_shape = _extract(images, self.extract)

    def __len__(self) -> int:
        return len(self.arrays["pool_ND"])

    def __repr__(self) -> str:
        return f"Features({len(self):,} images, {self.extract.network.identity['features']})"


def fid(
    samples: Any,
    reference: Any,
    inception: str | os.PathLike = "",
    features: str | os.PathLike = "inception",
    split: Split | None = None,
    crop: Literal["var", "adm"] | None = None,
) -> float:
    """Computes the Fréchet distance of samples to a reference (Heusel et al., arXiv 1706.08500).

        varjax.fid(images_NHWC, "VIRTUAL_imagenet256_labeled.npz", inception="weights/inception")

    Images are first rounded to 8 bits, as in files. The result equals that of `varjax evaluate`
    with the same crop.

    Args:
        samples: images as `Features` takes them, or `Features`.
        reference: likewise; the path of an .npz of statistics ("mu", "sigma"); or a dataset, as
            `varjax evaluate --reference` takes it: "digits", "folder:/data/imagenet".
        inception: directory of Inception's weights; "" for features that are computed already.
        features: kind of features; see `Features`.
        split: split of a reference that is a dataset, "train" or "held_out"; None for "train".
            Refused for other references.
        crop: crop of that dataset's photographs, "var" or "adm"; None for "var". Use "adm" for
            samples of MAR and of other models with a KL tokenizer, as `varjax evaluate` does.

    Raises:
        InputError: images that do not fit, fewer than two, or weights that are missing.
    """
    computed, compared = _both(samples, reference, inception, features, split, crop)
    moments = metrics.Moments.of(computed.arrays["pool_ND"])
    return metrics.frechet_distance(moments, compared.moments["pool_ND"])


def evaluate_samples(
    samples: Any,
    reference: Any,
    inception: str | os.PathLike = "",
    features: str | os.PathLike = "inception",
    split: Split | None = None,
    crop: Literal["var", "adm"] | None = None,
) -> SampleMetrics:
    """Computes all metrics of samples: FID, sFID, Inception Score, precision, recall and KID.

        measured = varjax.evaluate(images_NHWC, real, inception="weights/inception")
        print(measured)  # a table
        measured.metrics["recall"]

    The Inception Score assumes images in random order; shuffle images that are sorted by class.

    Args:
        samples: images as `Features` takes them, or `Features`.
        reference: likewise; the path of an .npz of statistics ("mu", "sigma"); or a dataset, as
            `varjax evaluate --reference` takes it: "digits", "folder:/data/imagenet".
        inception: directory of Inception's weights; "" for features that are computed already.
        features: kind of features; see `Features`.
        split: split of a reference that is a dataset, "train" or "held_out"; None for "train".
            Refused for other references.
        crop: crop of that dataset's photographs, "var" or "adm"; None for "var". Use "adm" for
            samples of MAR and of other models with a KL tokenizer, as `varjax evaluate` does.

    Raises:
        InputError: images that do not fit, fewer than two, or weights that are missing.
    """
    computed, compared = _both(samples, reference, inception, features, split, crop)
    classes = computed.extract.network.classes
    return measure(computed.arrays, compared, computed.label_N, logit_classes=classes)


def _both(
    samples: Any,
    reference: Any,
    inception: str | os.PathLike,
    features: str | os.PathLike,
    split: Split | None,
    crop: str | None,
) -> tuple[Features, Reference]:
    """Returns the features of the samples, and the reference, by the same network."""
    named = isinstance(reference, str | os.PathLike)
    check_reference(os.fspath(reference) if named else "this reference", split, crop)
    given = next((x for x in (samples, reference) if isinstance(x, Features)), None)
    if given is None or inception or features != "inception":
        extract = _extractor(os.fspath(features), os.fspath(inception))
    else:
        extract = given.extract
    for name, x in (("samples", samples), ("reference", reference)):
        if isinstance(x, Features) and x.extract.network.identity != extract.network.identity:
            raise InputError(
                f"the {name} are features of {x.extract.network.identity['features']}, the others "
                f"of {extract.network.identity['features']}; compute both with one network"
            )
    if not isinstance(samples, Features):
        samples = Features(samples, extract=extract)
    if isinstance(reference, str | os.PathLike):
        settings = EvaluationSettings(
            extract,
            os.fspath(reference),
            split or "train",
            default_cache(),
            choose_crop(crop or AUTO, None),
        )
        return samples, reference_of(settings, samples.image_shape)
    if not isinstance(reference, Features):
        reference = Features(reference, extract=extract)
    sizes = [{name: x.shape[1] for name, x in f.arrays.items()} for f in (samples, reference)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"samples have images of {samples.image_shape}, the reference of "
            f"{reference.image_shape}, whose features differ in number; give images of one size"
        )
    return samples, reference_of_features(reference.arrays)


@functools.lru_cache(maxsize=4)  # an extractor compiles its network once
def _extractor(features: str, inception: str) -> FeatureExtractor:
    use_compilation_cache()
    return FeatureExtractor(feature_network(features, inception))


def _extract(
    images: Any, extract: FeatureExtractor
) -> tuple[dict[str, np.ndarray], np.ndarray | None, tuple[int, ...]]:
    """Returns the features of images, their classes if they are known, and their shape."""
    label_N = None
    if isinstance(images, str | os.PathLike):
        found = open_image_set(images)
        label_N = found.label_N
        parts = found.parts(parts_of(found.shape[0]))
        batches: Iterator[Any] = (images_NHWC for _, images_NHWC in parts)
    elif isinstance(images, np.ndarray | jax.Array):
        batches = iter([images])
    elif isinstance(images, Iterable):
        batches = iter(images)
    else:
        raise InputError(
            f"images are a {type(images).__name__}; give an array, an iterable of arrays, or the "
            "path of an .npz or a folder"
        )
    computed, shapes = [], set()
    for batch in batches:
        images_NHWC = checked_pictures(batch)
        shapes.add(images_NHWC.shape[1:])
        if len(shapes) > 1:
            raise InputError(f"the batches have images of {shapes}; give images of one size")
        computed.append(extract(images_NHWC))
    if not computed or (count := sum(len(x["pool_ND"]) for x in computed)) < LEAST_IMAGES:
        raise InputError(f"{count if computed else 0} images; {LEAST_IMAGES} or more are needed")
    arrays = {name: np.concatenate([x[name] for x in computed]) for name in computed[0]}
    return arrays, label_N, shapes.pop()
