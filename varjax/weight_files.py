"""Writes trained or converted weights as a directory of weights, or for the official code."""

import hashlib
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np

from varjax import trees
from varjax.checkpoints.class_names import stored_names
from varjax.checkpoints.license import license_of
from varjax.checkpoints.weights import WeightsDir, open_weights
from varjax.convert.apply_map import official_buffers, to_official
from varjax.convert.name_maps import NAME_MAPS, name_map_of
from varjax.convert.name_maps.diffusers import diffusers_config, with_diffusers_names
from varjax.convert.sidecar import write_sidecar
from varjax.convert.weights_dir import new_directory, write_converted, write_files
from varjax.errors import InputError, check_setting
from varjax.metrics.classifier_weights import PART, read_classifier
from varjax.models import FAMILIES, open_model, read_model, read_tokenizer, run_crop
from varjax.storage import files
from varjax.storage.buckets import as_path
from varjax.tokenizers.kl.model import LATENT_STD_PATH, KLConfig
from varjax.trees import PyTree

Layout = Literal["official", "diffusers"]


def convert_run(run: str | os.PathLike, out: str | os.PathLike, ema: bool | None = None) -> None:
    """Writes the weights of a training run as a directory of weights.

    Takes the best weights if the run kept them, otherwise the last. The run of a tokenizer gives a
    directory with only the tokenizer.

    Args:
        run: directory of the run; RUN@STEP and RUN@best name a checkpoint.
        out: directory to write; see `convert`.
        ema: True writes the EMA weights, False the others; None chooses as `restore_weights` does.

    Raises:
        InputError: `run` is not a training run, or `out` cannot be written.
    """
    weights, out = open_weights(run), as_path(out)
    path = weights.path
    if weights.task is None:
        raise InputError(f"{path} is a converted directory already, not a training run")
    models, sampling = _read_models(weights, ema)
    leaves = {part: (config, trees.paths(params)) for part, (config, params) in models.items()}
    digest = hashlib.sha256((path / "config.json").read_bytes()).hexdigest()
    write_converted(out, leaves, {f"{path.name}/config.json": digest}, sampling, _about(weights))


def convert_to_torch(
    weights: str | os.PathLike,
    out: str | os.PathLike,
    ema: bool | None = None,
    layout: Layout = "official",
) -> None:
    """Writes weights for the official code: a .pth, a .safetensors and a JSON file of each model.

    The first two have equal content, with the official names and all buffers, so that
    `load_state_dict(torch.load(path, weights_only=True), strict=True)` accepts them. The
    .safetensors' metadata contain the license of published weights, if it is known. The JSON file,
    NAME.varjax.json, has what tensors cannot tell; `convert` reads it, so that the same model comes
    back. Messages on stderr name settings and parameters that differ from the official code's.

    Args:
        weights: training run, directory of weights, or name of a published model.
        out: directory to write, which must be empty or not exist.
        ema: True writes a run's EMA weights, False the others; None chooses as
            `restore_weights` does.
        layout: "diffusers" writes only a KL tokenizer, as a folder for diffusers'
            `AutoencoderKL.from_pretrained`.

    Raises:
        InputError: `weights` has no weights or a model without counterpart, or `out` is not empty
            or cannot be written.
    """
    check_setting("layout", layout, layout in get_args(Layout), " or ".join(get_args(Layout)))
    directory, out = open_model(weights), as_path(out)
    directory.check_ema(ema)
    models, sampling = _read_models(directory, ema)
    _check_official(directory, models)
    if layout == "diffusers":
        return _export_diffusers(directory, out, *models.get("tokenizer", (None, None)))
    about = _about(directory)
    contents = {}
    for part, (config, params) in models.items():
        tensors = {**to_official(config, params), **official_buffers(config)}
        contents |= {f"{part}.pth": tensors, f"{part}.safetensors": tensors}
        _note_differences(part, config)
        _note_constants(part, config, trees.paths(params))
    with new_directory(out, contents) as temporary:
        write_files(temporary, contents, license_of(directory))
        for part, (config, params) in models.items():
            # What is known of a model is not known of the tokenizer that it was published with.
            own = about if part == [*models][-1] else _about_tokenizer(about)
            options = sampling if name_map_of(config).sampling else None
            file = temporary / f"{part}.pth"
            write_sidecar(file, config, trees.paths(params), options, own)


def _about(weights: WeightsDir) -> dict[str, Any]:
    """Returns what config.json says of a converted directory's weights besides configs."""
    about: dict[str, Any] = {}
    if crop := run_crop(weights) or weights.config.get("crop"):
        about["crop"] = crop
    if names := stored_names(weights):
        about["class_names"] = names
    if release := weights.config.get("release"):
        about["release"] = release
    return about | license_of(weights)


def _about_tokenizer(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: about[name] for name in ("crop", "license") if name in about}


def _check_official(weights: WeightsDir, models: Mapping[str, tuple[Any, PyTree]]) -> None:
    """Raises InputError for a model that no name map knows."""
    for part, (model, _) in models.items():
        if not isinstance(model, tuple(name_map.config for name_map in NAME_MAPS)):
            raise InputError(
                f"{weights.path}: its {part} is a {type(model).__name__}, which only varjax has; "
                "there is no official code that could load it"
            )


def _note_differences(part: str, config: Any) -> None:
    """Prints which settings the official code must get before it loads the files."""
    if differences := name_map_of(config).official_differences(config):
        print(
            f"note: {part}: change the official code before it loads these files: "
            f"{', '.join(differences)}",
            file=sys.stderr,
        )


def _note_constants(part: str, config: Any, leaves: Mapping[str, Any]) -> None:
    """Prints which parameters official files lack, unless the official code has the same values."""
    name_map = name_map_of(config)
    official = name_map.official_constants(config)
    for path in name_map.constants(name_map.options()):
        if path in official and np.allclose(leaves[path], official[path]):
            continue
        code = f"; the official code has {official[path]:.6g}" if path in official else ""
        print(
            f"note: {part}: {path} is {leaves[path]:.6g}, which official files do not hold{code}",
            file=sys.stderr,
        )


def _export_diffusers(weights: WeightsDir, out: pathlib.Path, config: Any, params: Any) -> None:
    if not isinstance(config, KLConfig):
        raise InputError(
            f"layout=diffusers: {weights.path} has no KL tokenizer; leave --layout out"
        )
    tensors = with_diffusers_names(config, to_official(config, params))
    contents = {"diffusion_pytorch_model.safetensors": tensors}
    with new_directory(out, contents) as temporary:
        about = diffusers_config(config, float(params[LATENT_STD_PATH]))
        files.write_json(temporary / "config.json", about)
        write_files(temporary, contents, license_of(weights))
        file, own = temporary / next(iter(contents)), _about_tokenizer(_about(weights))
        write_sidecar(file, config, trees.paths(params), None, own)


def _read_models(
    weights: WeightsDir, ema: bool | None
) -> tuple[dict[str, tuple[Any, PyTree]], Any]:
    """Returns config and host parameters of each part, and the sampling options or None."""
    config, task = weights.config, weights.config.get("task")
    models, sampling = {}, None
    if task or "tokenizer" in config:
        models["tokenizer"] = read_tokenizer(weights, ema if weights.trains_tokenizer else None)
    # The task of a model of latents names the tokenizer that it builds on.
    if "tokenizer" in task if task else any(family.name in config for family in FAMILIES):
        family, model, params, sampling = read_model(weights, ema)
        models[family.name] = model, params
    if not task and PART in config:
        models[PART] = read_classifier(weights.path)
    if not models:
        raise InputError(f"{weights.path} has no model to write; its config.json names {[*config]}")
    return {part: (c, jax.device_get(params)) for part, (c, params) in models.items()}, sampling
