"""Converts LPIPS: torchvision's VGG16 and the lpips package's heads -> a directory of weights."""

import os

import jax
import numpy as np

from varjax.convert.apply_map import leaves_by_table
from varjax.convert.name_maps.name_map import Link, conv_links
from varjax.convert.official_files import find_state_dicts, warn_not_finite
from varjax.convert.pth.read import read_checkpoint
from varjax.convert.weights_dir import check_weights_dir, converted_files, sha256_of, write_weights
from varjax.errors import InputError, errors_naming
from varjax.storage import files
from varjax.storage.untrusted import abridged
from varjax.tokenizers.losses.lpips import VGG16, init_lpips

# For each file, a tensor that identifies it, and what it holds. A loss is not a kind of model, so
# it is not in NAME_MAPS.
SOURCES = {"features.0.weight": "torchvision's vgg16", "lin0.model.1.weight": "LPIPS heads"}


def convert_lpips(out: str | os.PathLike, vgg: str | os.PathLike, heads: str | os.PathLike) -> None:
    """Writes the directory of LPIPS on VGG16 that `load_lpips` reads.

    Args:
        out: directory to write; see `convert`.
        vgg: torchvision's vgg16, whose classifier is left out.
        heads: weights/v0.1/vgg.pth of the lpips package.

    Raises:
        InputError: like `convert`, and for heads with negative weights.
    """
    out = files.as_path(out)
    check_weights_dir(out, converted_files(["lpips"]))
    tensors = {}
    for location, known_by in zip((vgg, heads), SOURCES, strict=True):
        path = files.local_copy(location)
        checkpoint = read_checkpoint(path)
        with errors_naming(path):
            weights = find_state_dicts(checkpoint).get("", {})
            if known_by not in weights:
                raise InputError(f"this is not {SOURCES[known_by]}: it has no {known_by}")
            weights = {n: x for n, x in weights.items() if not n.startswith("classifier.")}
            if negative := [n for n, x in weights.items() if n.startswith("lin") and np.any(x < 0)]:
                names = ", ".join(abridged(negative))
                raise InputError(f"{names}: weights of a distance must not be negative")
        warn_not_finite(path, weights)
        tensors |= weights
    with errors_naming(f"{vgg}, {heads}"):
        params = jax.eval_shape(init_lpips, jax.random.key(0))
        leaves = leaves_by_table(lpips_table(), params, tensors)
    config = {"lpips": {"network": "vgg16", "version": "0.1"}}
    sources = sha256_of([files.local_copy(vgg), files.local_copy(heads)])
    write_weights(out, config, {"lpips": leaves}, sources)


def lpips_table() -> list[Link]:
    """Lists all tensors of LPIPS on VGG16, by torchvision's and the lpips package's names."""
    links: list[Link] = []
    number = 0  # in torchvision's list of layers
    for i, widths in enumerate(VGG16):
        for j in range(len(widths)):
            links += conv_links(f"features.{number}", f"conv_{i}_{j}")
            number += 2  # the convolution and its ReLU
        number += 1  # the pooling
        links.append(Link(f"lin{i}.model.1.weight", (f"head_{i}",), ones=(0, 2, 3)))
    return links
