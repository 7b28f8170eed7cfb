"""The programs and tasks of MAR that benchmarks measure; see `varjax.sampling.programs`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from varjax.errors import InputError
from varjax.mar import pipeline
from varjax.mar.latents import decode_tokens
from varjax.mar.memory import mar_sampling_bytes
from varjax.mar.model import MARConfig
from varjax.mar.sample import MAROptions, check_sampling, make_setup, sample_mar_tokens
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
        pieces=lambda *arguments: [Program("transformer", sample, arguments[:-1])],
        cached=False,
        setting={"steps": steps, "diffusion_steps": diffusion_steps},
    )


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
