"""Finds, reads and loads models and tokenizers of every kind; holds the one table of kinds.

docs/add_a_family.md says what a new family needs and what uses it.
"""

import dataclasses
import functools
import importlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from varjax.checkpoints.class_names import read_class_names
from varjax.checkpoints.weights import (
    WeightsDir,
    find_weights,
    no_checkpoints,
    open_weights,
    read_generator,
    split_step,
)
from varjax.errors import InputError
from varjax.mar.model import MARConfig
from varjax.mar.pipeline import MARPipeline
from varjax.mar.sample import MAROptions
from varjax.nn.compute import ComputeConfig
from varjax.runtime.compilation_cache import use_compilation_cache
from varjax.sampling.sampler import Sampler
from varjax.storage import files
from varjax.storage.buckets import as_path
from varjax.tokenizers.contract import Latents, Tokenizer, checked_images
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.vq.model import VQConfig
from varjax.trees import PyTree
from varjax.var.model import VARConfig
from varjax.var.pipeline import VARPipeline
from varjax.var.sample import VAROptions

Dtype = Literal["auto", "float32", "bfloat16"]
DRAFT_SCALES = 8  # of the 10 of a model for 256 pixels, before those of a refiner


@dataclasses.dataclass(frozen=True)
class Family:
    """Describes one kind of generative model.

    Attributes:
        name: name of the model's entry in a converted directory's config.json, and of its file.
        task: class name of the training task, as in a run's config.json. A name instead of the
            class, so that sampling does not import training.
        config: class of the model's config, a frozen dataclass with a method `init(key) -> params`.
        options: class of the sampling options, a frozen dataclass; its fields become command-line
            flags.
        pipeline: (tokenizer config, config, {"tokenizer": params, name: params}, options, compute,
            devices) -> Sampler.
        presets: names of the published sizes, which `config.preset` takes.
        benchmark: () -> module with what benchmarks measure; see `varjax.sampling.programs`. It is
            imported when it is called, because it imports training.
        needs_tokenizer: whether the pipeline requires a tokenizer; if not, the tokenizer's config
            may be None.
        takes_guide: whether the pipeline has a method `with_guide`, for autoguidance.
        takes_refiner: whether the pipeline has a method `with_refiner`, for collaborative decoding.
        keeps_scales: whether the pipeline has methods `vary` and `upscale`, which keep the first
            scales of an image.
    """

    name: str
    task: str
    config: type
    options: type
    pipeline: Callable[..., Sampler]
    presets: tuple[str, ...] = ()
    benchmark: Callable[[], Any] | None = None
    needs_tokenizer: bool = True
    takes_guide: bool = False
    takes_refiner: bool = False
    keeps_scales: bool = False


FAMILIES = (
    Family(
        "var",
        "VARTask",
        VARConfig,
        VAROptions,
        VARPipeline,
        presets=("d16", "d20", "d24", "d30", "d36"),
        benchmark=lambda: importlib.import_module("varjax.var.benchmark"),
        takes_guide=True,
        takes_refiner=True,
        keeps_scales=True,
    ),
    Family(
        "mar",
        "MARTask",
        MARConfig,
        MAROptions,
        MARPipeline,
        presets=("mar_b", "mar_l", "mar_h"),
        benchmark=lambda: importlib.import_module("varjax.mar.benchmark"),
        needs_tokenizer=False,
        takes_guide=True,
    ),
)


@dataclasses.dataclass(frozen=True)
class TokenizerKind:
    """Describes one kind of tokenizer.

    Attributes:
        task: class name of the training task, as in a run's config.json.
        config: class of the tokenizer's config.
        crop: crop of photographs in the published recipe.
    """

    task: str
    config: type[Tokenizer]
    crop: Literal["random", "center"]


TOKENIZERS = (
    TokenizerKind("VQTask", VQConfig, "random"),
    TokenizerKind("KLTask", KLConfig, "center"),  # MAR's and latent diffusion's
)


def option_classes() -> tuple[type, ...]:
    """Returns the sampling options of every family, from which command-line flags are made."""
    return tuple(family.options for family in FAMILIES)


def benchmark_of(preset: str) -> Any:
    """Returns what benchmarks measure of a published size; raises InputError for other names."""
    for family in FAMILIES:
        if preset in family.presets and family.benchmark is not None:
            return family.benchmark()
    allowed = ", ".join(name for family in FAMILIES for name in family.presets)
    raise InputError(f"preset {preset!r}: allowed are {allowed}")


def open_model(location: str | os.PathLike) -> WeightsDir:
    """Opens a training run (RUN, RUN@STEP, RUN@best), a converted directory or a published model.

    A published model is downloaded and converted at its first use; see `varjax.convert.pretrained`.

    Raises:
        InputError: there is no model, or it could not be downloaded; says what to do by hand.
    """
    run, step = split_step(location)
    path = find_weights(run)
    if not files.exists(path):
        from varjax.convert.name_maps import RELEASES  # few need the converter
        from varjax.convert.pretrained import resolve_weights

        if step is not None and str(run) in RELEASES:  # refused before the download
            raise no_checkpoints(path, step)
        return open_weights(resolve_weights(path))
    return open_weights(location)


def family_of(weights: WeightsDir) -> Family:
    """Finds the family of the model in a run or a converted directory.

    Raises InputError if there is none, such as in a run of a tokenizer.
    """
    for family in FAMILIES:
        if family.task == weights.task or (weights.task is None and family.name in weights.config):
            return family
    if weights.task is not None:
        allowed = ", ".join(family.task for family in FAMILIES)
        raise InputError(
            f"{weights.path} is a run of {weights.task}, not of a transformer ({allowed}), such as "
            "runs/digits"
        )
    stems = ", ".join(sorted(path.stem for path in weights.path.glob("*.safetensors")))
    names = " or ".join(f"--{family.name}" for family in FAMILIES)
    raise InputError(
        f"{weights.path} has only {stems or 'no weights'}; convert it again with {names} as well"
    )


def read_model(
    location: str | pathlib.Path | WeightsDir, ema: bool | None = None
) -> tuple[Family, Any, PyTree, Any]:
    """Reads (family, config, params, sampling options) of the model at `location`.

    Args:
        location: like in `load`, or a directory that is open.
        ema: True reads a run's EMA weights, False the others; None chooses as
            `restore_weights` does.

    Raises:
        InputError: says what `location` lacks.
    """
    weights = location if isinstance(location, WeightsDir) else open_model(location)
    f = family_of(weights)
    return f, *read_generator(weights, f.name, f.task, f.config, f.options, ema)


def tokenizer_kind(weights: WeightsDir) -> TokenizerKind:
    """Finds the kind of tokenizer in a directory by its task or its settings.

    Raises InputError if there is no tokenizer.
    """
    for kind in TOKENIZERS:
        if kind.task == weights.task:
            return kind
    task = weights.config.get("task")
    if task is not None and "tokenizer" not in task:
        raise InputError(f"{weights.path} is a run of {weights.task}, which has no tokenizer")
    names = weights.tokenizer_settings().keys() - {"_type"}
    for kind in TOKENIZERS:
        config_class: Any = kind.config
        if names <= {field.name for field in dataclasses.fields(config_class)}:
            return kind
    return TOKENIZERS[0]  # whose reader says what is unknown


def read_tokenizer_config(location: str | pathlib.Path | WeightsDir) -> Any:
    """Reads the config of a tokenizer alone, as `load_tokenizer` finds it.

    No device is used, so a config file may call it before processes are connected.
    """
    weights = location if isinstance(location, WeightsDir) else open_model(location)
    return weights.read_tokenizer_config(tokenizer_kind(weights).config)


def read_tokenizer(
    location: str | pathlib.Path | WeightsDir, ema: bool | None = None
) -> tuple[Any, PyTree]:
    """Reads (config, params) of a tokenizer; see `load_tokenizer` for arguments and errors."""
    weights = location if isinstance(location, WeightsDir) else open_model(location)
    return weights.read_tokenizer(tokenizer_kind(weights).config, ema)


def recipe_crop(location: str | pathlib.Path | WeightsDir) -> Literal["random", "center"]:
    """Finds how a model's photographs are cropped: as in its run, else as in the recipe."""
    weights = location if isinstance(location, WeightsDir) else open_model(location)
    crop = run_crop(weights) or weights.config.get("crop")
    for known in ("random", "center"):
        if crop == known:
            return known
    return tokenizer_kind(weights).crop


def run_crop(weights: WeightsDir) -> Any:
    """Returns the crop of the images in a run, or of those that its cached latents are made of.

    None if there is no such setting: digits are not cropped.
    """
    from varjax.data.latent_shards import ABOUT_FILE  # loading weights needs no datasets

    data = weights.config.get("data")
    if not isinstance(data, dict):
        return None
    if data.get("_type") == "CachedLatents":
        # The cache may be gone, but the run's own copy is missing in runs of older versions.
        copies = weights.path / "data.json", as_path(str(data.get("root"))) / ABOUT_FILE
        settings = (files.read_json(path).get("settings") for path in copies if path.exists())
        data = next(filter(None, settings), None)
    return data.get("crop") if isinstance(data, dict) else None


def load(
    location: str | pathlib.Path | WeightsDir,
    dtype: Dtype = "auto",
    devices: Sequence[Any] | None = None,
    compute: ComputeConfig | None = None,
    guide: str | pathlib.Path | None = None,
    refiner: str | pathlib.Path | None = None,
    draft_scales: int | None = None,
    ema: bool | None = None,
) -> Sampler:
    """Loads a model with its tokenizer, ready to sample.

        model = varjax.load("runs/digits")
        images_BHWC = model.sample([3, 1, 4], seed=0)

    Programs that take long to compile are cached on disk, so the next process starts sooner;
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.

    Args:
        location: training run, directory written by `varjax convert`, or name of a published model,
            "var_d16", which is downloaded and converted on first use; or a directory that is open.
            A run's best weights are loaded if it kept them; RUN@STEP and RUN@best name a
            checkpoint.
        dtype: dtype of the transformer's matmuls and of the decoder; "auto" is
            float32 on a CPU, else bfloat16.
        devices: devices that share each batch; None for all of this process.
        compute: replaces `dtype`, to set more options.
        guide: location of a weaker model with the same tokenizer and classes, for autoguidance;
            None to guide by "no class".
        refiner: location of a smaller VAR that draws the fine scales; see
            `VARPipeline.with_refiner`.
        draft_scales: number of scales drawn before the refiner's; None for 8. Refused without a
            refiner.
        ema: True loads a run's EMA weights, False the others; None loads the EMA weights if there
            are any, unless the others were the best by `keep_best` ("eval/…").

    Returns:
        The family's pipeline: `varjax.VARPipeline` or `varjax.MARPipeline`.

    Raises:
        InputError: `location` lacks something, or an argument is not allowed.
    """
    if dtype not in get_args(Dtype):
        raise InputError(f"dtype={dtype!r}: allowed are {', '.join(get_args(Dtype))}")
    if compute is not None and dtype != "auto":
        raise InputError(f"dtype={dtype!r} and compute={compute}: give the dtype within compute")
    drafted = choose_draft_scales(refiner, draft_scales)
    use_compilation_cache()
    weights = location if isinstance(location, WeightsDir) else open_model(location)
    family = family_of(weights)
    companions = {"guide": (guide, family.takes_guide), "refiner": (refiner, family.takes_refiner)}
    for role, (other, allowed) in companions.items():
        if other is not None and not allowed:
            raise InputError(f"{role}={other}: models of the family {family.name} take no {role}")
    _, config, params, options = read_model(weights, ema)
    tokenizer, tokenizer_params = None, {}
    if family.needs_tokenizer or weights.config.keys() & {"task", "tokenizer"}:
        # Not at a step, which a run in progress may have replaced since it was read.
        tokenizer, tokenizer_params = read_tokenizer(dataclasses.replace(weights, step=None))
    model: Any = family.pipeline(
        tokenizer,
        config,
        {"tokenizer": tokenizer_params, family.name: params},
        options,
        compute or ComputeConfig(dtype),
        devices,
    )
    model.labels = read_class_names(weights, model.classes)
    if family.takes_guide:
        model.loader = functools.partial(load, dtype=dtype, devices=devices, compute=compute)
    model = model if guide is None else model.with_guide(guide)
    return model if refiner is None else model.with_refiner(refiner, drafted)


def choose_draft_scales(refiner: str | pathlib.Path | None, draft_scales: int | None) -> int:
    """Returns the number of scales before those of a refiner: 8 unless another one is given.

    Raises InputError for a number without a refiner, which would do nothing.
    """
    if draft_scales is not None and not refiner:
        raise InputError(
            f"draft_scales={draft_scales}: a refiner draws the other scales, and none is given; "
            "give a refiner, or leave draft_scales out"
        )
    return DRAFT_SCALES if draft_scales is None else draft_scales


def load_tokenizer(location: str | pathlib.Path, ema: bool | None = None) -> "LoadedTokenizer":
    """Loads a tokenizer alone, ready to encode and decode.

        tokenizer = varjax.load_tokenizer("runs/digits_tokenizer")
        images_BHWC = tokenizer.decode(tokenizer.encode(images_BHWC))

    Args:
        location: run of a tokenizer, run that uses one, converted directory, or name of a published
            model: "vae_ch160v4096z32", "var_d16".
        ema: True reads the EMA weights of a tokenizer's run, False the others; None chooses as
            `load` does.

    Raises:
        InputError: says what `location` lacks.
    """
    use_compilation_cache()
    return LoadedTokenizer(*read_tokenizer(location, ema))


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
        # The library's own names end in shapes: {"tokens": "tokens_BL"}.
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
        return {name: latents[own_name] for name, own_name in self._names.items()}

    def decode(self, latents: Latents | np.ndarray | jax.Array) -> jax.Array:
        """Decodes latents into images (B, H, W, channels), float32 in [0, 1].

        Args:
            latents: result of `encode`, or its first array alone: tokens, or means.

        Raises:
            InputError: arrays of other names or shapes.
        """
        spec = self.config.latent_spec
        needed = {name: spec[own_name].shape for name, own_name in self._names.items()}
        first = next(iter(needed))
        arrays = latents if isinstance(latents, Mapping) else {first: latents}
        shapes = {name: np.shape(x)[1:] for name, x in arrays.items()}
        fits = first in shapes and shapes.items() <= needed.items()
        if not fits or len({len(x) for x in arrays.values()}) > 1:
            raise InputError(f"latents have shapes (B, …) of {shapes}; needed are {needed}")
        named = {self._names[name]: jnp.asarray(x) for name, x in arrays.items()}
        return self._decode(self.params, named)
