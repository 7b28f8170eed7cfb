"""The losses of reconstructions that both tokenizers train with, and their gradients.

These are the losses of pixels, LPIPS and a GAN, as a tokenizer's task configures them. A function
of a microbatch adds the losses of the latents, which differ by kind of tokenizer.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from varjax.nn.compute import ComputeConfig
from varjax.tokenizers.contract import Tokenizer
from varjax.tokenizers.losses.gan import (
    DiscriminatorState,
    GANConfig,
    adaptive_weight,
    gan_gradients,
    last_layer_grads,
)
from varjax.tokenizers.losses.lpips import LPIPSConfig, lpips
from varjax.training.task import Batch, Plan
from varjax.training.train_step import Metrics, mean_over_microbatches
from varjax.trees import PyTree


class ImageLossConfig(Protocol):
    """Names the parts of a tokenizer's task that the losses of its images depend on."""

    @property
    def model(self) -> Tokenizer: ...
    @property
    def l1(self) -> float: ...
    @property
    def l2(self) -> float: ...
    @property
    def perceptual(self) -> LPIPSConfig | None: ...
    @property
    def gan(self) -> GANConfig | None: ...
    @property
    def max_adaptive_weight(self) -> float: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def compute(self) -> ComputeConfig: ...


@flax.struct.dataclass
class ImageGradients:
    """Holds gradients of the losses of reconstructions; all are means over images.

    Attributes:
        image_grad_BHWC: gradient of the weighted sum of the losses with respect to the
            reconstructions.
        metrics: scalars by name; "loss" excludes the adversarial loss, because that measures two
            networks.
        discriminator_grads: gradients of the discriminator's loss with respect to its parameters;
            None without a discriminator.
        last_layer: gradients of the reconstruction loss and of the adversarial loss with respect to
            the decoder's last kernel; None without a discriminator.
    """

    image_grad_BHWC: jax.Array
    metrics: Metrics
    discriminator_grads: PyTree = None
    last_layer: tuple[jax.Array, jax.Array] | None = None


@flax.struct.dataclass
class LossGradients:
    """Holds gradients of all losses and what is logged; all are means over images.

    Attributes:
        grads: gradients of the tokenizer's losses with respect to its parameters.
        metrics: scalar metrics by name.
        statistics: further statistics of a batch that the tokenizer's task needs.
        discriminator_grads: gradients of the discriminator's loss with respect to its parameters;
            None without a discriminator.
        last_layer: gradients with respect to the decoder's last kernel, described in
            `ImageGradients`.
    """

    grads: PyTree
    metrics: Metrics
    statistics: PyTree
    discriminator_grads: PyTree = None
    last_layer: tuple[jax.Array, jax.Array] | None = None


# (images in [-1, 1], their reconstructions, input of the decoder's last convolution, a random key
# for each image) -> their gradients: `image_gradients` with its other arguments bound.
ImageGradientsFn = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], ImageGradients]


def image_losses(
    config: ImageLossConfig,
    frozen: PyTree,
    x_BHWC: jax.Array,
    y_BHWC: jax.Array,
    dtype: Any = jnp.float32,
) -> dict[str, jax.Array]:
    """Computes how far reconstructions are from their images.

    Args:
        config: task, which holds the weights of the losses.
        frozen: parameters of frozen loss networks, from `Task.frozen`.
        x_BHWC: images in [-1, 1].
        y_BHWC: their reconstructions, not clipped.
        dtype: dtype of LPIPS.

    Returns:
        (B,) float32 each: "l1", "l2", "perceptual" if the task has a perceptual loss, their
        weighted sum "loss", and "psnr" in dB.
    """
    losses = {
        "l1": jnp.mean(jnp.abs(y_BHWC - x_BHWC), axis=(1, 2, 3)),
        "l2": jnp.mean(jnp.square(y_BHWC - x_BHWC), axis=(1, 2, 3)),
    }
    weights = {"l1": config.l1, "l2": config.l2}
    if config.perceptual:
        losses["perceptual"] = lpips(frozen["lpips"], x_BHWC, y_BHWC, dtype)
        weights["perceptual"] = config.perceptual.weight
    weighted = [weight * losses[name] for name, weight in weights.items()]
    losses["loss"] = jnp.sum(jnp.stack(weighted), axis=0)
    # Published figures average each image's own PSNR. Values span 2, from -1 to 1.
    losses["psnr"] = 10 * jnp.log10(4 / jnp.maximum(losses["l2"], 1e-12))
    return losses


def valid_sums(losses: dict[str, jax.Array], valid_B: jax.Array) -> dict[str, jax.Array]:
    """Sums losses (B,) over the valid rows, and counts these as "images"."""
    sums = {name: jnp.sum(jnp.where(valid_B, x_B, 0)) for name, x_B in losses.items()}
    return sums | {"images": jnp.sum(valid_B.astype(jnp.float32))}


def reconstruct(
    model: nn.Module, params: PyTree, *inputs: jax.Array | None
) -> tuple[Any, jax.Array]:
    """Applies a tokenizer.

    Returns:
        (what its `__call__` returns, the input of its decoder's last convolution).
    """
    sown: PyTree
    outputs, sown = model.apply({"params": params}, *inputs, mutable=["intermediates"])
    (last_BHWC,) = sown["intermediates"]["decoder"]["last"]
    return outputs, last_BHWC


def loss_gradients(
    config: ImageLossConfig,
    discriminator: DiscriminatorState | None,
    frozen: PyTree,
    batch: Batch,
    step: jax.Array,
    plan: Plan,
    microbatch_gradients: Callable[[ImageGradientsFn, Batch], LossGradients],
) -> LossGradients:
    """Computes the gradients of all losses on a batch; they do not depend on `config.accumulate`.

    Args:
        config: task, which holds the weights of the losses.
        discriminator: state of the discriminator; None without one.
        frozen: parameters of frozen loss networks, from `Task.frozen`.
        batch: {"image_BHWC": uint8 images, "key_B": keys from `example_keys`}.
        step: number of the update, from 0.
        plan: length of the run.
        microbatch_gradients: function that runs a microbatch forward and backward through the
            tokenizer.
    """
    ramp_factor = jnp.float32(0)
    if config.gan is not None and discriminator is not None:
        ramp_factor = config.gan.ramp_factor(discriminator.train_state.step, step, plan)

    def gradients(ratio, microbatch):
        image_gradients_fn = functools.partial(
            image_gradients, config, discriminator, frozen, ramp_factor, ratio
        )
        return microbatch_gradients(image_gradients_fn, microbatch)

    ratio = None
    if config.gan is not None and config.gan.adaptive and config.accumulate > 1:
        # The adaptive weight is a quotient of two means over the batch, not a mean over
        # microbatches. A first pass computes it.
        reconstruction, adversarial = mean_over_microbatches(
            lambda microbatch: gradients(1.0, microbatch).last_layer, batch, config.accumulate
        )
        ratio = adaptive_weight(reconstruction, adversarial, config.max_adaptive_weight)
    return mean_over_microbatches(functools.partial(gradients, ratio), batch, config.accumulate)


def image_gradients(
    config: ImageLossConfig,
    discriminator: DiscriminatorState | None,
    frozen: PyTree,
    ramp_factor: jax.Array,
    ratio: jax.Array | float | None,
    x_BHWC: jax.Array,
    y_BHWC: jax.Array,
    last_BHWC: jax.Array,
    key_B: jax.Array,
) -> ImageGradients:
    """Computes the gradients of all losses of reconstructions.

    Each loss is differentiated by the image separately, so that the adaptive weight reuses them.

    Args:
        config: task, which holds the weights of the losses.
        discriminator: state of the discriminator; None without one.
        frozen: parameters of frozen loss networks, from `Task.frozen`.
        ramp_factor: factor on the adversarial loss's weight at this step, 0 … 1.
        ratio: adaptive weight; None to compute it from these images.
        x_BHWC: images in [-1, 1].
        y_BHWC: their reconstructions, not clipped.
        last_BHWC: the input of the decoder's last convolution.
        key_B: random keys, one for each image.
    """
    dtype = config.compute.jax_dtype

    def image_loss(y_BHWC):
        losses = image_losses(config, frozen, x_BHWC, y_BHWC, dtype)
        means = {name: jnp.mean(loss_B) for name, loss_B in losses.items()}
        return means["loss"], means

    image_grad_BHWC, metrics = jax.grad(image_loss, has_aux=True)(y_BHWC)
    if discriminator is None:
        return ImageGradients(image_grad_BHWC, metrics)
    assert config.gan is not None
    adversarial = gan_gradients(config.gan, discriminator, x_BHWC, y_BHWC, key_B, dtype)
    last_layer = (
        last_layer_grads(last_BHWC, image_grad_BHWC),
        last_layer_grads(last_BHWC, adversarial.image_grad_BHWC),
    )
    if ratio is None:
        largest = config.max_adaptive_weight
        ratio = adaptive_weight(*last_layer, largest) if config.gan.adaptive else 1.0
    weight = ramp_factor * config.gan.weight * ratio
    image_grad_BHWC = image_grad_BHWC + weight * adversarial.image_grad_BHWC
    metrics |= adversarial.metrics | {"adversarial_weight": weight}
    return ImageGradients(image_grad_BHWC, metrics, adversarial.discriminator_grads, last_layer)
