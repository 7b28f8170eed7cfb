"""The official KL tokenizer (`AutoencoderKL` of LTH14/mar, which is LDM's) and ours."""

import dataclasses
import math

import numpy as np

from varjax.convert.name_maps.autoencoder import autoencoder_links, infer_autoencoder
from varjax.convert.name_maps.link import Link, conv_links
from varjax.convert.name_maps.name_map import (
    ConvertOptions,
    NameMap,
    Release,
    Tensors,
    tensor_shape,
)
from varjax.core.errors import InputError, check_setting
from varjax.nn.autoencoder import downsampling
from varjax.tokenizers.kl.model import LATENT_STD_PATH, KLConfig

# A copy of the official files. At this commit they are as they were published; later ones have
# .safetensors in their place, of which that of MAR-B is reported to be weights without averaging.
MAR_REPO, MAR_REVISION = "jadechoghari/mar", "3cb89bbc254335e7b25ed806e3f00a3dc0c1359c"
MAR_PAGE = "https://github.com/LTH14/mar"
KL_FILE = "kl16.ckpt"


def infer_kl(tensors: Tensors, options: ConvertOptions) -> KLConfig:
    """Infers the config of an official `AutoencoderKL`, whose tensors do not tell the image size.

    Raises InputError for tensors that are missing or contradict each other.
    """
    scale = options.latent_scale
    valid = scale > 0 and math.isfinite(scale)
    check_setting("latent_scale", scale, valid, "above 0: 1 / standard deviation of the latents")
    return KLConfig(
        image_size=options.image_size or KLConfig.image_size,
        groups=options.groups,
        latent_channels=_latent_channels(tensors),
        **infer_autoencoder(tensors),
    )


def kl_model_options(tensors: Tensors, options: ConvertOptions) -> ConvertOptions:
    """Tells a model of its latents what they are: their channels, and their pixels.

    Raises InputError where the tensors or `options` contradict that.
    """
    found = _latent_channels(tensors)
    if options.latent_channels not in (None, found):
        raise InputError(
            f"latent_channels={options.latent_channels}, but its latents have {found}; "
            "leave --latent_channels out"
        )
    multipliers = infer_autoencoder(tensors)["multipliers"]
    return dataclasses.replace(
        options, latent_channels=found, downsampling=downsampling(multipliers)
    )


def kl_table(config: KLConfig) -> list[Link]:
    """Lists all tensors of the official `AutoencoderKL`."""
    return [
        *conv_links("quant_conv", "quant_conv"),
        *conv_links("post_quant_conv", "post_quant_conv"),
        *autoencoder_links(config, split_qkv=True, decoder_attention=False),
    ]


def kl_constants(options: ConvertOptions) -> dict[str, np.ndarray]:
    """Returns the parameter that official files lack: the code that uses them knows the scale."""
    return {LATENT_STD_PATH: np.array(1 / options.latent_scale, np.float32)}


def _latent_channels(tensors: Tensors) -> int:
    return tensor_shape(tensors, "post_quant_conv.weight", 4)[1]


KL = NameMap(
    part="tokenizer",
    flag="kl",
    description="a KL tokenizer (AutoencoderKL)",
    known_by="encoder.mid.attn_1.q.weight",
    config=KLConfig,
    infer=infer_kl,
    table=kl_table,
    constants=kl_constants,
    model_options=kl_model_options,
    prefix="first_stage_model.",  # in a checkpoint of a whole latent diffusion model
    ignored=("loss.",),  # LPIPS and the discriminator, in one of the tokenizer's own training
    releases={"kl16": Release(MAR_REPO, {"kl": KL_FILE}, MAR_REVISION, MAR_PAGE)},
)
