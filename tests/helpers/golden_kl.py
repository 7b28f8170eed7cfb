"""Loads the golden cases of the KL tokenizer in varjax's terms."""

import functools

import numpy as np

from tests.golden import weights
from varjax.convert import apply_map
from varjax.tokenizers.kl.model import KLConfig

NAME, PART = "kl_vae", "klvae"


def config() -> KLConfig:
    settings = weights.case(NAME)["settings"]
    channel_mult = tuple(settings["ch_mult"])
    return KLConfig(64, channel_mult=channel_mult, latent_channels=settings["embed_dim"])


@functools.cache
def official() -> dict[str, np.ndarray]:
    """Returns the weights by their official names; callers must not change them."""
    return weights.state_dict(NAME, PART)


@functools.cache
def params():
    return apply_map.from_official(config(), official())


def image() -> np.ndarray:
    """Returns the (1, 64, 64, 3) input image, in [-1, 1]."""
    image_BCHW = np.tanh(np.random.RandomState(4).standard_normal((1, 3, 64, 64)))
    return image_BCHW.astype(np.float32).transpose(0, 2, 3, 1)


def outputs() -> dict[str, np.ndarray]:
    """Returns the official code's outputs: mean, std and decoded as NHWC; kl."""
    return {
        name: x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
        for name, x in weights.outputs(NAME).items()
    }


# Cases of latent diffusion's code at 32 channels: with attention on the coarsest level of encoder
# and decoder (f16), and only in the middle blocks (f4).
LAYOUTS = {
    "kl_f16_decoder_attention": KLConfig(
        (64, 48), width=32, latent_channels=8, decoder_attention=(-1,)
    ),
    "kl_f4_no_attention": KLConfig(
        (32, 40), width=32, channel_mult=(1, 2, 4), latent_channels=3, encoder_attention=()
    ),
}


@functools.cache
def layout_official(name: str) -> dict[str, np.ndarray]:
    """Returns the weights of one of LAYOUTS by official names; callers must not change them."""
    return weights.state_dict(name, PART)


def layout_images(name: str) -> np.ndarray:
    """Returns (2, H, W, 3) input images, in [-1, 1]."""
    H, W, _ = LAYOUTS[name].image_shape
    image_BCHW = np.tanh(np.random.RandomState(4).standard_normal((2, 3, H, W)))
    return image_BCHW.astype(np.float32).transpose(0, 2, 3, 1)


def layout_outputs(name: str) -> dict[str, np.ndarray]:
    """Returns the outputs of latent diffusion's code: mean, std and decoded, as NHWC."""
    return {key: x.transpose(0, 2, 3, 1) for key, x in weights.outputs(name).items()}


def diffusers_names(official: dict[str, np.ndarray], levels: int) -> dict[str, np.ndarray]:
    """Returns the same tensors with the names and shapes of diffusers' `AutoencoderKL`."""
    return {_diffusers_name(name, levels): _linear(name, x) for name, x in official.items()}


def _linear(name: str, x: np.ndarray) -> np.ndarray:
    return x[:, :, 0, 0] if ".attn" in name and x.ndim == 4 else x


def _diffusers_name(name: str, levels: int) -> str:
    parts = name.split(".")
    layers = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    if len(parts) > 3 and parts[1] in ("down", "up"):
        way, level = parts[1], int(parts[2])
        parts[1] = f"{way}_blocks"
        parts[2] = str(level if way == "down" else levels - 1 - level)
        if parts[3] in ("block", "attn"):
            if parts[3] == "attn":
                parts[5] = layers[parts[5]]
            parts[3] = {"block": "resnets", "attn": "attentions"}[parts[3]]
        else:
            parts[3] += "rs.0"  # of downsample, upsample
    elif parts[1] == "mid":
        if parts[2] == "attn_1":
            parts[3] = layers[parts[3]]
        blocks = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}
        parts[1:3] = ["mid_block", blocks[parts[2]]]
    elif parts[1] == "norm_out":
        parts[1] = "conv_norm_out"
    return ".".join("conv_shortcut" if part == "nin_shortcut" else part for part in parts)
