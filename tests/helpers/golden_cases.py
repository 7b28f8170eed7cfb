"""Loads the golden cases in varjax's terms: configs, converted weights, NHWC arrays."""

import functools

import numpy as np

from tests.golden import weights
from varjax.convert import apply_map
from varjax.tokenizers.vq.model import VQConfig
from varjax.var.model import VARConfig

CASES = ("base", "shared_aln", "no_qk_norm", "ten_scales", "phi_per_scale")


def configs(name: str) -> tuple[VQConfig, VARConfig]:
    c = weights.case(name)
    scales = tuple(c["patch_nums"])
    tokenizer = VQConfig(
        scales=scales,
        width=c["ch"],
        vocab=c["vocab_size"],
        code_channels=c["z_channels"],
        num_phi=c["share_quant_resi"],
    )
    var = VARConfig(
        depth=c["depth"],
        width=c["embed_dim"],
        heads=c["num_heads"],
        classes=c["num_classes"],
        scales=scales,
        vocab=c["vocab_size"],
        code_channels=c["z_channels"],
        shared_adaln=c["shared_aln"],
        cosine_attention=c["attn_l2_norm"],
    )
    return tokenizer, var


@functools.cache
def tokenizer_params(name: str):
    config, _ = configs(name)
    return apply_map.from_official(config, weights.state_dict(name, "vae"))


@functools.cache
def var_params(name: str):
    _, config = configs(name)
    return apply_map.from_official(config, weights.state_dict(name, "var"))


@functools.cache
def outputs(name: str) -> dict[str, np.ndarray]:
    return weights.outputs(name)


def images(name: str) -> np.ndarray:
    """Returns the (2, R, R, 3) input images, in [-1, 1]."""
    return weights.image(name).transpose(0, 2, 3, 1)


def strided(name: str, image_BHWC) -> np.ndarray:
    """Returns images in the golden files' layout: NCHW, every s-th row and column."""
    s = weights.case(name)["image_stride"]
    return np.asarray(image_BHWC).transpose(0, 3, 1, 2)[:, :, ::s, ::s]
