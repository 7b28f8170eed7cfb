"""From a microbatch to gradients: through a VQ tokenizer and its losses."""

from typing import Protocol

import jax
import jax.numpy as jnp

from varjax.nn.autoencoder import to_model_range
from varjax.nn.compute import ComputeConfig
from varjax.tokenizers.losses.image_losses import ImageGradientsFn, LossGradients, reconstruct
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
from varjax.trees import PyTree


class QuantizerLossConfig(Protocol):
    """Names the parts of `VQTask` that gradients depend on, besides those of its image losses."""

    @property
    def model(self) -> VQConfig: ...
    @property
    def codebook(self) -> CodebookConfig: ...
    @property
    def beta(self) -> float: ...
    @property
    def compute(self) -> ComputeConfig: ...


def vq_gradients(
    config: QuantizerLossConfig, params: PyTree, image_gradients: ImageGradientsFn, batch: Batch
) -> LossGradients:
    """Computes the gradients of all losses on a microbatch.

    Args:
        config: task to train.
        params: parameters of the tokenizer.
        image_gradients: function that computes the losses of reconstructions and their gradients.
        batch: {"image_BHWC": uint8, "key_B": random keys, one for each image}.

    Returns:
        Gradients, with {"frequency_KV": how often each scale uses each code in an image}.
    """
    x_BHWC, key_B = to_model_range(batch["image_BHWC"]), batch["key_B"]
    model = VQTokenizer(config.model, config.compute, config.compute.jax_dtype)
    pyramid = config.model.pyramid
    kept_B = sample_scale_dropout(config.codebook, pyramid, key_B)

    def forward(params):
        (y_BHWC, f_BhwZ, quantized), last_BHWC = reconstruct(model, params, x_BHWC, kept_B)
        return (y_BHWC, f_BhwZ, quantized.f_hats), (quantized.tokens_BL, last_BHWC)

    def codebook_loss(f_BhwZ, f_hats, codebook_VZ):
        losses = {"quantizer": jnp.mean(quantizer_loss(f_BhwZ, f_hats, config.beta, kept_B))}
        total = losses["quantizer"]
        if config.codebook.entropy:
            inputs = scale_residuals(pyramid, f_BhwZ, f_hats)
            losses["entropy"] = entropy_loss(codebook_VZ, inputs, config.model.cosine_codes)
            total = total + config.codebook.entropy * losses["entropy"]
        return total, losses

    (y_BHWC, f_BhwZ, f_hats), vjp, (tokens_BL, last_BHWC) = jax.vjp(forward, params, has_aux=True)
    of_images = image_gradients(x_BHWC, y_BHWC, last_BHWC, key_B)
    (*feature_grads, codebook_grad_VZ), codebook_losses = jax.grad(
        codebook_loss, (0, 1, 2), has_aux=True
    )(f_BhwZ, f_hats, params["quantizer"]["codebook"])
    metrics = of_images.metrics | codebook_losses
    metrics["loss"] = metrics["loss"] + metrics["quantizer"]
    (grads,) = vjp((of_images.image_grad_BHWC, *feature_grads))
    if config.codebook.entropy:
        grads = replace_codebook(grads, grads["quantizer"]["codebook"] + codebook_grad_VZ)
    B = len(x_BHWC)
    count_KV = code_counts(pyramid, config.model.vocab, tokens_BL, jnp.ones(B))
    statistics = {"frequency_KV": count_KV / B}
    return LossGradients(
        grads, metrics, statistics, of_images.discriminator_grads, of_images.last_layer
    )
