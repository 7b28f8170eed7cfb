"""Reads the reference of samples: an .npz of statistics, or images, whose statistics are cached."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from varjax.errors import InputError
from varjax.metrics.features import (
    FeatureArrays,
    FeatureExtractor,
    FeatureStore,
    extract_features,
    feature_sizes,
)
from varjax.metrics.fid import Moments, MomentSums
from varjax.metrics.image_sets import ImageSet, file_digest, open_image_set, parts_of
from varjax.storage import files, folders
from varjax.storage.cache_dir import cache_folder
from varjax.storage.npz import NpzArchive

# ADM's names of the statistics: of Inception's last pool, and of the map that sFID uses.
STATISTICS = {"pool_ND": ("mu", "sigma"), "spatial_ND": ("mu_s", "sigma_s")}
COUNT = "images"  # in the metadata of cached statistics
COMPARED_IMAGES = 10_000  # of the reference, for precision, recall and KID, as in ADM's files


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Holds the data that metrics need of a reference.

    Attributes:
        digest: identifier of the content.
        moments: moments of "pool_ND", and of "spatial_ND" if known.
        pool_MD: features of at most 10,000 images; None if only statistics are known.
        images: number of images that the moments were computed from; None if unknown.
    """

    digest: str
    moments: dict[str, Moments]
    pool_MD: np.ndarray | None
    images: int | None


def default_cache() -> pathlib.Path:
    """Returns the folder of cached statistics of references."""
    return cache_folder() / "references"


def read_reference(
    location: str | os.PathLike,
    extract: FeatureExtractor,
    cache: pathlib.Path,
    sizes: Mapping[str, int],
) -> Reference:
    """Reads a reference, and computes the statistics that `cache` lacks.

    Args:
        location: an .npz with "mu" and "sigma", perhaps "mu_s", "sigma_s" and images under "arr_0"
            (as ADM's); an .npz of images; or a folder of images of one size.
        extract: extractor of the features; with those of a classifier, an .npz of statistics is
            refused, because it is Inception's.
        cache: folder for computed statistics, keyed by content.
        sizes: sizes of the samples' features, from `feature_sizes`.

    Raises:
        InputError: none of these is at `location`, the statistics contain NaN or belong to other
            features, or the images have another size.
    """
    path = files.local_copy(location)
    if path.suffix == ".npz" and path.is_file():
        archive = NpzArchive(path)
        # Their size does not tell: a ResNet has as many features as Inception.
        if "mu" in archive.names and extract.network.classes is not None:
            raise InputError(
                f"{path} has statistics, which are taken to be Inception's, but these features "
                f"are the {extract.network.identity['features']}; use images as the reference, or "
                "features=inception"
            )
        if statistics := _read_statistics(path, archive, sizes):
            digest, pool_MD = file_digest(path), None
            if "arr_0" in archive.names:
                images = _open_images(path, extract, sizes)
                pool_MD = reference_of_images(images, digest, extract, cache).pool_MD
            return Reference(digest, statistics, pool_MD, None)
    images = _open_images(path, extract, sizes)
    return reference_of_images(images, images.digest, extract, cache)


def _open_images(
    path: pathlib.Path, extract: FeatureExtractor, sizes: Mapping[str, int]
) -> ImageSet:
    """Opens the images of a reference; raises InputError if their features have other sizes."""
    images = open_image_set(path)
    if feature_sizes(extract.network, images.shape[1:]) != sizes:
        raise InputError(
            f"{path} has images of {images.shape[1:]}, whose features differ from those of the "
            "samples; use images of the samples' size"
        )
    return images


def reference_of_features(features: FeatureArrays) -> Reference:
    """Makes a reference from features (N, …); raises InputError for fewer than two images."""
    moments = {k: Moments.of(features[k]) for k in STATISTICS.keys() & features.keys()}
    pool_ND = features["pool_ND"]
    return Reference("", moments, pool_ND[compared_rows(len(pool_ND))], len(pool_ND))


def compared_rows(count: int) -> np.ndarray:
    """Returns the rows of a reference's images whose features are kept, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, COMPARED_IMAGES)).astype(int))


def reference_of_images(
    images: ImageSet, digest: str, extract: FeatureExtractor, cache: pathlib.Path
) -> Reference:
    """Computes the statistics of images, or reads them from `cache`.

    Args:
        images: set of two or more images.
        digest: identifier of the images in `cache`, usually `images.digest`.
        extract: extractor of the features.
        cache: folder for computed statistics.

    Raises:
        InputError: fewer than two images.
    """
    if images.shape[0] < 2:
        raise InputError(f"the reference has {images.shape[0]} images; two or more are needed")
    request = {"images": digest, **extract.network.identity}
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    path, folder = cache / f"{key}.safetensors", cache / key
    if (cached := folders.read_or_remove(path)) is None:
        with folders.lock_folder(folder, wait=True):  # only one of several commands computes them
            if not path.exists():
                store = FeatureStore(folder, request)
                extract_features(images, extract, store, "reference")
                arrays, count = _summarize(store, images.shape[0])
                files.write_tensors(path, arrays, {COUNT: str(count)})
            files.remove(folder)
        cached = files.read_tensors(path)
    arrays, metadata = cached
    moments = {
        kind: Moments(arrays[mean], arrays[covariance])
        for kind, (mean, covariance) in STATISTICS.items()
        if mean in arrays
    }
    if COUNT not in metadata:
        raise InputError(f"{path} lacks the number of its images; remove it, and it is made again")
    return Reference(request["images"], moments, arrays["compared"], int(metadata[COUNT]))


def _summarize(store: FeatureStore, count: int) -> tuple[dict[str, np.ndarray], int]:
    """Returns the moments by ADM's names with the features to compare, and the number of images.

    Broken images, which have no features, are not counted.
    """
    compared_N = compared_rows(count)
    sums: dict[str, MomentSums] = {}
    compared = []
    valid = 0
    for part in parts_of(count):
        features = store.read(part, fewer=True)
        if not (length := len(features["pool_ND"])):
            continue
        valid += length
        for kind in STATISTICS.keys() & features.keys():
            sums.setdefault(kind, MomentSums()).add(features[kind])
        inside_N = (compared_N >= part.start) & (compared_N < part.stop)
        rows = compared_N[inside_N] - part.start
        compared.append(features["pool_ND"][rows[rows < length]])
    arrays = {"compared": np.concatenate(compared)}
    for kind, total in sums.items():
        mean, covariance = STATISTICS[kind]
        moments = total.moments()
        arrays |= {mean: moments.mean_D, covariance: moments.covariance_DD}
    return arrays, valid


def _read_statistics(
    path: pathlib.Path, archive: NpzArchive, sizes: Mapping[str, int]
) -> dict[str, Moments]:
    """Returns the moments in an .npz by kind of features; {} if it has only images."""
    moments = {}
    if "mu_s" in archive.names and "mu" not in archive.names:
        raise InputError(f"{path} has mu_s but no mu")
    for kind, (mean, covariance) in STATISTICS.items():
        if mean not in archive.names:
            continue
        if covariance not in archive.names:
            raise InputError(f"{path} has {mean} but no {covariance}")
        # Both are checked before they are read, because they may have any size.
        (shape, mean_dtype), (shape_DD, dtype) = map(archive.header, (mean, covariance))
        if len(shape) != 1 or shape_DD != shape * 2:
            raise InputError(
                f"{path}: {mean} has shape {shape} and {covariance} {shape_DD}; must be (D,) and "
                "(D, D)"
            )
        if shape != (size := sizes.get(kind),):
            raise InputError(
                f"{path} has statistics of {shape[0]} numbers per image, but these features have "
                f"{size}; use statistics of Inception, or images"
            )
        if "c" in (mean_dtype.kind, dtype.kind):
            raise InputError(f"{path}: {mean} or {covariance} has complex numbers")
        mean_D, covariance_DD = (archive.read(n).astype(np.float64) for n in (mean, covariance))
        for name, array in ((mean, mean_D), (covariance, covariance_DD)):
            if bad := int((~np.isfinite(array)).sum()):
                raise InputError(
                    f"{path}: {bad} of {array.size} numbers in {name} are NaN or infinite; make or "
                    "copy it again"
                )
        moments[kind] = Moments(mean_D, covariance_DD)
    return moments
