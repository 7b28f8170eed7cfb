"""The programs and tasks of VAR that benchmarks measure; see `varjax.sampling.programs`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from varjax.errors import check_setting
from varjax.nn.compute import ComputeConfig
from varjax.sampling.guidance import apply_guidance, guidance_scales
from varjax.sampling.programs import Program, SamplingPrograms
from varjax.tokenizers.vq.model import VQConfig, decode_features, make_quantizer
from varjax.training.task import Batch
from varjax.trees import PyTree
from varjax.var import pipeline
from varjax.var.model import VAR, VARConfig
from varjax.var.network import Refiner, VARModels, var_sampling_bytes
from varjax.var.sample import (
    VAROptions,
    choose_tokens,
    guidance_ramp,
    sample_images,
    sample_tokens,
)
from varjax.var.task import VARTask

BATCH_SIZES = {"d16": 768, "d20": 768, "d24": 768, "d30": 1024, "d36": 768}  # of the paper's runs


def sampling_programs(
    preset: str,
    steps: int,
    guided: bool = True,
    refiner: str = "",
    draft_scales: int = 0,
    diffusion_steps: str = "",
) -> SamplingPrograms:
    """Returns the programs of `VARPipeline`, which has neither `steps` nor `diffusion_steps`.

    With the preset of a `refiner`, they are those of collaborative decoding.
    """
    var, small = VARConfig.preset(preset), None
    tokenizer = VQConfig(scales=var.scales)
    scales = len(var.pyramid) if guided else 0
    configs = {"tokenizer": tokenizer, "var": var}
    if refiner:
        small = Refiner(VARConfig.preset(refiner), draft_scales)
        check_setting(
            "refiner", refiner, small.config.scales == var.scales, "sizes of equal scales"
        )
        configs["refiner"] = small.config

    def models_in(compute):
        return VARModels(tokenizer, var, compute, refiner=small)

    def sample(params, options, label_B, key_B, compute):
        models = models_in(compute)
        return sample_tokens(models, params, label_B, key_B, options, guided=scales)[0]

    def decode(params, f_hat_BhwZ, compute):
        return decode_features(tokenizer, params["tokenizer"], f_hat_BhwZ, compute)

    def whole(params, options, label_B, key_B, compute):
        models = models_in(compute)
        return sample_images(models, params, label_B, key_B, options, guided=scales)

    return SamplingPrograms(
        classes=var.classes,
        init=lambda key: {name: config.init(key) for name, config in configs.items()},
        cast=pipeline.CAST_KERNELS,
        options=VAROptions(),
        latent_shape=(*tokenizer.pyramid.finest, tokenizer.code_channels),
        sample=sample,
        decode=decode,
        whole=whole,
        bytes_needed=lambda B, compute: var_sampling_bytes(models_in(compute), B, scales),
        pieces=functools.partial(_sampling_pieces, var, guided),
        cached=True,
        setting={"refiner": refiner, "draft_scales": draft_scales} if refiner else {},
    )


def _sampling_pieces(
    var: VARConfig,
    guided: bool,
    params: PyTree,
    options: Any,
    label_B: Any,
    key_B: Any,
    compute: ComputeConfig,
) -> list[Program]:
    """Returns programs for the condition and, at each scale, the transformer and the tokens.

    Args:
        var: config of the transformer.
        guided: whether to use classifier-free guidance.
        params: shapes of the parameters, in the dtypes that pipelines give them.
        options: shapes of the sampling options.
        label_B: shape of the labels.
        key_B: shape of the random keys.
        compute: dtype of the cache.
    """
    quantizer, B = make_quantizer(VQConfig(scales=var.scales)), len(label_B)
    rows = B * (2 if guided else 1)

    def bind_model(params, compute):
        return VAR(var, compute).bind({"params": params})

    def condition(params, label_B, compute):
        model = bind_model(params, compute)
        return model.condition(label_B), model.empty_cache(len(label_B))

    def predict(params, input_BlZ, cond, cache, compute, k):
        return bind_model(params, compute).predict(input_BlZ, cond, k, cache)

    def choose(params, logits_BlV, f_hat_BhwZ, key_B, options, compute, k):
        bound_quantizer = quantizer.bind({"params": params})
        if guided:
            scale_K = guidance_scales(options, guidance_ramp(len(var.pyramid)))
            logits_BlV = apply_guidance(logits_BlV, scale_K[k])
        _, code_BlZ = choose_tokens(bound_quantizer, logits_BlV, k, key_B, options)
        f_hat_BhwZ = bound_quantizer.add_scale(f_hat_BhwZ, code_BlZ, k)
        last = k + 1 == len(var.pyramid)
        return f_hat_BhwZ, None if last else bound_quantizer.next_input(f_hat_BhwZ, k)

    label_R = jax.ShapeDtypeStruct((rows,), jnp.int32)
    cond, cache = jax.eval_shape(
        functools.partial(condition, compute=compute), params["var"], label_R
    )
    f_hat_BhwZ = jax.eval_shape(lambda: quantizer.initial_f_hat(B))
    programs = [Program("condition", condition, (params["var"], label_R))]
    for k, (h, w) in enumerate(var.pyramid.shapes):
        input_BlZ = jax.ShapeDtypeStruct((rows, h * w, var.code_channels), jnp.float32)
        logits_BlV = jax.ShapeDtypeStruct((rows, h * w, var.vocab), jnp.float32)
        programs += [
            Program(
                f"transformer {h}x{w}",
                functools.partial(predict, k=k),
                (params["var"], input_BlZ if k else None, cond, cache),
                donated=(3,),
            ),
            Program(
                f"tokens {h}x{w}",
                functools.partial(choose, k=k),
                (params["tokenizer"]["quantizer"], logits_BlV, f_hat_BhwZ, key_B, options),
            ),
        ]
    return programs


def training_task(preset: str, compute: ComputeConfig) -> VARTask:
    """Returns the task that trains a model of a released size."""
    model = VARConfig.preset(preset)
    return VARTask(
        model=model,
        tokenizer=VQConfig(scales=model.scales),
        tokenizer_weights="random",
        drop_path=0.1 * model.depth / 24,
        compute=compute,
    )


def training_loss(task: Any, params: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
    """Computes the training loss, without label dropout or drop path."""
    return jnp.mean(task.token_losses(params, frozen, batch).objective_BL)
