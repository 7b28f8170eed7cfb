"""The golden case of the KL tokenizer as varjax sees it."""

import functools

import numpy as np

from tests.golden import weights
from varjax.convert import apply_map
from varjax.tokenizers.kl.model import KLConfig

NAME, PART = "kl_vae", "klvae"


def config() -> KLConfig:
    settings = weights.case(NAME)["settings"]
    multipliers = tuple(settings["ch_mult"])
    return KLConfig(64, multipliers=multipliers, latent_channels=settings["embed_dim"])


@functools.cache
def official() -> dict[str, np.ndarray]:
    """The weights by their official names. Not to be changed."""
    return weights.state_dict(NAME, PART)


@functools.cache
def params():
    return apply_map.from_official(config(), official())


def image() -> np.ndarray:
    """(1, 64, 64, 3) in [-1, 1]."""
    image_BCHW = np.tanh(np.random.RandomState(4).standard_normal((1, 3, 64, 64)))
    return image_BCHW.astype(np.float32).transpose(0, 2, 3, 1)


def outputs() -> dict[str, np.ndarray]:
    """What the official code computed: mean, std and decoded as NHWC; kl."""
    return {
        name: x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
        for name, x in weights.outputs(NAME).items()
    }
