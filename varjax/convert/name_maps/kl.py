"""The official KL tokenizer (`AutoencoderKL` of LTH14/mar, which is LDM's) and ours."""

import math

import numpy as np

from varjax.convert.name_maps.autoencoder import autoencoder_links, infer_autoencoder
from varjax.convert.name_maps.link import Link, conv_links
from varjax.convert.name_maps.name_map import ConvertOptions, NameMap, Tensors, tensor_shape
from varjax.core.errors import check_setting
from varjax.tokenizers.kl.model import LATENT_STD_PATH, KLConfig


def infer_kl(tensors: Tensors, options: ConvertOptions) -> KLConfig:
    """Infers the config of an official `AutoencoderKL`, whose tensors do not tell the image size.

    Raises InputError for tensors that are missing or contradict each other.
    """
    scale = options.latent_scale
    valid = scale > 0 and math.isfinite(scale)
    check_setting("latent_scale", scale, valid, "above 0: 1 / standard deviation of the latents")
    latent_channels = tensor_shape(tensors, "post_quant_conv.weight", 4)[1]
    return KLConfig(
        image_size=options.image_size,
        groups=options.groups,
        latent_channels=latent_channels,
        **infer_autoencoder(tensors),
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


KL = NameMap(
    part="tokenizer",
    flag="kl",
    description="a KL tokenizer (AutoencoderKL)",
    known_by="encoder.mid.attn_1.q.weight",
    config=KLConfig,
    infer=infer_kl,
    table=kl_table,
    constants=kl_constants,
    prefix="first_stage_model.",  # in a checkpoint of a whole latent diffusion model
    ignored=("loss.",),  # LPIPS and the discriminator, in one of the tokenizer's own training
)
