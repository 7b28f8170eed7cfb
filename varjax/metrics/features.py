"""Features of images for FID and related metrics, from a network or pixels, and their files."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from varjax import trees
from varjax.errors import InputError
from varjax.metrics.classifier_weights import read_classifier
from varjax.metrics.image_sets import ImageSet, parts_of
from varjax.metrics.inception import Inception, init_inception, load_inception
from varjax.runtime.data_parallel import batch_mesh, data_parallel, replicate
from varjax.runtime.first_call import FirstCall, announce_compilation
from varjax.storage import files, folders
from varjax.storage.buckets import as_path
from varjax.trees import PyTree

# "pool_ND"; "logits_NV" of Inception and classifiers; "spatial_ND" of Inception.
FeatureArrays = dict[str, np.ndarray]
# Images per device in one call. Smaller batches are padded: for another number, the compiler might
# sum in another order, and features would depend on the batch size.
CPU_BLOCK, ACCELERATOR_BLOCK = 8, 64
MAX_PIXELS = 32 * 32
INCEPTION = "inception-v3 2015-12-05"  # name of FID's network in an identity
REQUEST_FILE = "request.json"


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """Holds a network that computes features of images: a pure function and its parameters.

    Attributes:
        identity: JSON data that identify the network.
        params: parameters of the network.
        apply: (params, images (B, H, W, 3) uint8) -> {"pool_BD": …}, float32.
        classes: number of classes that its logits stand for, if they are numbered like the samples'
            classes; None for other logits, or none.
        image_size: the only (height, width) of images that it takes; None for any.
    """

    identity: dict[str, Any]
    params: PyTree
    apply: Callable[[PyTree, jax.Array], dict[str, jax.Array]]
    classes: int | None = None
    image_size: tuple[int, int] | None = None


def inception_network(location: str) -> FeatureNetwork:
    """Makes FID's network from a directory of weights; raises the errors of `load_inception`."""
    params = load_inception(location)
    identity = {
        "features": INCEPTION,
        "inception_weights": trees.digest(params),
    }
    return FeatureNetwork(identity, params, _inception_features)


def random_inception_network() -> FeatureNetwork:
    """Makes Inception with random weights, for tests and timing; its metrics are meaningless."""
    params = jax.jit(init_inception)(jax.random.key(0))
    return FeatureNetwork({"features": "random inception-v3"}, params, _inception_features)


def pixel_network() -> FeatureNetwork:
    """Makes a network without weights, whose features are the pixels.

    Use it for images that are too small for Inception. It gives no Inception Score and no sFID. A
    squared distance is the sum over positions of the mean over channels, with pixels in [0, 1], so
    a gray image has the same features with one channel or three.
    """
    return FeatureNetwork({"features": "pixels"}, {}, _pixel_features)


def classifier_network(location: str | pathlib.Path) -> FeatureNetwork:
    """Makes a network from a classifier: features from its penultimate layer, and its logits.

    Args:
        location: directory of the classifier; see `read_classifier`, whose errors this raises.
    """
    config, params = read_classifier(location)

    def apply(params: PyTree, image_BHWC: jax.Array) -> dict[str, jax.Array]:
        (H, W), size = image_BHWC.shape[1:3], config.image_size
        if size not in (None, (H, W)):
            raise InputError(
                f"the classifier {location} takes images of {size[0]}x{size[1]} pixels, not "
                f"{H}x{W}; train one for these with varjax train-classifier"
            )
        return config.outputs(params, image_BHWC)

    identity = {
        "features": f"penultimate layer of a {type(config).__name__.removesuffix('Config')}",
        "features_config": dataclasses.asdict(config),
        "features_weights": trees.digest(params),
    }
    return FeatureNetwork(identity, params, apply, config.classes, config.image_size)


def feature_network(features: str, inception: str) -> FeatureNetwork:
    """Makes the network that a command line names.

    Args:
        features: kind of features, "inception" or "pixels", or the directory of a classifier.
        inception: directory of Inception's weights; "" for other features.

    Raises:
        InputError: the arguments contradict each other, or the weights do not exist.
    """
    if features != "inception" and inception:
        raise InputError(f"features={features} needs no weights of Inception; leave inception out")
    if features == "pixels":
        return pixel_network()
    if features != "inception":
        if not as_path(features).exists():
            raise InputError(
                f"features={features}: allowed are inception, pixels, and the directory of a "
                "classifier, which does not exist"
            )
        return classifier_network(features)
    if not inception:
        raise InputError(
            "inception is missing: set it to a directory that varjax convert --inception=FILE "
            "wrote, or use features=pixels for tiny images, or a classifier's directory"
        )
    return inception_network(inception)


class FeatureExtractor:
    """Computes features on all devices of this process, with equal bits on any number of devices.

        extract = FeatureExtractor(network)
        features = extract(images_NHWC)

    Args:
        network: network that computes the features.
        devices: devices to use; None for all of this process.

    Attributes:
        network: network that computes the features.
        at_once: images per call of the compiled program; smaller batches are padded.
    """

    def __init__(self, network: FeatureNetwork, devices: Sequence[Any] | None = None):
        mesh = batch_mesh(devices)
        block = CPU_BLOCK if mesh.devices.flat[0].platform == "cpu" else ACCELERATOR_BLOCK
        self.network, self.at_once = network, block * mesh.size
        self._params = replicate(network.params, mesh)
        apply = data_parallel(lambda params, _, image_BHWC: network.apply(params, image_BHWC), mesh)
        self._apply = FirstCall(apply, lambda: announce_compilation("the feature network"))

    def __call__(
        self, images_NHWC: np.ndarray, progress: Callable[[int], Any] = lambda count: None
    ) -> FeatureArrays:
        """Computes features, float32.

        Args:
            images_NHWC: (N, H, W, 1 or 3) uint8; gray ones become RGB.
            progress: function called after each block with its number of images.

        Raises:
            InputError: the images have another dtype or shape, or features are not finite.
        """
        N, *shape = images_NHWC.shape
        if len(shape) != 3 or shape[-1] not in (1, 3) or images_NHWC.dtype != np.uint8:
            raise InputError(
                f"images are {images_NHWC.dtype} of shape {images_NHWC.shape}; must be uint8, "
                "(N, height, width, 1 or 3)"
            )
        parts, pending = [], None
        for start in range(0, N, self.at_once):
            block_BHWC = images_NHWC[start : start + self.at_once]
            padding = self.at_once - len(block_BHWC)
            block_BHWC = np.pad(block_BHWC, ((0, padding), *[(0, 0)] * 3), mode="edge")
            block_BHWC = np.broadcast_to(block_BHWC, (*block_BHWC.shape[:-1], 3))
            features = self._apply(self._params, None, block_BHWC)
            if pending is not None:  # fetched while the devices work on the next block
                parts.append(jax.device_get(pending))
            pending = features
            progress(self.at_once - padding)
        parts.append(jax.device_get(pending))
        names = {name: name.replace("_B", "_N") for name in parts[0]}
        joined = {o: np.concatenate([p[name] for p in parts])[:N] for name, o in names.items()}
        for name, x_ND in joined.items():
            if not (finite_N := np.isfinite(x_ND).all(axis=1)).all():
                raise InputError(
                    f"{name} of {N - finite_N.sum()} of {N} images contain NaN or infinity, which "
                    "means that the network's weights are damaged; convert them again"
                )
        return joined


def feature_sizes(network: FeatureNetwork, image_shape: Sequence[int]) -> dict[str, int]:
    """Returns the size of each kind of features ("pool_ND" …) of an image (H, W, channels).

    Raises InputError for images that are neither gray nor RGB.
    """
    if image_shape[2] not in (1, 3):
        raise InputError(
            f"images have {image_shape[2]} channels; gray (1) and RGB (3) have features"
        )
    images = jax.ShapeDtypeStruct((1, *image_shape[:2], 3), jnp.uint8)
    features = jax.eval_shape(network.apply, network.params, images)
    return {name.replace("_B", "_N"): x.shape[1] for name, x in features.items()}


class FeatureStore:
    """Stores features in a folder, part by part, so that an interrupted extraction can continue.

    Args:
        folder: folder that is absent, or was started for an equal request.
        request: JSON data that determine the features.

    Raises:
        InputError: the folder has other content.
    """

    def __init__(self, folder: pathlib.Path, request: Mapping[str, Any], write: bool = True):
        folders.claim_folder(folder, REQUEST_FILE, request, write)
        self._folder = folder

    def has(self, part: range) -> bool:
        """Returns whether a part can be read; a damaged part is reported and removed."""
        return folders.read_or_remove(self._file(part)) is not None

    def add(self, part: range, features: FeatureArrays) -> None:
        """Writes the features of a part."""
        files.write_tensors(self._file(part), features, {})

    def read(self, part: range, fewer: bool = False) -> FeatureArrays:
        """Reads the features of a part.

        Args:
            part: numbers of the images.
            fewer: whether broken images may have been left out.

        Raises:
            InputError: the file is damaged.
        """
        path = self._file(part)
        features, _ = files.read_tensors(path)
        lengths = {len(x) for x in features.values()}
        if len(lengths) != 1 or max(lengths) > len(part) or min(lengths) < len(part) and not fewer:
            raise InputError(f"{path} has features of other images; delete it and try again")
        return features

    def join(self, parts: list[range], keep_M: np.ndarray | None = None) -> FeatureArrays:
        """Reads parts into one array for each kind of features.

        Args:
            parts: parts to read.
            keep_M: which of all images to keep, (M,) bool; None keeps all.
        """
        features = []
        for part in parts:
            rows = slice(None) if keep_M is None else keep_M[part]
            features.append({name: x[rows] for name, x in self.read(part).items()})
        return {name: np.concatenate([x[name] for x in features]) for name in features[0]}

    def delete(self) -> None:
        """Removes the folder."""
        folders.remove_work_folder(self._folder)

    def _file(self, part: range) -> pathlib.Path:
        return self._folder / f"{part.start:09d}.safetensors"


def extract_features(
    images: ImageSet, extract: FeatureExtractor, store: FeatureStore, description: str
) -> None:
    """Computes the features that `store` lacks, with a progress bar named `description`."""
    count = images.shape[0]
    missing = [part for part in parts_of(count) if not store.has(part)]
    done = count - sum(map(len, missing))
    with tqdm(total=count, initial=done, unit=" images", desc=description) as bar:
        for part, images_NHWC in images.parts(missing):
            count = len(images_NHWC)  # 0 if all are broken; no program takes an empty array
            padded_NHWC = images_NHWC if count else np.zeros((1, *images.shape[1:]), np.uint8)
            features = extract(padded_NHWC, bar.update)
            store.add(part, {name: x[:count] for name, x in features.items()})


def _inception_features(params, image_BHWC):
    taps = Inception().apply({"params": params}, image_BHWC)
    assert isinstance(taps, dict)
    return {name: taps[name] for name in ("pool_BD", "spatial_BD", "logits_BV")}


def _pixel_features(params, image_BHWC):
    H, W = image_BHWC.shape[1:3]
    if H * W > MAX_PIXELS:  # a covariance of all pixels would not fit into memory
        raise InputError(
            f"features=pixels with images of {H}x{W}: allowed are up to {MAX_PIXELS} pixels; "
            "use features=inception"
        )
    flat_BD = image_BHWC.reshape(len(image_BHWC), -1).astype(jnp.float32)
    return {"pool_BD": flat_BD / (255 * math.sqrt(3))}
