"""Classifies images: how probable it is that an image shows its class."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from varjax.errors import errors_naming, needs_extra
from varjax.metrics.features import FeatureExtractor, classifier_network

DIGITS = "digits"


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
        image_size: (height, width) of the images that it takes, gray or RGB; None for any size.
    """

    classes: int
    identity: dict[str, Any]
    predict: Callable[[np.ndarray], np.ndarray]
    image_size: tuple[int, int] | None = None

    def probabilities(self, images_NHWC: np.ndarray, label_N: np.ndarray) -> np.ndarray:
        """Returns the probability of its label for each image, (N,) float32."""
        probability_NV = self.predict(images_NHWC)
        return probability_NV[np.arange(len(label_N)), label_N].astype(np.float32)


def load_classifier(location: str | pathlib.Path) -> LoadedClassifier:
    """Loads a classifier.

    Args:
        location: directory that `varjax train-classifier` or `varjax convert --resnet=…` wrote; or
            "digits" for a small one, trained on scikit-learn's digits within a second.

    Raises:
        InputError: the classifier is missing or damaged.
    """
    if location == DIGITS:
        return digits_classifier()
    from scipy.special import softmax  # a quarter of a second, and few commands classify

    with errors_naming("classifier"):
        network = classifier_network(location)
    assert network.classes is not None
    extract, identity = FeatureExtractor(network), network.identity
    return LoadedClassifier(
        network.classes,
        {**identity["features_config"], "weights": identity["features_weights"][:16]},
        lambda images_NHWC: softmax(extract(images_NHWC)["logits_NV"], axis=-1),
        network.image_size,
    )


def digits_classifier() -> LoadedClassifier:
    """Trains a logistic regression on the pixels of scikit-learn's training digits."""
    with needs_extra("digits", "scikit-learn", "the classifier of digits"):
        from sklearn.linear_model import LogisticRegression  # a second, and only digits need it

    from varjax.data.sources import Digits

    train = Digits().source("train")
    model = LogisticRegression(max_iter=1000).fit(_pixels(train.images_NHWC), train.labels_N)
    return LoadedClassifier(
        classes=len(model.classes_),
        identity={"network": "logistic regression", "data": DIGITS},
        predict=lambda images_NHWC: model.predict_proba(_pixels(images_NHWC)),
        image_size=train.images_NHWC.shape[1:3],
    )


def _pixels(images_NHWC: np.ndarray) -> np.ndarray:
    return images_NHWC.mean(axis=-1).reshape(len(images_NHWC), -1) / 255
