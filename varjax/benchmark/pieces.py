"""Programs of sampling, training, encoding and decoding, whole or in pieces, to compile only.

Their arguments are abstract arrays. Weights have the dtypes that pipelines give them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from varjax import trees
from varjax.models import benchmark_of
from varjax.nn.compute import ComputeConfig
from varjax.sampling.programs import Program, SamplingPrograms
from varjax.sampling.sampler import image_keys
from varjax.training.task import Plan
from varjax.training.train_step import accumulated_gradients, check_microbatches
from varjax.trees import PyTree


def sampling(
    programs: SamplingPrograms, batch_size: int, compute: ComputeConfig, pieces: bool
) -> list[Program]:
    """Returns the programs that draw a batch of images: one, or pieces that run one by one.

    Args:
        programs: programs of a released size; of DiSA's denoising steps, only the pieces count all.
        batch_size: number of images.
        compute: dtype of the weights and execution.
        pieces: whether to return the pieces instead of the whole: the decoder and, for each scale
            of VAR or group of MAR's steps, the transformer and the choice of tokens.
    """
    label_B, key_B = jax.eval_shape(
        lambda: (jnp.zeros(batch_size, jnp.int32), image_keys(0, jnp.arange(batch_size)))
    )
    options = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, programs.options))
    arguments = _params(programs, compute), options, label_B, key_B
    if not pieces:
        return [Program("whole", programs.whole, arguments)]
    return [*programs.pieces(*arguments, compute), *decoding(programs, batch_size, compute)]


def decoding(programs: SamplingPrograms, batch_size: int, compute: ComputeConfig) -> list[Program]:
    """Returns the program that decodes a batch of latents into images."""
    latents = jax.ShapeDtypeStruct((batch_size, *programs.latent_shape), jnp.float32)
    return [Program("decoder", programs.decode, (_params(programs, compute), latents))]


def encoding(preset: str, batch_size: int, compute: ComputeConfig) -> list[Program]:
    """Returns the program that encodes a batch of images into latents."""
    task = benchmark_of(preset).training_task(preset, compute)
    frozen = jax.eval_shape(task.tokenizer.init, jax.random.key(0))
    return [Program("encoder", task.tokenizer.encode, (frozen, _images(task, batch_size)))]


def training(
    preset: str,
    batch_size: int,
    compute: ComputeConfig,
    cached: bool,
    pieces: bool,
    accumulate: int = 1,
) -> list[Program]:
    """Returns the programs of a training step: one, or encoder, gradient and update.

    Args:
        preset: name of a released model's size.
        batch_size: number of images.
        compute: dtype and execution.
        cached: whether latents come from a cache, so that no encoder runs.
        pieces: whether to return the pieces instead of the whole step.
        accumulate: number of microbatches in a step.

    Raises InputError if `accumulate` does not divide the batch.
    """
    check_microbatches(batch_size, accumulate)
    plan, task = Plan(1000, batch_size), benchmark_of(preset).training_task(preset, compute)
    task = dataclasses.replace(task, accumulate=accumulate)
    key = jax.eval_shape(lambda: jax.random.key(0))
    frozen, state = (jax.eval_shape(f, key) for f in (task.tokenizer.init, task.init))
    image_BHWC = _images(task, batch_size)
    encoder = Program("encoder", task.tokenizer.encode, (frozen, image_BHWC))
    label_B = {"label_B": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
    latents = jax.eval_shape(task.tokenizer.encode, frozen, image_BHWC) | label_B

    def task_with(compute):
        return dataclasses.replace(task, compute=compute)

    if not pieces:
        batch = latents if cached else {"image_BHWC": image_BHWC} | label_B
        return [
            Program(
                "step",
                lambda *args: task_with(args[-1]).train_step(*args[:-1], plan=plan),
                (state, frozen, batch, key),
                donated=(0,),
            )
        ]

    def gradient(params, frozen, batch, compute):
        return training_gradient(preset, task_with(compute), params, frozen, batch)

    update = Program(
        "update",
        lambda state, grads, _: task.update(state, grads, plan),
        (state, state.params),
        donated=(0, 1),
    )
    parts = [Program("gradient", gradient, (state.params, frozen, latents)), update]
    return parts if cached else [encoder, *parts]


def training_gradient(
    preset: str, task: Any, params: PyTree, frozen: PyTree, batch: PyTree
) -> PyTree:
    """Computes the gradient of a training loss, in microbatches as a training step does.

    Args:
        preset: name of a released model's size.
        task: task of this preset, with its number of microbatches.
        params: parameters of the transformer.
        frozen: parameters of the tokenizer.
        batch: latents and labels.
    """
    loss = benchmark_of(preset).training_loss

    def loss_without_metrics(params, batch):
        return loss(task, params, frozen, batch), {}

    return accumulated_gradients(loss_without_metrics, params, batch, task.accumulate)[0]


def _params(programs: SamplingPrograms, compute: ComputeConfig) -> PyTree:
    return jax.eval_shape(
        lambda key: trees.cast(programs.cast, programs.init(key), compute.jax_dtype),
        jax.random.key(0),
    )


def _images(task: Any, batch_size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch_size, *task.tokenizer.image_shape), jnp.uint8)
