"""Programs that benchmarks time or compile: those of a family's pipeline, whole or in pieces.

Each family has them in a file NAME/benchmark.py, with these names:

    BATCH_SIZES: the published runs' numbers of images in a batch, by preset
    sampling_programs(preset, steps, guided, refiner, draft_scales, diffusion_steps)
        -> SamplingPrograms
    training_task(preset, compute) -> Task
    training_loss(task, params, frozen, batch of latents and labels) -> the loss to train on
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from varjax.nn.compute import ComputeConfig
from varjax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class Program:
    """Holds a function and the shapes of its arguments.

    Attributes:
        name: name in the report.
        function: (*arguments, compute) -> arrays.
        arguments: shapes of the arguments' arrays.
        donated: indices of the arguments whose memory the result may reuse.
        times: number of times that it runs for a batch.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[PyTree, ...]
    donated: tuple[int, ...] = ()
    times: int = 1


@dataclasses.dataclass(frozen=True)
class SamplingPrograms:
    """Holds the programs of a pipeline that are measured, without their weights.

    Attributes:
        classes: number of the model's classes.
        init: key -> params of tokenizer and transformer.
        cast: pattern of the parameters that a pipeline holds in `compute.dtype`.
        options: second argument of the programs.
        latent_shape: shape of one image's latents, as the decoder takes them.
        sample: (params, options, label_B, key_B, compute) -> latents or tokens.
        decode: (params, latents, compute) -> images.
        whole: (params, options, label_B, key_B, compute) -> images.
        bytes_needed: (batch size, compute) -> bytes that a device needs in addition to the weights.
        pieces: (params, options, label_B, key_B, compute) -> what `sample` does, in pieces; the
            arguments are shapes.
        cached: whether the transformer keeps a cache of keys and values.
        setting: settings of the sampler, for the report.
    """

    classes: int
    init: Callable[[jax.Array], PyTree]
    cast: str
    options: Any
    latent_shape: tuple[int, ...]
    sample: Callable[..., jax.Array]
    decode: Callable[..., jax.Array]
    whole: Callable[..., jax.Array]
    bytes_needed: Callable[[int, ComputeConfig], int]
    pieces: Callable[..., list[Program]]
    cached: bool
    setting: Mapping[str, Any]
