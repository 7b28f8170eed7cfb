"""Maps the official KL tokenizers (`AutoencoderKL` of latent diffusion, used by MAR) to ours."""

import dataclasses
import math

import numpy as np

from varjax.convert.name_maps.autoencoder import (
    autoencoder_links,
    infer_attention,
    infer_autoencoder,
)
from varjax.convert.name_maps.name_map import (
    ConvertOptions,
    Link,
    NameMap,
    Release,
    Tensors,
    conv_links,
    tensor_shape,
)
from varjax.errors import InputError, check_setting
from varjax.nn.autoencoder import COARSEST, downsampling
from varjax.tokenizers.kl.model import LATENT_STD_PATH, KLConfig

# A copy of the official files. At this commit they are as they were published; later commits have
# .safetensors instead, and MAR-B's is reported to hold weights that are not averaged. The hashes
# are those of downloads at this commit; KL-16's is also that of the file on MAR's own page.
MAR_REPO, MAR_COMMIT = "jadechoghari/mar", "773c9bdcd98740c7b876ce0d66f684a0e2468990"
MAR_PAGE = "https://github.com/LTH14/mar"
KL_FILE = "kl16.ckpt"
KL_SHA256 = {KL_FILE: "34ce001bcfffb7af67ec8af1e683a30d7bd45760855ddc7deedc1330f2cfd38f"}
KL16_SCALE = 0.2325  # of the released KL-16, in MAR's code


def infer_kl(tensors: Tensors, options: ConvertOptions) -> KLConfig:
    """Infers the config of an `AutoencoderKL`; the options supply the image size.

    Raises InputError for tensors that are missing or contradict each other.
    """
    scale, sizes = options.latent_scale, infer_autoencoder(tensors)
    levels = len(sizes["channel_mult"])
    if scale is not None:
        valid = scale > 0 and math.isfinite(scale)
        check_setting("latent_scale", scale, valid, "above 0: 1 / standard deviation of latents")
    features, latent_channels = _features(tensors), _latent_channels(tensors)
    return KLConfig(
        image_size=options.image_size or KLConfig.image_size,
        groups=options.groups,
        latent_channels=latent_channels,
        encoder_attention=infer_attention(tensors, "encoder", levels),
        decoder_attention=infer_attention(tensors, "decoder", levels),
        feature_channels=None if features == latent_channels else features,
        quant_convs=_has_quant_convs(tensors),
        latent_shift=options.latent_shift or 0.0,
        **sizes,
    )


def kl_model_options(tensors: Tensors, options: ConvertOptions) -> ConvertOptions:
    """Returns options for a model of its latents: channels, and pixels per latent.

    Raises InputError if the tensors contradict `options`.
    """
    channels = _latent_channels(tensors)
    if options.latent_channels not in (None, channels):
        raise InputError(
            f"latent_channels={options.latent_channels}, but its latents have {channels}; "
            "omit --latent_channels"
        )
    channel_mult = infer_autoencoder(tensors)["channel_mult"]
    return dataclasses.replace(
        options, latent_channels=channels, downsampling=downsampling(channel_mult)
    )


def kl_table(config: KLConfig) -> list[Link]:
    """Lists all tensors of the official `AutoencoderKL`."""
    attention = config.encoder_attention, config.decoder_attention
    links = list(autoencoder_links(config, True, *attention))
    if config.quant_convs:
        links += conv_links("quant_conv", "quant_conv")
        links += conv_links("post_quant_conv", "post_quant_conv")
    return links


def kl_constants(options: ConvertOptions) -> dict[str, np.ndarray]:
    """Returns the parameter that official files lack: the scale, which is in the official code."""
    scale = KL16_SCALE if options.latent_scale is None else options.latent_scale
    return {LATENT_STD_PATH: np.array(1 / scale, np.float32)}


def kl_official_constants(config: KLConfig) -> dict[str, np.ndarray]:
    """Returns the scale in the official code, which has it for MAR's KL-16 only."""
    return kl_constants(ConvertOptions()) if is_kl16(config) else {}


def is_kl16(config: KLConfig) -> bool:
    """Returns whether a tokenizer is MAR's KL-16, which no other known one equals in attention."""
    return (config.encoder_attention, config.decoder_attention) == (COARSEST, ())


def _latent_channels(tensors: Tensors) -> int:
    if _has_quant_convs(tensors):
        return tensor_shape(tensors, "post_quant_conv.weight", 4)[1]
    return _features(tensors)


def _features(tensors: Tensors) -> int:
    both = tensor_shape(tensors, "encoder.conv_out.weight", 4)[0]
    if both % 2:
        raise InputError(
            f"encoder.conv_out.weight has {both} outputs; means and log variances need an even "
            "number"
        )
    return both // 2


def _has_quant_convs(tensors: Tensors) -> bool:
    return bool({"quant_conv.weight", "post_quant_conv.weight"} & tensors.keys())


KL = NameMap(
    part="tokenizer",
    flag="kl",
    description="a KL tokenizer (AutoencoderKL)",
    known_by="encoder.mid.attn_1.q.weight",
    config=KLConfig,
    infer=infer_kl,
    table=kl_table,
    constants=kl_constants,
    official_constants=kl_official_constants,
    model_options=kl_model_options,
    prefix="first_stage_model.",  # in a checkpoint of a whole latent diffusion model
    ignored=("loss.",),  # LPIPS and the discriminator, in checkpoints of the tokenizer's training
    releases={"kl16": Release(MAR_REPO, {"kl": KL_FILE}, MAR_COMMIT, KL_SHA256, MAR_PAGE)},
)
