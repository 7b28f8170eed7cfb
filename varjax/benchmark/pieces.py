"""Programs of sampling, training, encoding and decoding, whole or in pieces, without their arrays.

For what compiles and does not run: arguments are shapes, and weights as pipelines hold them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from varjax.benchmark.sample import mar_parts, var_parts
from varjax.benchmark.train import example_loss, make_task
from varjax.core import trees
from varjax.core.trees import PyTree
from varjax.nn.compute import Compute
from varjax.sampling.sampler import image_keys
from varjax.tokenizers.vq.model import decode_images, make_quantizer
from varjax.training.train_step import apply_gradients
from varjax.var.model import VAR
from varjax.var.sample import VAROptions, choose_tokens


@dataclasses.dataclass(frozen=True)
class Program:
    """Holds a function and the shapes of its arguments.

    Attributes:
        name: in a report.
        function: to compile.
        arguments: arrays' shapes.
        counted: the same function, whose products can be counted; None for `function` itself.
        donated: numbers of the arguments whose memory the result may take.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[PyTree, ...]
    counted: Callable[..., Any] | None = None
    donated: tuple[int, ...] = ()


def sampling(
    preset: str, batch_size: int, compute: Compute, steps: int, guided: bool, pieces: bool
) -> list[Program]:
    """Returns what draws a batch of images: one program, or pieces that do the same one by one.

    Args:
        preset: of a released model.
        batch_size: number of images.
        compute: how it is computed.
        steps: in which MAR draws its tokens.
        guided: whether there is guidance.
        pieces: of VAR each scale's transformer and its choice of tokens; the decoder.
    """
    of = (mar_parts if preset.startswith("mar") else var_parts)(preset, steps, guided)
    params = jax.eval_shape(of.init, jax.random.key(0))
    params = jax.eval_shape(lambda tree: trees.cast(of.cast, tree, compute.jax_dtype), params)
    label_B, key_B = jax.eval_shape(lambda: _labels_and_keys(batch_size, of.classes))
    options = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, of.options))
    plain = dataclasses.replace(compute, attention="xla")

    def whole(compute, *args):
        return of.whole(*args, compute)

    functions = (functools.partial(whole, c) for c in (compute, plain))
    function, counted = functions
    if not pieces:
        return [Program("whole", function, (params, options, label_B, key_B), counted)]
    latents = jax.ShapeDtypeStruct((batch_size, *of.latent_shape), jnp.float32)
    decoder = Program("decoder", lambda p, z: of.decode(p, z, compute), (params, latents))
    if preset.startswith("mar"):
        tokens, tokens_counted = (lambda *args, c=c: of.sample(*args, c) for c in (compute, plain))
        arguments = params, options, label_B, key_B
        return [Program("transformer", tokens, arguments, tokens_counted), decoder]
    scales = _var_scales(preset, batch_size, compute, plain, guided, params, key_B)
    return [*scales, decoder]
