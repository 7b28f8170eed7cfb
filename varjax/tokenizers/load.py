"""Loads a tokenizer from its run, a run that uses it, or a converted directory."""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax.checkpoints.model_files import (
    find_model,
    read_converted,
    read_converted_config,
    read_model_config,
    read_task_part,
)
from varjax.checkpoints.saved_steps import SavedSteps, restore_weights
from varjax.config import config_tree
from varjax.errors import InputError
from varjax.storage import files
from varjax.tokenizers.contract import Latents, Tokenizer, checked_images
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.vq.model import VQConfig
from varjax.trees import PyTree

RANDOM = "random"  # in place of the location of weights

# The one table of kinds: class name of the task that trains it -> its config. A name and not the
# task itself, for using a tokenizer should not import training.
TOKENIZERS: dict[str, type[Tokenizer]] = {"VQTask": VQConfig, "KLTask": KLConfig}


class LoadedTokenizer:
    """Encodes and decodes images with a tokenizer and its weights; compiled once per shape.

        tokenizer = varjax.load_tokenizer("runs/digits_tokenizer")
        latents = tokenizer.encode(images_BHWC)  # {"tokens": (B, L) int32}
        images_BHWC = tokenizer.decode(latents)

    Attributes:
        config: config of the tokenizer; see `varjax.tokenizers.contract.Tokenizer`.
        params: parameters of the tokenizer.
    """

    def __init__(self, config: Tokenizer, params: PyTree):
        self.config, self.params = config, jax.device_put(params)
        # Shapes in names are for inside, where they are read beside the code.
        self._names = {name.rpartition("_")[0]: name for name in config.latent_spec}
        self._encode, self._decode = jax.jit(config.encode), jax.jit(config.decode)

    def encode(self, images_BHWC: np.ndarray | jax.Array) -> dict[str, jax.Array]:
        """Encodes images, uint8 or floats in [0, 1].

        Returns:
            {"tokens": (B, L) int32}, or {"mean", "std"}: (B, h, w, Z) float32, not scaled, of a KL
            tokenizer.

        Raises:
            InputError: images of another shape or type.
        """
        latents = self._encode(self.params, checked_images(images_BHWC, self.config.image_shape))
        return {name: latents[inside] for name, inside in self._names.items()}

    def decode(self, latents: Latents | np.ndarray | jax.Array) -> jax.Array:
        """Decodes latents into images (B, H, W, channels), float32 in [0, 1].

        Args:
            latents: result of `encode`, or its first array alone: tokens, or means.

        Raises:
            InputError: arrays of other names or shapes.
        """
        spec = self.config.latent_spec
        needed = {name: spec[inside].shape for name, inside in self._names.items()}
        first = next(iter(needed))
        given = latents if isinstance(latents, Mapping) else {first: latents}
        shapes = {name: np.shape(x)[1:] for name, x in given.items()}
        fits = first in shapes and shapes.items() <= needed.items()
        if not fits or len({len(x) for x in given.values()}) > 1:
            raise InputError(f"latents have shapes (B, …) of {shapes}; needed are {needed}")
        arrays = {self._names[name]: jnp.asarray(x) for name, x in given.items()}
        return self._decode(self.params, arrays)


def load_tokenizer(location: str | pathlib.Path, ema: bool | None = None) -> LoadedTokenizer:
    """Loads a tokenizer alone, ready to encode and decode.

    Args:
        location: run of a tokenizer, run that uses one, converted directory, or name of a published
            model: "vae_ch160v4096z32", "var_d16".
        ema: True reads the averaged weights of a tokenizer's run, False the others; None reads the
            averaged weights if there are any.

    Raises:
        InputError: says what `location` lacks.
    """
    return LoadedTokenizer(*read_tokenizer(location, ema))


def read_tokenizer(location: str | pathlib.Path, ema: bool | None = None) -> tuple[Any, PyTree]:
    """Reads (config, params) of a tokenizer; see `load_tokenizer` for arguments and errors."""
    directory = find_model(location)
    data = read_model_config(directory)
    if "task" not in data:
        return read_converted(directory, "tokenizer", _config_class(data.get("tokenizer", {})))
    config = read_tokenizer_config(directory)
    if data["task"]["_type"] in TOKENIZERS:
        return config, restore_weights(directory, ema)
    return config, files.read_tensors(directory / "frozen.safetensors")[0]


def read_tokenizer_config(location: str | pathlib.Path) -> Any:
    """Reads the config of a tokenizer alone, as `load_tokenizer` finds it.

    No device is used, so a config file may call it before processes are connected.
    """
    directory = find_model(location)
    data = read_model_config(directory)
    if "task" not in data:
        kind = _config_class(data.get("tokenizer", {}))
        return read_converted_config(directory, "tokenizer", kind)
    task = data["task"]
    if config_class := TOKENIZERS.get(task["_type"]):
        return read_task_part(data, "model", config_class, directory)
    if "tokenizer" not in task:
        raise InputError(f"{directory} is a run of {task['_type']}, which holds no tokenizer")
    return config_tree.from_dict(_config_class(task["tokenizer"]), task["tokenizer"])


def read_expected_tokenizer(location: str | pathlib.Path, expected: Tokenizer) -> PyTree:
    """Reads the parameters at `location`.

    Raises:
        InputError: there is none, or another tokenizer than `expected` (with all differences).
    """
    found, params = read_tokenizer(location)
    a, b = (config_tree.to_dict(config) for config in (found, expected))
    names = [name for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)]
    if lines := [f"{name}: {a.get(name)} there, {b.get(name)} here" for name in names]:
        raise InputError(f"{location} holds another tokenizer:\n  " + "\n  ".join(lines))
    return params


def read_frozen_tokenizer(location: str, tokenizer: Tokenizer) -> PyTree:
    """Reads the parameters of `tokenizer` at `location`; draws fresh ones for "random".

    Raises InputError where there are none, or those of another tokenizer.
    """
    if location != RANDOM:
        params = read_expected_tokenizer(location, tokenizer)
        warn_unfinished(location)
        return params
    print("the tokenizer is RANDOM: good for measuring speed, not for images", file=sys.stderr)
    return jax.device_get(jax.jit(tokenizer.init)(jax.random.key(0)))


def warn_unfinished(location: str | pathlib.Path) -> None:
    """Prints a note where `location` is a run that has not come to the number of steps it plans."""
    directory = find_model(location)
    steps = read_model_config(directory).get("steps") or 0
    saved = SavedSteps(directory / "checkpoints").steps() if steps else []
    if saved and saved[-1] < steps:
        print(
            f"note: {directory} stands at step {saved[-1]} of {steps}; if it did not stop by "
            "itself, let it finish before anything is built on it",
            file=sys.stderr,
        )


def _config_class(data: dict[str, Any]) -> type[Tokenizer]:
    """The kind of tokenizer whose fields these are; config.json names it only in some tasks."""
    kinds: list[Any] = list(TOKENIZERS.values())
    for kind in kinds:
        if data.keys() - {"_type"} <= {field.name for field in dataclasses.fields(kind)}:
            return kind
    return kinds[0]  # whose reader says what is unknown
