"""The one table of model families, and loading a model of any of them.

docs/add_a_family.md says what a new family brings along and who calls it.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from varjax.checkpoints.model_files import find_model, read_generator, read_model_config
from varjax.errors import InputError
from varjax.mar.model import MARConfig
from varjax.mar.options import MAROptions
from varjax.mar.pipeline import MARPipeline
from varjax.nn.compute import ComputeConfig
from varjax.sampling.sampler import Sampler
from varjax.tokenizers.load import read_tokenizer
from varjax.trees import PyTree
from varjax.var.model import VARConfig
from varjax.var.pipeline import VARPipeline
from varjax.var.sample import VAROptions

Dtype = Literal["auto", "float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Family:
    """Describes one kind of generative model.

    Attributes:
        name: name of the model's entry in a converted directory's config.json, and of its file.
        task: class name of the training task, as in a run's config.json. A name instead of the
            class, so that sampling does not import training.
        options: class of the sampling options, a frozen dataclass; its fields become command-line
            flags.
        config: class of the model's config, a frozen dataclass with a method `init(key) -> params`.
        pipeline: (tokenizer config, config, {"tokenizer": params, name: params}, options, compute,
            devices) -> Sampler.
        needs_tokenizer: whether the pipeline requires a tokenizer; if not, the tokenizer's config
            may be None.
    """

    name: str
    task: str
    config: type
    options: type
    pipeline: Callable[..., Sampler]
    needs_tokenizer: bool = True


FAMILIES = (
    Family("var", "VARTask", VARConfig, VAROptions, VARPipeline),
    Family("mar", "MARTask", MARConfig, MAROptions, MARPipeline, needs_tokenizer=False),
)


def option_classes() -> tuple[type, ...]:
    """Returns the sampling options of every family, from which command-line flags are made."""
    return tuple(family.options for family in FAMILIES)


def family_of(location: str | pathlib.Path) -> Family:
    """Finds the family of the model in a run or a converted directory.

    Raises InputError where there is none, such as in a run of a tokenizer.
    """
    location = find_model(location)
    config = read_model_config(location)
    task = config.get("task", {}).get("_type")
    for family in FAMILIES:
        if family.task == task or (task is None and family.name in config):
            return family
    if task is not None:
        allowed = ", ".join(family.task for family in FAMILIES)
        raise InputError(
            f"{location} is a run of {task}, not of a transformer ({allowed}), such as runs/digits"
        )
    files_there = sorted(path.stem for path in location.glob("*.safetensors"))
    found = ", ".join(files_there) or "no weights"
    names = " or ".join(f"--{family.name}" for family in FAMILIES)
    raise InputError(f"{location} holds only {found}; convert it again with {names} as well")


def read_model(
    location: str | pathlib.Path, ema: bool | None = None
) -> tuple[Family, Any, PyTree, Any]:
    """Reads (family, config, params, sampling options) of the model at `location`.

    ema: of a run, the averaged weights or not; None for them if there are any. Raises InputError
    that says what `location` lacks.
    """
    f = family_of(location)
    return f, *read_generator(location, f.name, f.task, f.config, f.options, ema)


def load(
    location: str | pathlib.Path,
    dtype: Dtype = "auto",
    devices: Sequence[Any] | None = None,
    compute: ComputeConfig | None = None,
) -> Sampler:
    """Loads a model with its tokenizer, ready to sample.

        model = varjax.load("runs/digits")
        images_BHWC = model.sample([3, 1, 4], seed=0)

    Args:
        location: training run, directory written by `varjax convert`, or name of a
            published model, "var_d16", which is downloaded and converted at its first use. A run's
            best weights are loaded if it kept them, and the averaged ones if it averaged them.
        dtype: number format of the transformer's matrix products and of the decoder; "auto" is
            float32 on a CPU, else bfloat16.
        devices: devices that share each batch; None for all of this process.
        compute: replaces `dtype`, to set more than the number format.

    Returns:
        The family's pipeline: `varjax.VARPipeline` or `varjax.MARPipeline`.

    Raises:
        InputError: `location` lacks something, or an argument is not allowed.
    """
    if dtype not in get_args(Dtype):
        raise InputError(f"dtype={dtype!r}: allowed are {', '.join(get_args(Dtype))}")
    if compute is not None and dtype != "auto":
        raise InputError(f"dtype={dtype!r} and compute={compute}: give the dtype within compute")
    family, config, params, options = read_model(location)
    tokenizer, tokenizer_params = None, {}
    there = read_model_config(find_model(location)).keys()
    if family.needs_tokenizer or there & {"task", "tokenizer"}:
        tokenizer, tokenizer_params = read_tokenizer(location)
    weights = {"tokenizer": tokenizer_params, family.name: params}
    return family.pipeline(
        tokenizer, config, weights, options, compute or ComputeConfig(dtype), devices
    )
