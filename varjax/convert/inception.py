"""Converts FID's Inception-v3: torch-fidelity's or pytorch-fid's .pth, or TensorFlow's .pb."""

import functools
import os
import pathlib
import re

import jax
import numpy as np

from varjax import trees
from varjax.convert.apply_map import leaves_by_table
from varjax.convert.name_maps.name_map import Link, batch_norm_links
from varjax.convert.official_files import find_state_dicts, warn_not_finite
from varjax.convert.pth.read import read_checkpoint
from varjax.convert.tensorflow_graph import TensorFlowGraph
from varjax.convert.weights_dir import check_weights_dir, converted_files, sha256_of, write_weights
from varjax.errors import InputError, errors_naming
from varjax.metrics.inception import init_inception
from varjax.storage.files import as_path, local_copy

KNOWN_BY = "Mixed_7c.branch_pool.conv.weight"
IGNORED = re.compile(r"AuxLogits\.|.*\.num_batches_tracked")  # not part of our network
TF_STEM = {
    "Conv2d_1a_3x3": "conv",
    "Conv2d_2a_3x3": "conv_1",
    "Conv2d_2b_3x3": "conv_2",
    "Conv2d_3b_1x1": "conv_3",
    "Conv2d_4a_3x3": "conv_4",
}
TF_MIXED = {
    name: f"mixed_{i}" if i else "mixed"
    for i, name in enumerate("5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split())
}
# TensorFlow's tower for each of our branches; "" for a branch outside of any tower.
TF_TOWERS = {
    "6a": {"branch3x3": "", "branch3x3dbl": "tower/"},
    "7a": {"branch3x3": "tower/", "branch7x7x3": "tower_1/"},
}
TF_OTHER_TOWERS = {
    "branch1x1": "",
    "branch5x5": "tower/",
    "branch7x7": "tower/",
    "branch3x3": "tower/",
    "branch3x3dbl": "tower_1/",
    "branch7x7dbl": "tower_1/",
    "branch_pool": "tower_2/",
}


def convert_inception(out: str | os.PathLike, file: str | os.PathLike) -> None:
    """Writes the directory of FID's Inception-v3 that `load_inception` reads.

    Args:
        out: directory to write; see `convert`.
        file: torch-fidelity's weights-inception-2015-12-05-*.pth, pytorch-fid's
            pt_inception-2015-12-05-*.pth, or TensorFlow's classify_image_graph_def.pb.

    Raises:
        InputError: like `convert`.
    """
    out, path = as_path(out), local_copy(file)
    check_weights_dir(out, converted_files(["inception"]))
    if path.suffix == ".pb":
        tensors = read_graph(path)
    else:
        tensors = find_state_dicts(read_checkpoint(path)).get("", {})
    with errors_naming(path):
        if KNOWN_BY not in tensors:
            raise InputError(f"this is not FID's Inception-v3: it has no {KNOWN_BY}")
        tensors = {name: x for name, x in tensors.items() if not IGNORED.match(name)}
        params = jax.eval_shape(init_inception, jax.random.key(0))
        leaves = leaves_by_table(inception_table(), params, tensors)
    warn_not_finite(path, tensors)
    config = {"inception": {"network": "inception-v3", "version": "2015-12-05"}}
    write_weights(out, config, {"inception": leaves}, sha256_of([path]))


def inception_table() -> list[Link]:
    """Lists all tensors of FID's Inception-v3, by their names in both .pth files."""
    links = [Link("fc.weight", ("fc_kernel",), "linear"), Link("fc.bias", ("fc_bias",))]
    for module in _convolutions():
        ours = module.replace(".", "/")
        links.append(Link(f"{module}.conv.weight", (f"{ours}/kernel",), "conv"))
        links += batch_norm_links(f"{module}.bn", ours)
    return links


def read_graph(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the constants of TensorFlow's classify_image_graph_def.pb.

    Returns:
        Float32 arrays with the names and the order of axes that the .pth files have.

    Raises:
        InputError: the file is missing, or is not that graph.
    """
    if not path.is_file():
        raise InputError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}")
    graph, constants, scaled = TensorFlowGraph(path), {}, {}
    with errors_naming(path):
        for node in graph.nodes():
            if node.operation == "Const" and (array := graph.constant(node)) is not None:
                constants[node.name] = array
            elif node.operation == "BatchNormWithGlobalNormalization":
                scale = graph.flag(node, "scale_after_normalization")
                scaled[node.name.removesuffix("/batchnorm")] = scale
    sources = {"fc.weight": "softmax/weights", "fc.bias": "softmax/biases"}
    for module in _convolutions():
        node = tensorflow_name(module)
        sources[f"{module}.conv.weight"] = f"{node}/conv2d_params"
        for ours, name in {
            "weight": "gamma",
            "bias": "beta",
            "running_mean": "moving_mean",
            "running_var": "moving_variance",
        }.items():
            sources[f"{module}.bn.{ours}"] = f"{node}/batchnorm/{name}"
    if missing := [name for name in sources.values() if name not in constants]:
        raise InputError(
            f"{path} is not FID's Inception-v3: {len(missing)} of its {len(sources)} constants are "
            f"missing, {', '.join(missing[:3])} …"
        )
    tensors = {}
    for name, source in sources.items():
        tensor = constants[source]
        if name.endswith("conv.weight") and tensor.ndim == 4:
            tensor = tensor.transpose(3, 2, 0, 1)
        elif name == "fc.weight" and tensor.ndim == 2:
            tensor = tensor.T
        elif name.endswith("bn.weight") and not scaled.get(
            tensorflow_name(name[: -len(".bn.weight")]), True
        ):
            tensor = np.broadcast_to(np.float32(1), tensor.shape)
        tensors[name] = tensor
    return tensors


def tensorflow_name(module: str) -> str:
    """Returns TensorFlow's name of a convolution: "Mixed_7c.branch3x3_2a" -> "mixed_10/tower/…"."""
    if module in TF_STEM:
        return TF_STEM[module]
    mixed, branch = module.removeprefix("Mixed_").split(".")
    parts = re.fullmatch(r"(branch_?\w+?)(?:_(\d)([ab]?))?", branch)
    assert parts, module
    name, number, fork = parts.groups()
    tower = TF_TOWERS.get(mixed, TF_OTHER_TOWERS)[name]
    if fork:
        conv = "mixed/conv" if fork == "a" else "mixed/conv_1"
    else:
        conv = "conv" if number in (None, "1") else f"conv_{int(number) - 1}"
    return f"{TF_MIXED[mixed]}/{tower}{conv}"


@functools.cache
def _convolutions() -> list[str]:
    """Lists the names of all convolutions, such as "Mixed_5b.branch1x1"."""
    paths = trees.paths(jax.eval_shape(init_inception, jax.random.key(0)))
    return [p.removesuffix("/kernel").replace("/", ".") for p in paths if p.endswith("/kernel")]
