"""Programs of sampling, training, encoding and decoding, whole or in pieces, without their arrays.

For what compiles and does not run: arguments are shapes, and weights as pipelines hold them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from varjax import trees
from varjax.benchmark.sample import SamplingParts, model_parts
from varjax.benchmark.train import make_task, training_loss
from varjax.nn.compute import ComputeConfig
from varjax.sampling.guidance import guide
from varjax.sampling.sampler import image_keys
from varjax.tokenizers.vq.model import VQConfig, make_quantizer
from varjax.training.task import Plan
from varjax.trees import PyTree
from varjax.var.model import VAR, VARConfig
from varjax.var.sample import choose_tokens


@dataclasses.dataclass(frozen=True)
class Program:
    """Holds a function and the shapes of its arguments.

    Attributes:
        name: name in the report.
        function: (*arguments, compute) -> arrays.
        arguments: shapes of the arguments' arrays.
        donated: indices of the arguments whose memory the result may reuse.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[PyTree, ...]
    donated: tuple[int, ...] = ()


def sampling(
    preset: str, batch_size: int, compute: ComputeConfig, steps: int, guided: bool, pieces: bool
) -> list[Program]:
    """Returns what draws a batch of images: one program, or pieces that do the same one by one.

    Args:
        preset: name of a released model's size.
        batch_size: number of images.
        compute: number format of the weights and execution.
        steps: number of steps in which MAR draws its tokens.
        guided: whether to use classifier-free guidance.
        pieces: whether to return the pieces instead of the whole: the decoder and, for VAR, each
            scale's transformer and choice of tokens.
    """
    of, params = _parts_and_params(preset, compute, steps, guided)
    label_B, key_B = jax.eval_shape(
        lambda: (jnp.zeros(batch_size, jnp.int32), image_keys(0, jnp.arange(batch_size)))
    )
    options = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, of.options))
    arguments = params, options, label_B, key_B
    if not pieces:
        return [Program("whole", of.whole, arguments)]
    if preset.startswith("mar"):
        transformer = [Program("transformer", of.sample, arguments)]
    else:
        var = VARConfig.preset(preset)
        transformer = _scales(var, params, batch_size, key_B, options, guided)
    return [*transformer, *decoding(preset, batch_size, compute)]


def decoding(preset: str, batch_size: int, compute: ComputeConfig) -> list[Program]:
    """Returns what decodes a batch of latents into images."""
    of, params = _parts_and_params(preset, compute, 1, True)
    latents = jax.ShapeDtypeStruct((batch_size, *of.latent_shape), jnp.float32)
    return [Program("decoder", of.decode, (params, latents))]


def encoding(preset: str, batch_size: int, compute: ComputeConfig) -> list[Program]:
    """Returns what encodes a batch of images into latents."""
    task = make_task(preset, compute)
    frozen = jax.eval_shape(task.tokenizer.init, jax.random.key(0))
    return [Program("encoder", task.tokenizer.encode, (frozen, _images(task, batch_size)))]


def training(
    preset: str, batch_size: int, compute: ComputeConfig, cached: bool, pieces: bool
) -> list[Program]:
    """Returns what makes a training step: one program, or encoder, gradient and update.

    Args:
        preset: name of a released model's size.
        batch_size: number of images.
        compute: number format and execution.
        cached: whether latents come from a cache, so that no encoder runs.
        pieces: whether to return the pieces instead of the whole step.
    """
    task, plan = make_task(preset, compute), Plan(1000, batch_size)
    key = jax.eval_shape(lambda: jax.random.key(0))
    frozen, state = (jax.eval_shape(f, key) for f in (task.tokenizer.init, task.init))
    image_BHWC = _images(task, batch_size)
    encoder = Program("encoder", task.tokenizer.encode, (frozen, image_BHWC))
    label_B = {"label_B": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
    latents = jax.eval_shape(task.tokenizer.encode, frozen, image_BHWC) | label_B

    def at(compute):
        return dataclasses.replace(task, compute=compute)

    if not pieces:
        batch = latents if cached else {"image_BHWC": image_BHWC} | label_B
        return [
            Program(
                "step",
                lambda *args: at(args[-1]).train_step(*args[:-1], plan=plan),
                (state, frozen, batch, key),
                donated=(0,),
            )
        ]
    gradient = Program(
        "gradient",
        lambda *args: jax.grad(training_loss(at(args[-1])))(*args[:-1]),
        (state.params, frozen, latents),
    )
    update = Program(
        "update",
        lambda state, grads, _: task.update(state, grads, plan),
        (state, state.params),
        donated=(0, 1),
    )
    return [gradient, update] if cached else [encoder, gradient, update]


def _parts_and_params(preset, compute, steps, guided) -> tuple[SamplingParts, PyTree]:
    of = model_parts(preset, steps, guided)
    params = jax.eval_shape(of.init, jax.random.key(0))
    return of, jax.eval_shape(lambda p: trees.cast(of.cast, p, compute.jax_dtype), params)


def _images(task: Any, batch_size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch_size, *task.tokenizer.image_shape), jnp.uint8)


def _scales(
    var: VARConfig, params: PyTree, batch_size: int, key_B: Any, options: Any, guided: bool
) -> list[Program]:
    """Returns the condition, and of each scale the transformer and the choice of tokens."""
    tokenizer = VQConfig(scales=var.scales)
    rows = batch_size * (2 if guided else 1)
    quantizer = make_quantizer(tokenizer)

    def bound(params, compute):
        return VAR(var, compute).bind({"params": params})

    def condition(params, label_B, compute):
        model = bound(params, compute)
        return model.condition(label_B), model.empty_cache(len(label_B))

    def predict(params, input_BlZ, cond, cache, compute, k):
        return bound(params, compute).predict(input_BlZ, cond, k, cache)

    def choose(params, logits_BlV, f_hat_BhwZ, key_B, options, compute, k):
        bound_quantizer = quantizer.bind({"params": params})
        if guided:
            scale = 1 + (options.guidance - 1) * var.pyramid.progress(k)
            logits_BlV = guide(logits_BlV, scale)
        _, code_BlZ = choose_tokens(bound_quantizer, logits_BlV, k, key_B, options)
        f_hat_BhwZ = bound_quantizer.add_scale(f_hat_BhwZ, code_BlZ, k)
        last = k + 1 == len(var.pyramid)
        return f_hat_BhwZ, None if last else bound_quantizer.next_input(f_hat_BhwZ, k)

    label_B = jax.ShapeDtypeStruct((rows,), jnp.int32)
    cond, cache = jax.eval_shape(
        functools.partial(condition, compute=ComputeConfig("bfloat16")), params["var"], label_B
    )
    f_hat_BhwZ = jax.eval_shape(lambda: quantizer.initial_f_hat(batch_size))
    programs = [Program("condition", condition, (params["var"], label_B))]
    for k, (h, w) in enumerate(var.pyramid.shapes):
        input_BlZ = jax.ShapeDtypeStruct((rows, h * w, var.code_channels), jnp.float32)
        logits_BlV = jax.ShapeDtypeStruct((rows, h * w, var.vocab), jnp.float32)
        given = params["var"], input_BlZ if k else None, cond, cache
        programs.append(
            Program(f"transformer {h}x{w}", functools.partial(predict, k=k), given, donated=(3,))
        )
        given = params["tokenizer"]["quantizer"], logits_BlV, f_hat_BhwZ, key_B, options
        programs.append(Program(f"tokens {h}x{w}", functools.partial(choose, k=k), given))
    return programs
