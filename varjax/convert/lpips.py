"""Converts LPIPS: torchvision's VGG16 and the lpips package's heads -> a directory of weights."""

import os

import jax
import numpy as np

from varjax.convert.apply_map import leaves_by_table
from varjax.convert.name_maps.name_map import Link, conv_links
from varjax.convert.official_files import find_state_dicts
from varjax.convert.pth.read import read_checkpoint
from varjax.convert.sources import errors_naming, sha256_of, warn_not_finite
from varjax.convert.weights_dir import check_weights_dir, converted_files, write_weights
from varjax.errors import InputError
from varjax.storage import files
from varjax.storage.untrusted import abridged
from varjax.tokenizers.losses.lpips import VGG16, init_lpips

# For each file, a tensor it is known by, and what it holds. A loss is no kind of model, so this
# does not stand in NAME_MAPS.
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
            found = find_state_dicts(checkpoint).get("", {})
            if known_by not in found:
                raise InputError(f"these are not {SOURCES[known_by]}: there is no {known_by} in it")
            found = {n: x for n, x in found.items() if not n.startswith("classifier.")}
            if negative := [n for n, x in found.items() if n.startswith("lin") and np.any(x < 0)]:
                names = ", ".join(abridged(negative))
                raise InputError(f"{names}: a distance has no negative weights")
        warn_not_finite(path, found)
        tensors |= found
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
