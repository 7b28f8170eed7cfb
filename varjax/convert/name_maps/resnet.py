"""Maps torchvision's ResNet-50, 101 and 152 to ours."""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np

from varjax.convert.name_maps.name_map import (
    Link,
    NameMap,
    Source,
    Tensors,
    batch_norm_links,
    count_numbers,
    fields_of,
    linear_links,
    option,
    tensor_shape,
)
from varjax.convert.weights_dir import sha256_of
from varjax.errors import InputError
from varjax.metrics.resnet import ResNetConfig
from varjax.storage.safetensors_io import Tensor

V1_RESIZE, V2_RESIZE = 256, 232
# First digits of the SHA-256 of torchvision's files, which are in their names, -> their resize
# (torchvision/models/resnet.py): of ResNet-50, 101 and 152.
KNOWN_FILES = {
    **dict.fromkeys(("19c8e357", "5d3b4d8f", "b121ed2d"), V1_RESIZE),  # before torchvision 0.11
    **dict.fromkeys(("0676ba61", "63fe2227", "394f9c45"), V1_RESIZE),
    **dict.fromkeys(("11ad3fa6", "cd907fc2", "f82ba261"), V2_RESIZE),
}


@dataclasses.dataclass(frozen=True)
class ResNetConvertOptions:
    """Holds what the tensors of a ResNet do not say.

    Attributes:
        resize: pixels of an image's shorter side before the center crop; None for the value that
            belongs to a known file.
    """

    resize: int | None = option(
        None, "shorter side of a ResNet's images before its crop (256 for V1, 232 for V2)", int
    )


def infer_resnet(tensors: Tensors, options: ResNetConvertOptions) -> ResNetConfig:
    """Infers the config of a ResNet; the options supply the resize.

    Raises InputError for other networks of that family, and for missing tensors.
    """
    if "layer1.0.conv3.weight" not in tensors:
        raise InputError(
            "is a ResNet of basic blocks, such as ResNet-18 or 34; give ResNet-50, 101 or 152"
        )
    inner, channels, *_ = tensor_shape(tensors, "layer1.0.conv2.weight", 4)
    if (inner, channels) != (64, 64):
        raise InputError(
            f"is a ResNeXt or a wide ResNet: layer1.0.conv2.weight is {inner} by {channels} "
            "channels, not 64 by 64; give ResNet-50, 101 or 152"
        )
    layers = tuple(count_numbers(tensors, rf"layer{i}\.(\d+)\.") for i in range(1, 5))
    classes, _ = tensor_shape(tensors, "fc.weight", 2)
    assert options.resize is not None
    return ResNetConfig(layers, classes, options.resize)


def resnet_table(config: ResNetConfig) -> list[Link]:
    """Lists all tensors of torchvision's ResNet, without its counters of batches."""
    links = list(linear_links("fc", "head"))
    for conv, norm, ours in _convolutions(config):
        links.append(Link(f"{conv}.weight", (f"{ours}/kernel",), "conv"))
        links += batch_norm_links(norm, ours)
    return links


def resnet_resize(
    source: Source, location: pathlib.Path, options: ResNetConvertOptions
) -> dict[str, int]:
    """Finds the resize by the file's SHA-256 if the options omit it.

    Raises InputError for an unknown file.
    """
    if options.resize is not None:
        return {}
    (digest,) = sha256_of(source.files[:1]).values()
    if (resize := KNOWN_FILES.get(digest[:8])) is None:
        raise InputError(
            "this is not one of torchvision's files, by its SHA-256, so the resize of its images "
            f"is unknown; give --resize: {V1_RESIZE} for V1 weights, {V2_RESIZE} for V2 weights"
        )
    return {"resize": resize}


def _buffers(config: ResNetConfig) -> dict[str, Tensor]:
    zero = np.zeros((), np.int64)
    return {f"{norm}.num_batches_tracked": zero for _, norm, _ in _convolutions(config)}


def _convolutions(config: ResNetConfig) -> Iterator[tuple[str, str, str]]:
    """Yields the official names of each convolution and its normalization, and our name."""
    yield "conv1", "bn1", "stem"
    for i, blocks in enumerate(config.layers, 1):
        for j in range(blocks):
            official, ours = f"layer{i}.{j}", f"layer{i}_{j}"
            for n in range(1, 4):
                yield f"{official}.conv{n}", f"{official}.bn{n}", f"{ours}/conv{n}"
            if j == 0:
                yield f"{official}.downsample.0", f"{official}.downsample.1", f"{ours}/projection"


RESNET_MAP = NameMap(
    part="classifier",
    flag="resnet",
    description="a classifier (torchvision's ResNet)",
    known_by="layer1.0.conv1.weight",
    config=ResNetConfig,
    options=ResNetConvertOptions,
    infer=infer_resnet,
    table=resnet_table,
    buffers=_buffers,
    buffer_names=("num_batches_tracked",),
    file_options=resnet_resize,
    option_values=fields_of("resize"),
)
