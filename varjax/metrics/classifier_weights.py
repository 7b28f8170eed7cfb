"""Reads directories of classifiers: torchvision's ResNet, or a network that varjax trained."""

import pathlib

from varjax.checkpoints.weights import open_weights
from varjax.errors import InputError
from varjax.metrics.convnet import ConvNetConfig
from varjax.metrics.resnet import ResNetConfig
from varjax.storage.buckets import as_path
from varjax.storage.untrusted import shown
from varjax.trees import PyTree

PART = "classifier"  # name of the network in config.json and of its file
TYPE = "_type"  # in its settings; a converted ResNet has none
ClassifierConfig = ConvNetConfig | ResNetConfig
CONFIGS: dict[str, type[ClassifierConfig]] = {
    cls.__name__: cls for cls in (ConvNetConfig, ResNetConfig)
}
HOW_TO_MAKE = (
    "make one with: varjax train-classifier --data=DATA --out=DIRECTORY, or varjax convert "
    "--resnet=resnet101-63fe2227.pth --out=DIRECTORY (docs/convert.md says where that file is)"
)


def read_classifier(location: str | pathlib.Path) -> tuple[ClassifierConfig, PyTree]:
    """Reads a classifier's config and parameters.

    Args:
        location: directory that `varjax train-classifier` or `varjax convert --resnet=…` wrote.

    Raises:
        InputError: the directory is missing, holds no classifier, or is damaged.
    """
    if not (as_path(location) / "config.json").exists():
        raise InputError(f"{location} is not a directory of weights; {HOW_TO_MAKE}")
    weights = open_weights(location)
    if PART not in weights.config:
        raise InputError(f"{location} holds no classifier; {HOW_TO_MAKE}")
    settings = weights.config[PART]
    kind = settings.get(TYPE, ResNetConfig.__name__) if isinstance(settings, dict) else settings
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise InputError(
            f"{PART} in {location}/config.json is {shown(kind)}; known are {', '.join(CONFIGS)}"
        )
    return weights.read_converted(PART, CONFIGS[kind])
