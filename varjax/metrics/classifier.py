"""Classifiers of images: how probable is it that an image shows its class?"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from varjax import trees
from varjax.checkpoints.weights import open_weights
from varjax.errors import InputError
from varjax.metrics.features import FeatureExtractor, FeatureNetwork
from varjax.metrics.resnet import ResNetConfig, class_probabilities
from varjax.storage.buckets import as_path

DIGITS = "digits"
CONVERT_HELP = (
    "make one with: varjax convert --resnet=resnet101-63fe2227.pth --out=DIRECTORY "
    "(docs/convert.md says where that file is)"
)


class Classifier(Protocol):
    """Anything that returns how probable each image's label is."""

    def probabilities(self, images_NHWC: np.ndarray, label_N: np.ndarray) -> np.ndarray:
        """Returns the probability of its label for each image, (N,).

        Args:
            images_NHWC: uint8 images, gray or RGB.
            label_N: class of each image.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedClassifier:
    """A `Classifier` that commands use; `load_classifier` makes it.

        classifier = load_classifier("weights/resnet101")
        probability_N = classifier.probabilities(images_NHWC, label_N)

    Attributes:
        classes: number of classes that it distinguishes.
        identity: JSON data that identify the classifier.
        predict: images (N, H, W, channels) uint8 -> probabilities of all classes, (N, V).
        image_shape: (H, W, channels) of the images that it takes; None for any size, gray or RGB.
    """

    classes: int
    identity: dict[str, Any]
    predict: Callable[[np.ndarray], np.ndarray]
    image_shape: tuple[int, int, int] | None = None

    def probabilities(self, images_NHWC: np.ndarray, label_N: np.ndarray) -> np.ndarray:
        """Returns the probability of its label for each image, (N,) float32."""
        probability_NV = self.predict(images_NHWC)
        return probability_NV[np.arange(len(label_N)), label_N].astype(np.float32)


def load_classifier(location: str | pathlib.Path) -> LoadedClassifier:
    """Loads a classifier.

    Args:
        location: directory that `varjax convert --resnet=…` wrote; or "digits" for a small one,
            which is trained on scikit-learn's digits within a second.

    Raises:
        InputError: the classifier is missing or damaged.
    """
    if location == DIGITS:
        return digits_classifier()
    if not (as_path(location) / "config.json").exists():
        raise InputError(f"classifier={location} is not a directory of weights; {CONVERT_HELP}")
    weights = open_weights(location)
    if "classifier" not in weights.config:
        raise InputError(f"classifier={location} holds no classifier; {CONVERT_HELP}")
    config, params = weights.read_converted("classifier", ResNetConfig)
    identity = {**dataclasses.asdict(config), "weights": trees.digest(params)[:16]}
    extract = FeatureExtractor(
        FeatureNetwork(
            identity,
            params,
            lambda params, image_BHWC: {
                "probabilities_BV": class_probabilities(config, params, image_BHWC)
            },
        )
    )
    return LoadedClassifier(
        config.classes, identity, lambda images_NHWC: extract(images_NHWC)["probabilities_NV"]
    )


def digits_classifier() -> LoadedClassifier:
    """Trains a logistic regression on the pixels of scikit-learn's training digits."""
    from sklearn.linear_model import LogisticRegression  # a second, and only digits need it

    from varjax.data.sources import Digits

    train = Digits().source("train")
    model = LogisticRegression(max_iter=1000).fit(_pixels(train.images_NHWC), train.labels_N)
    return LoadedClassifier(
        classes=len(model.classes_),
        identity={"network": "logistic regression", "data": DIGITS},
        predict=lambda images_NHWC: model.predict_proba(_pixels(images_NHWC)),
        image_shape=train.images_NHWC.shape[1:],
    )


def _pixels(images_NHWC: np.ndarray) -> np.ndarray:
    return images_NHWC.reshape(len(images_NHWC), -1) / 255
