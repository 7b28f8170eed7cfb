"""Estimates how much memory sampling with VAR needs."""

from varjax.nn.autoencoder import decoding_bytes
from varjax.nn.compute import ComputeConfig
from varjax.tokenizers.vq.model import VQConfig
from varjax.var.model import VARConfig


def var_sampling_bytes(
    tokenizer: VQConfig,
    var: VARConfig,
    batch: int,
    compute: ComputeConfig,
    guided: int | None = None,
    guide: VARConfig | None = None,
) -> int:
    """Estimates how much memory a device needs, in addition to the weights, to sample a batch.

    This is the maximum of the transformer at the last scale, the transformer at the last scale with
    two streams, and the decoder.

    Args:
        tokenizer: config of the tokenizer.
        var: config of the transformer.
        batch: number of images on the device.
        compute: number format and execution of the transformer.
        guided: number of scales, from the first, with a second stream for guidance; None for all.
        guide: config of the model for autoguidance; None if both streams are of one model.
    """
    item, K = compute.jax_dtype.itemsize, len(var.pyramid)
    guided = K if guided is None else guided

    def cache(model: VARConfig, rows: int, length: int) -> int:
        return 2 * (model.depth + 1) * rows * length * model.width * item  # and one layer's copy

    def layer(model: VARConfig, rows: int, k: int) -> int:
        # Residual stream and norm in float32; q, k, v, and twice the MLP's inner width.
        l, C = var.pyramid.lengths[k], model.width  # noqa: E741
        numbers = rows * l * C * (2 * 4 + 11 * item)
        if compute.attention_implementation(cached=True) == "xla":  # its matrices, their softmax
            numbers += rows * model.heads * l * var.pyramid.slices[k].stop * 2 * 4
        return numbers

    def logits(rows: int, k: int) -> int:
        # For guided logits, also the filters, the noise, and a mixture of codes.
        return (rows + 3 * batch) * var.pyramid.lengths[k] * var.vocab * 4

    L, peaks = var.pyramid.length, [decoding_bytes(batch, tokenizer.image_shape, tokenizer.width)]
    one = cache(var, batch, L)
    if guided < K:
        peaks.append(one + layer(var, batch, K - 1) + logits(batch, K - 1))
    if guided:
        k, length = guided - 1, var.pyramid.slices[guided - 1].stop
        if guide is None:
            two, at_once = cache(var, 2 * batch, length), layer(var, 2 * batch, k)
        else:
            two = one + cache(guide, batch, L)
            at_once = max(layer(var, batch, k), layer(guide, batch, k))
        peaks.append(two + at_once + logits(2 * batch, k))
        if guided < K and guide is None:  # the rows that are kept are copied
            peaks.append(two + one)
    return max(peaks)
