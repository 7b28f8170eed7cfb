"""Estimates how much memory sampling with MAR needs."""

from varjax.mar.model import MARConfig
from varjax.mar.sample import SamplingSetup
from varjax.nn.autoencoder import decoding_bytes
from varjax.nn.compute import ComputeConfig
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.vq.model import VQConfig


def mar_sampling_bytes(
    tokenizer: KLConfig | VQConfig | None,
    config: MARConfig,
    batch: int,
    compute: ComputeConfig,
    setup: SamplingSetup,
) -> int:
    """Estimates how much memory a device needs, in addition to the weights, to sample a batch.

    This is the maximum over the transformer, the head and the decoder.

    Args:
        tokenizer: config of the tokenizer, if there is one.
        config: config of the transformer.
        batch: number of images on the device.
        compute: number format and execution of the transformer.
        setup: setup of the sampling steps.
    """
    rows, item = batch * (2 if setup.guided else 1), compute.jax_dtype.itemsize
    tokens = config.buffer_size + config.length
    # For each token in a layer: residual stream and norm in float32; q, k, v, and twice the MLP's
    # inner width; and the attention matrix with its softmax.
    C = max(config.width, config.hidden_width)
    heads = max(config.encoder_heads, config.decoder_heads)
    token_bytes = C * (2 * 4 + 11 * item) + heads * tokens * 2 * 4
    if config.causal:  # the caches of encoder and decoder, and what a layer of each reads
        channels = (config.encoder_depth + 1) * config.width
        channels += (config.decoder_depth + 1) * config.hidden_width
        cache = 2 * channels * rows * tokens * item
        transformer, new = cache + rows * config.buffer_size * token_bytes, 1
    else:
        transformer = rows * tokens * token_bytes
        new = max(group.new for group in setup.groups)
    decoder = 0
    if tokenizer is not None:
        decoder = decoding_bytes(batch, tokenizer.image_shape, tokenizer.width)
    return max(transformer, rows * new * config.head.bytes_per_token(), decoder)
