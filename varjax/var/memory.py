"""Estimates how much memory sampling with VAR needs."""

from varjax.nn.autoencoder import decoding_bytes
from varjax.nn.compute import ComputeConfig
from varjax.tokenizers.vq.model import VQConfig
from varjax.var.model import VARConfig


def var_sampling_bytes(
    tokenizer: VQConfig, var: VARConfig, batch: int, compute: ComputeConfig, guided: bool
) -> int:
    """Estimates how much memory a device needs, in addition to the weights, to sample a batch.

    This is the maximum of the transformer at the last scale and the decoder.

    Args:
        tokenizer: config of the tokenizer.
        var: config of the transformer.
        batch: number of images on the device.
        compute: number format and execution of the transformer.
        guided: whether there is a second stream, for guidance.
    """
    rows, item = batch * (2 if guided else 1), compute.jax_dtype.itemsize
    L, l, C = var.pyramid.length, var.pyramid.lengths[-1], var.width  # noqa: E741
    cache = 2 * (var.depth + 1) * rows * L * C * item  # and one layer's copy
    # Residual stream and norm in float32; q, k, v, and twice the MLP's inner width.
    layer = rows * l * C * (2 * 4 + 11 * item)
    if compute.attention_implementation(cached=True) == "xla":  # its matrices and their softmax
        layer += rows * var.heads * l * L * 2 * 4
    # For guided logits, also the filters, the noise, and a mixture of codes.
    logits = (rows + 3 * batch) * l * var.vocab * 4
    return max(
        cache + layer + logits, decoding_bytes(batch, tokenizer.image_shape, tokenizer.width)
    )
