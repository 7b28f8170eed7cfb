"""Writes a folder of exported programs, weights and a script that samples without varjax."""

import collections
import dataclasses
import hashlib
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import jax
import numpy as np
from jax import export

import varjax
from varjax import trees
from varjax.checkpoints.license import license_of
from varjax.config.numbers import UINT32_MAX, whole_number
from varjax.convert.weights_dir import check_weights_dir, new_directory
from varjax.errors import InputError
from varjax.export.exported_model import WEIGHTS_FILE
from varjax.export.programs import (
    KINDS,
    NEEDED,
    every_input,
    export_program,
    model_functions,
    read_paths,
)
from varjax.models import Dtype, family_of, load, open_model
from varjax.nn.compute import ComputeConfig, Platform
from varjax.sampling.guidance import check_guide_is_used
from varjax.storage import files, folders, safetensors_io
from varjax.storage.buckets import as_path
from varjax.storage.safetensors_io import LazyArray
from varjax.tokenizers.vq.model import VQConfig

# Names of platforms in jax.export and in `ComputeConfig`.
PLATFORMS: dict[str, Platform] = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}
ABOUT_FILE = "model.json"
SCRIPTS = ("run.py", "exported_model.py")
LEAST_GUIDANCE = 1.01  # 1 turns guidance off, which is another program
# Numbers, but fixed, because the exported code checks each option alone, and not their order.
RANGE = "guidance_timestep_from", "guidance_timestep_to"


def export_model(
    location: str | os.PathLike,
    out: str | os.PathLike,
    what: Sequence[str] = KINDS,
    batch_sizes: Sequence[int] = (),
    platforms: Sequence[str] = tuple(PLATFORMS),
    dtype: Dtype = "auto",
    options: Mapping[str, Any] | None = None,
    **companions: Any,
) -> None:
    """Writes a folder that samples, edits, encodes and decodes with JAX, without varjax.

        varjax.export_model("runs/digits", "exported/digits", platforms=["cpu"])

    Args:
        location: model to export, as `varjax.load` finds it.
        out: folder to write, which must be empty or not exist.
        what: programs to export, of "sample", "encode", "decode", "edit"; an edit also encodes.
        batch_sizes: numbers of images that programs are compiled for; () for any number.
        platforms: platforms to compile for, of "cpu", "cuda", "tpu"; no such device is needed.
        dtype: "auto" is float32 for a CPU, else bfloat16.
        options: sampling options that replace the model's. Numbers remain inputs of the programs;
            the others, and lists, are fixed.
        companions: further arguments of `varjax.load`: ema, guide, refiner, draft_scales.

    Raises:
        InputError: a name or number that is not allowed, a model that cannot be exported, or an
            `out` that has files or cannot be written.
    """
    out, what = as_path(out), _checked("what", what, KINDS)
    what += tuple(name for kind in what for name in NEEDED.get(kind, ()) if name not in what)
    sizes = [whole_number("batch_size", size, 1) for size in sorted(set(batch_sizes))] or [None]
    platforms = _checked("platforms", platforms, tuple(PLATFORMS))
    _checked("dtype", [dtype], get_args(Dtype))
    check_weights_dir(out)
    folders.check_writable(out.parent)
    contents = {f"flatbuffers/{name}": path.read_bytes() for name, path in reader_files().items()}
    contents |= {name: (pathlib.Path(__file__).parent / name).read_bytes() for name in SCRIPTS}
    directory, programs, memory, identity = open_model(location), [], {}, {}
    dtypes: dict[str, set[Any]] = collections.defaultdict(set)  # by path
    read: dict[str, tuple[set[str], set[str]]] = {}
    for platform in platforms:
        compute = compute_for(platform, dtype, None not in sizes)
        model: Any = load(directory, compute=compute, **companions)
        chosen = model.options(**options or {})
        check_guide_is_used(companions.get("guide"), [chosen])
        for about, exported in exported_programs(model, chosen, what, sizes, platform, read):
            programs.append(about)
            print(f"exported {about['file']}", file=sys.stderr)
            contents[about["file"]] = bytes(exported.serialize())
            (weights, *_), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
            for path, kind in weights.items():
                dtypes[path].add(kind.dtype)
        identity[platform] = model.identity()
        one_image, two_images = (model.sampling_bytes(images, chosen) for images in (1, 2))
        per_image = two_images - one_image
        memory[platform] = {"weights": one_image - per_image, "image": per_image}
    tensors = {
        path: _in_format(leaf, dtypes[path])
        for path, leaf in trees.paths(model.params).items()
        if path in dtypes
    }
    roles = {path.partition("/")[0] for path in tensors}
    sources = [location, *(x for role, x in companions.items() if role in roles)]
    license = joined_licenses(sources)
    about = {
        "model": pathlib.PurePath(location).name,
        "family": family_of(directory).name,
        **license,
        **model_facts(model),
        **option_facts(chosen, set().union(*(numbers for _, numbers in read.values()))),
        "programs": programs,
        "memory_bytes": memory,
        "identity": identity,
        **version_facts(exported.calling_convention_version),
    }
    with new_directory(out, {WEIGHTS_FILE: tensors}) as folder:
        for name, content in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        safetensors_io.write_safetensors(folder / WEIGHTS_FILE, tensors, license)
        files.write_json(folder / ABOUT_FILE, about | {"sha256": _digests(folder)})


def compute_for(platform: str, dtype: Dtype, fixed_size: bool) -> ComputeConfig:
    """Returns how the programs of a platform compute.

    Only plain products are exported: jax.export does not guarantee that a later JAX runs the fused
    kernel for NVIDIA's GPUs. For TPUs, the size of groups of images depends on the batch size.

    Args:
        platform: platform to compile for, of `PLATFORMS`.
        dtype: a dtype, or "auto".
        fixed_size: whether the programs are for one number of images each.
    """
    plain = platform == "cuda" or (platform == "tpu" and not fixed_size)
    return ComputeConfig(
        dtype, attention_impl="xla" if plain else "auto", platform=PLATFORMS[platform]
    )


def exported_programs(
    model: Any,
    options: Any,
    what: Sequence[str],
    sizes: Sequence[int | None],
    platform: str,
    read: dict[str, tuple[set[str], set[str]]],
) -> Iterator[tuple[dict[str, Any], export.Exported]]:
    """Yields each program, and its entry in model.json.

    Args:
        model: pipeline of a family, for this platform.
        options: checked sampling options.
        what: names of the programs.
        sizes: batch sizes; None for any number of images.
        platform: platform to compile for.
        read: paths of the weights and numbers that a program reads, by its name; those of programs
            that have not been exported yet are added. The first edit reads the most.
    """
    weights = model.weights.shapes
    for function in model_functions(model, options, what):
        name, inputs = function.name, every_input(function, model.weights.shapes, options)
        if name not in read:
            exported = export_program(function, weights, options, inputs, 1, platform)
            read[name] = read_paths(exported, inputs)
        for size in sizes:
            parts = name, platform, function.most_kept or "", f"batch{size}" if size else ""
            about = {
                "name": name,
                "platform": platform,
                "batch_size": size,
                "most_kept": function.most_kept,
                "file": f"programs/{'.'.join(str(part) for part in parts if part)}.bin",
            }
            yield (
                about,
                export_program(
                    function, weights, options, inputs.only(*read[name]), size, platform
                ),
            )


def joined_licenses(locations: Sequence[str | os.PathLike]) -> dict[str, str]:
    """Returns {"license": "A; B"}, the different licenses of several models, or {} for none."""
    found = [license_of(open_model(location)).get("license") for location in locations]
    texts = dict.fromkeys(text for text in found if text)
    return {"license": "; ".join(texts)} if texts else {}


def model_facts(model: Any) -> dict[str, Any]:
    """Returns what model.json says of a model: shapes, classes, digest of the weights."""
    tokenizer = model.tokenizer
    return {
        "image_shape": model.image_shape,
        "edit_shape": model.edit_shape,
        "vocab": tokenizer.vocab if isinstance(tokenizer, VQConfig) else None,
        "classes": model.classes,
        "class_names": list(model.labels.names),
        "synsets": list(model.labels.synsets),
        "weights_digest": model.identity()["weights"],
    }


def option_facts(options: Any, numbers: set[str]) -> dict[str, Any]:
    """Returns what model.json says of the sampling options.

    Args:
        options: checked sampling options, a frozen dataclass.
        numbers: paths of the options that programs take as inputs.

    Returns:
        "options", which may change, with their limits; "fixed_options"; and "numbers", the values
        of all inputs by path.
    """
    seed = {"value": 0, "least": 0, "most": UINT32_MAX, "whole": True}
    changeable: dict[str, Any] = {"seed": seed | {"help": "random seed; each gives other images"}}
    fixed = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in numbers or field.name in RANGE:
            fixed[field.name] = value
            continue
        (least, most), about = field.metadata["limits"], field.metadata["help"]
        if field.name == "guidance":
            least = min(LEAST_GUIDANCE, value)
            about = f"maximum guidance scale, {least} or more"
        changeable[field.name] = {
            "value": value,
            "least": least,
            "most": most,
            "whole": isinstance(value, int),
            "help": about,
        }
    values = {path: x for path, x in trees.paths(options).items() if path in numbers}
    return {"options": changeable, "fixed_options": fixed, "numbers": {"seed": 0} | values}


def version_facts(calling_convention: int) -> dict[str, Any]:
    """Returns what model.json says of versions, by jax.export's guarantee of compatibility."""
    return {
        "varjax": varjax.__version__,
        "jax": jax.__version__,
        "calling_convention": calling_convention,
        "readable_by": (
            f"these programs need JAX {jax.__version__} or later that reads calling convention "
            f"{calling_convention} of jax.export (guaranteed for six months, usual for longer)"
        ),
    }


def reader_files() -> dict[str, pathlib.Path]:
    """Returns the files of the package by which jax.export reads programs, and its license.

    JAX does not install it, so an exported folder has a copy, and needs only JAX, NumPy and
    safetensors. The Apache License asks for its text with every copy, and the package has none.
    """
    import flatbuffers  # few need it

    modules = sorted(pathlib.Path(str(flatbuffers.__file__)).parent.glob("*.py"))
    license = pathlib.Path(__file__).parent / "flatbuffers_license.txt"
    return {path.name: path for path in modules} | {"LICENSE": license}


def _in_format(leaf: Any, dtypes: set[Any]) -> LazyArray:
    """Returns a leaf in the dtype of all programs, or else as it is."""
    array = np.asarray(leaf)
    dtype = dtypes.copy().pop() if len(dtypes) == 1 else array.dtype
    return LazyArray(array.shape, np.dtype(dtype), lambda: [array.astype(dtype)])


def _digests(folder: pathlib.Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[path.relative_to(folder).as_posix()] = digest
    return digests


def _checked(name: str, values: Sequence[str], allowed: Sequence[str]) -> tuple[str, ...]:
    if not values or any(value not in allowed for value in values):
        raise InputError(f"{name}={','.join(values)}: allowed are {', '.join(allowed)}")
    return tuple(value for value in allowed if value in values)
