"""LPIPS: torchvision's VGG16 and the lpips package's heads -> a directory of weights."""

import os
import pathlib

import jax
import numpy as np

from varjax.convert.apply_map import fill
from varjax.convert.name_maps.tables import Link
from varjax.convert.sources import about, digests, report_not_finite
from varjax.convert.state_dicts import read_checkpoint, state_dicts
from varjax.convert.weights_dir import check_vacant, converted_files, write_weights
from varjax.core.errors import InputError
from varjax.tokenizers.losses.lpips import VGG16, init_lpips

MODELS = ("lpips",)
KNOWN_BY = {"features.0.weight": "torchvision's vgg16", "lin0.model.1.weight": "LPIPS heads"}


def convert_lpips(out: str | os.PathLike, vgg: str | os.PathLike, heads: str | os.PathLike) -> None:
    """Writes the directory `out`, for `load_lpips`, of the two files' tensors; VGG's classifier is
    left out.

    Raises InputError like `convert`, and for heads with negative weights.
    """
    out = pathlib.Path(out)
    check_vacant(out, converted_files(MODELS))
    tensors = {}
    for location, name in zip((vgg, heads), KNOWN_BY, strict=True):
        path = pathlib.Path(location)
        checkpoint = read_checkpoint(path)
        with about(path):
            found = state_dicts(checkpoint).get("", {})
            if name not in found:
                raise InputError(f"these are not {KNOWN_BY[name]}: there is no {name} in it")
            found = {n: x for n, x in found.items() if not n.startswith("classifier.")}
            if negative := [n for n, x in found.items() if n.startswith("lin") and np.any(x < 0)]:
                raise InputError(f"{', '.join(negative)}: a distance has no negative weights")
        report_not_finite(path, found)
        tensors |= found
    with about(pathlib.Path(f"{vgg}, {heads}")):
        leaves = fill(lpips_table(), jax.eval_shape(init_lpips, jax.random.key(0)), tensors)
    config = {"lpips": {"network": "vgg16", "version": "0.1"}}
    write_weights(out, config, {"lpips": leaves}, digests([pathlib.Path(vgg), pathlib.Path(heads)]))


def lpips_table() -> list[Link]:
    """All tensors of LPIPS on VGG16, by torchvision's and the lpips package's names."""
    links, number = [], 0  # in torchvision's list of layers
    for i, widths in enumerate(VGG16):
        for j in range(len(widths)):
            official, ours = f"features.{number}", f"conv_{i}_{j}"
            links.append(Link(f"{official}.weight", (f"{ours}/kernel",), "conv"))
            links.append(Link(f"{official}.bias", (f"{ours}/bias",)))
            number += 2  # itself and its ReLU
        number += 1  # the pooling
        links.append(Link(f"lin{i}.model.1.weight", (f"head_{i}",), ones=(0, 2, 3)))
    return links
