"""Estimates how much memory sampling with MAR needs."""

from varjax.mar.model import MARConfig
from varjax.mar.sample import SamplingSetup
from varjax.nn.autoencoder import decoding_bytes
from varjax.nn.compute import ComputeConfig
from varjax.nn.transformer import cache_bytes, layer_bytes
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.vq.model import VQConfig


def mar_sampling_bytes(
    tokenizer: KLConfig | VQConfig | None,
    config: MARConfig,
    batch: int,
    compute: ComputeConfig,
    setup: SamplingSetup,
    guide: MARConfig | None = None,
) -> int:
    """Estimates how much memory a device needs, in addition to the weights, to sample a batch.

    This is the maximum over the transformer, the head and the decoder.

    Args:
        tokenizer: config of the tokenizer, if there is one.
        config: config of the transformer.
        batch: number of images on the device.
        compute: dtype and execution of the transformer.
        setup: setup of the sampling steps.
        guide: config of the model for autoguidance; None if both streams are of one model.
    """
    streams = 2 if any(setup.guided) else 1
    if guide is not None and streams == 2:
        caches, layers, head = zip(
            *(_transformer_bytes(c, batch, compute, setup) for c in (config, guide)), strict=True
        )
        transformer, heads = sum(caches) + max(layers), sum(head)
    else:
        cache, layer, heads = _transformer_bytes(config, batch * streams, compute, setup)
        transformer = cache + layer
    decoder = 0
    if tokenizer is not None:
        decoder = decoding_bytes(batch, tokenizer.image_shape, tokenizer.width)
    return max(transformer, heads, decoder)


def _transformer_bytes(
    config: MARConfig, rows: int, compute: ComputeConfig, setup: SamplingSetup
) -> tuple[int, int, int]:
    """Estimates the bytes of the caches, of a layer, and of the head, for `rows` sequences."""
    item, tokens = compute.jax_dtype.itemsize, config.buffer_size + config.length
    stacks = (  # their keys are masked where there is padding, or nothing in the cache yet
        (config.encoder_depth, config.width, config.encoder_heads, True),
        (config.decoder_depth, config.hidden_width, config.decoder_heads, config.causal),
    )
    if config.causal:
        cache = sum(cache_bytes(depth, width, rows, tokens, item) for depth, width, *_ in stacks)
        computed, new = config.buffer_size, 1
    else:
        cache, computed, new = 0, tokens, max(group.new for group in setup.groups)
    layer = max(
        layer_bytes(
            *(width, heads, rows, computed, tokens, compute),
            cached=config.causal,
            key_mask=key_mask,
        )
        for _, width, heads, key_mask in stacks
    )
    return cache, layer, rows * new * config.head.bytes_per_token()
