"""From a batch to gradients: through a VQ tokenizer, its losses and its discriminator."""

import functools
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from varjax.core.trees import PyTree
from varjax.nn.autoencoder import to_model_range
from varjax.tokenizers.losses.gan import (
    DiscriminatorState,
    GANConfig,
    adaptive_weight,
    gan_gradients,
    last_layer_grads,
)
from varjax.tokenizers.vq.codebook import (
    CodebookConfig,
    entropy_loss,
    replace_codebook,
    sample_scale_dropout,
    scale_residuals,
)
from varjax.tokenizers.vq.model import VQConfig, VQTokenizer
from varjax.tokenizers.vq.quantizer import code_counts, quantizer_loss
from varjax.training.task import Batch
from varjax.training.train_step import Metrics, mean_over_microbatches


class LossConfig(Protocol):
    """Names the parts of `VQTask` that gradients depend on."""

    @property
    def model(self) -> VQConfig: ...
    @property
    def codebook(self) -> CodebookConfig: ...
    @property
    def gan(self) -> GANConfig | None: ...
    @property
    def beta(self) -> float: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def jax_dtype(self) -> jnp.dtype: ...
    def reconstruction_losses(
        self, frozen: PyTree, x_BHWC: jax.Array, y_BHWC: jax.Array, dtype: Any
    ) -> Metrics: ...


@flax.struct.dataclass
class LossGradients:
    """Holds gradients and what is logged; all are means over images.

    Attributes:
        grads: of the tokenizer's losses by its parameters.
        metrics: scalars.
        frequency_KV: how often each scale uses each code in an image.
        discriminator_grads: of the discriminator's loss by its parameters; None without one.
        last_layer: gradients of the reconstruction loss and of the adversarial loss by the
            decoder's last kernel; None without a discriminator.
    """

    grads: PyTree
    metrics: Metrics
    frequency_KV: jax.Array
    discriminator_grads: PyTree = None
    last_layer: tuple[jax.Array, jax.Array] | None = None


def loss_gradients(
    config: LossConfig,
    params: PyTree,
    discriminator: DiscriminatorState | None,
    frozen: PyTree,
    batch: Batch,
    ramp_factor: jax.Array,
) -> LossGradients:
    """Computes the gradients of all losses on a batch; they do not depend on `config.accumulate`.

    Args:
        config: the task.
        params: the tokenizer's.
        discriminator: its state; None without one.
        frozen: `VQTask.frozen`.
        batch: {"image_BHWC": uint8, "key_B": random keys, one for each image}.
        ramp_factor: the part of the adversarial loss's weight that counts, 0 … 1.
    """
    microbatch_gradients = functools.partial(
        _microbatch_gradients, config, params, discriminator, frozen, ramp_factor
    )
    ratio = None
    if config.gan is not None and config.gan.adaptive and config.accumulate > 1:
        # The adaptive weight is no mean over microbatches but a quotient of two means. A first
        # pass finds it.
        reconstruction, adversarial = mean_over_microbatches(
            lambda microbatch: microbatch_gradients(1.0, microbatch).last_layer,
            batch,
            config.accumulate,
        )
        ratio = adaptive_weight(reconstruction, adversarial)
    return mean_over_microbatches(
        functools.partial(microbatch_gradients, ratio), batch, config.accumulate
    )


def _microbatch_gradients(config, params, discriminator, frozen, ramp_factor, ratio, batch):
    """ratio: the adaptive weight; None to compute it from this microbatch."""
    x_BHWC, key_B = to_model_range(batch["image_BHWC"]), batch["key_B"]
    model = VQTokenizer(config.model, config.jax_dtype, config.jax_dtype)
    pyramid = config.model.pyramid
    kept_B = sample_scale_dropout(config.codebook, pyramid, key_B)

    def forward(params):
        sown: PyTree
        (y_BHWC, f_BhwZ, quantized), sown = model.apply(
            {"params": params}, x_BHWC, kept_B, mutable=["intermediates"]
        )
        (last_BHWC,) = sown["intermediates"]["decoder"]["last"]
        return (y_BHWC, f_BhwZ, quantized.f_hats), (quantized.tokens_BL, last_BHWC)

    def image_loss(y_BHWC):
        losses = config.reconstruction_losses(frozen, x_BHWC, y_BHWC, config.jax_dtype)
        means = {name: jnp.mean(loss_B) for name, loss_B in losses.items()}
        return means["loss"], means

    def codebook_loss(f_BhwZ, f_hats, codebook_VZ):
        losses = {"quantizer": jnp.mean(quantizer_loss(f_BhwZ, f_hats, config.beta, kept_B))}
        total = losses["quantizer"]
        if config.codebook.entropy:
            inputs = scale_residuals(pyramid, f_BhwZ, f_hats)
            losses["entropy"] = entropy_loss(codebook_VZ, inputs, config.model.cosine_codes)
            total = total + config.codebook.entropy * losses["entropy"]
        return total, losses

    # Gradients by the image are taken loss by loss, so that the adaptive weight computes nothing
    # twice.
    (y_BHWC, f_BhwZ, f_hats), vjp, (tokens_BL, last_BHWC) = jax.vjp(forward, params, has_aux=True)
    image_grad_BHWC, metrics = jax.grad(image_loss, has_aux=True)(y_BHWC)
    (*feature_grads, codebook_grad_VZ), codebook_losses = jax.grad(
        codebook_loss, (0, 1, 2), has_aux=True
    )(f_BhwZ, f_hats, params["quantizer"]["codebook"])
    metrics |= codebook_losses
    metrics["loss"] = metrics["loss"] + metrics["quantizer"]
    of_discriminator = {}
    if discriminator is not None:
        gan = config.gan
        adversarial = gan_gradients(gan, discriminator, x_BHWC, y_BHWC, key_B, config.jax_dtype)
        last_layer = (
            last_layer_grads(last_BHWC, image_grad_BHWC),
            last_layer_grads(last_BHWC, adversarial.image_grad_BHWC),
        )
        if ratio is None:
            ratio = adaptive_weight(*last_layer) if gan.adaptive else 1.0
        weight = ramp_factor * gan.weight * ratio
        image_grad_BHWC = image_grad_BHWC + weight * adversarial.image_grad_BHWC
        metrics |= adversarial.metrics | {"adversarial_weight": weight}
        of_discriminator = {
            "discriminator_grads": adversarial.discriminator_grads,
            "last_layer": last_layer,
        }
    (grads,) = vjp((image_grad_BHWC, *feature_grads))
    if config.codebook.entropy:
        grads = replace_codebook(grads, grads["quantizer"]["codebook"] + codebook_grad_VZ)
    B = len(x_BHWC)
    count_KV = code_counts(pyramid, config.model.vocab, tokens_BL, jnp.ones(B))
    return LossGradients(grads, metrics, count_KV / B, **of_discriminator)
