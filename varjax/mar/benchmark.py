"""The programs and tasks of MAR that benchmarks measure; see `varjax.sampling.programs`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from varjax.errors import InputError
from varjax.mar import pipeline
from varjax.mar.latents import decode_tokens
from varjax.mar.masking import take_at
from varjax.mar.memory import mar_sampling_bytes
from varjax.mar.model import MAR, MARConfig, bind_mar
from varjax.mar.sample import (
    MAROptions,
    SamplingSetup,
    check_sampling,
    make_setup,
    repeat_streams,
    sample_mar_tokens,
)
from varjax.mar.task import MARTask
from varjax.nn.compute import FUSED_ATTENTION, ComputeConfig
from varjax.sampling.programs import Program, SamplingPrograms
from varjax.tokenizers.kl.model import KLConfig
from varjax.training.task import Batch
from varjax.training.train_step import example_keys
from varjax.trees import PyTree

BATCH_SIZES = {"mar_b": 2048, "mar_l": 2048, "mar_h": 2048}  # of the paper's runs


def sampling_programs(
    preset: str,
    steps: int,
    guided: bool = True,
    refiner: str = "",
    draft_scales: int = 0,
    diffusion_steps: str = "100",
) -> SamplingPrograms:
    """Returns the programs of `MARPipeline`.

    Raises InputError for a refiner, which only VAR has.
    """
    if refiner:
        raise InputError(f"refiner={refiner}: {preset} has no scales, so nothing can be refined")
    mar, tokenizer = MARConfig.preset(preset), KLConfig()
    options = MAROptions(steps=steps, diffusion_steps=diffusion_steps)
    options = options if guided else dataclasses.replace(options, guidance=1.0)
    setup = make_setup(mar, check_sampling(mar, options))

    def sample(params, setup, label_B, key_B, compute):
        return sample_mar_tokens(mar, params["mar"], label_B, key_B, setup, None, compute)

    def decode(params, z_BhwZ, compute):
        return decode_tokens(tokenizer, mar, params["tokenizer"], mar.patchify(z_BhwZ), compute)

    def whole(params, setup, label_B, key_B, compute):
        token_BLZ = sample(params, setup, label_B, key_B, compute)
        return decode_tokens(tokenizer, mar, params["tokenizer"], token_BLZ, compute)

    return SamplingPrograms(
        classes=mar.classes,
        init=lambda key: {"tokenizer": tokenizer.init(key), "mar": mar.init(key)},
        cast=pipeline.CAST_KERNELS,
        options=setup,
        latent_shape=tokenizer.latent_shape,
        sample=sample,
        decode=decode,
        whole=whole,
        bytes_needed=lambda B, compute: mar_sampling_bytes(tokenizer, mar, B, compute, setup),
        pieces=functools.partial(_sampling_pieces, mar),
        cached=False,
        setting={"steps": steps, "diffusion_steps": diffusion_steps},
    )


def _sampling_pieces(
    mar: MARConfig,
    params: PyTree,
    setup: SamplingSetup,
    label_B: Any,
    key_B: Any,
    compute: ComputeConfig,
) -> list[Program]:
    """Returns programs for each group of steps: the transformer, and a denoising step.

    The second also draws the noise to start from and embeds the condition, which sampling does once
    for all denoising steps.

    Args:
        mar: config of the transformer.
        params: shapes of the parameters, in the dtypes that pipelines give them.
        setup: setup of the sampling, with shapes of the options.
        label_B: shape of the labels.
        key_B: shape of the random keys.
        compute: dtype and execution; they set the dtype of what the transformer returns.
    """
    B, programs = len(label_B), []
    first, stop = setup.guided
    denoising_counts = [len(schedule.timestep_J) for schedule in setup.noise_schedules]

    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def predict(params, token_BnZ, position_Bn, known_Bn, position_Bm, label_R, compute):
        apply, streams = bind_mar(mar, params["mar"], compute), len(label_R) // B
        *known, position_Rm = repeat_streams(streams, token_BnZ, position_Bn, known_Bn, position_Bm)
        class_RC = apply(label_R, method=MAR.class_vectors)
        return take_at(apply(*known, class_RC, method=MAR.hidden), position_Rm)

    def denoise(params, setup, z_RmC, position_Bm, key_B, compute, step):
        settings = setup.draw_settings(step)
        settings = settings._replace(denoising=settings.denoising._replace(count=1))
        noise = functools.partial(mar.head.sampling_noise, key_B, position_Bm)
        z = jnp.split(z_RmC, len(z_RmC) // B)
        return mar.head.draw([mar.head.network(params["mar"], compute)], z, noise, settings)

    for group in setup.groups:
        streams = 2 if first <= group.steps.start < stop else 1
        position_Bm, label_R = integers(B, group.new), integers(B * streams)
        token_BnZ = jax.ShapeDtypeStruct(
            (B, group.known, *mar.head.token_shape), mar.head.token_dtype
        )
        known_Bn = jax.ShapeDtypeStruct((B, group.known), bool)
        known = token_BnZ, integers(B, group.known), known_Bn
        arguments = params, *known, position_Bm, label_R
        z_RmC = jax.eval_shape(functools.partial(predict, compute=compute), *arguments)
        name = f"{len(group.steps)} steps from {group.steps.start}"
        draw = functools.partial(denoise, step=group.steps.start)
        times = sum(denoising_counts[step] for step in group.steps)
        programs += [
            Program(f"transformer, {name}", predict, arguments, times=len(group.steps)),
            Program(
                f"denoising, {name}", draw, (params, setup, z_RmC, position_Bm, key_B), times=times
            ),
        ]
    return programs


def training_task(preset: str, compute: ComputeConfig) -> MARTask:
    """Returns the task that trains a model of a released size."""
    # Fused kernels do not support attention dropout, so the task refuses both together.
    dropout = 0.0 if compute.attention_impl in FUSED_ATTENTION else 0.1
    return MARTask(
        model=MARConfig.preset(preset),
        tokenizer=KLConfig(),
        tokenizer_weights="random",
        attention_dropout=dropout,
        compute=compute,
    )


def training_loss(task: Any, params: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
    """Computes the training loss, with all tokens masked."""
    count = len(batch["label_B"])
    known_B = jnp.zeros(count, jnp.int32)
    draws = {"key_B": example_keys(jax.random.key(0), count), "known_B": known_B}
    return task.loss(params, frozen, batch | draws)[0]
