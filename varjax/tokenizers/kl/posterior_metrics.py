"""Measures the posteriors of a KL tokenizer, in addition to its reconstructions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax.tokenizers.kl.model import (
    LATENT_STD_PATH,
    KLConfig,
    decode_latents,
    encode_posteriors,
    kl_divergence,
    latent_moments,
)
from varjax.trees import PyTree

FORMS = {"kl": "{:.2f} nats", "posterior_std": "{:.4f}", "latent_std": "{:.4f}"}
FORMS |= {"latent_scale": "{:.4f}", "stored_latent_std": "{:.4f}"}


def measure_posteriors(
    config: KLConfig, params: PyTree, x_BHWC: jax.Array, valid_B: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """Encodes images in [-1, 1] and decodes the posteriors' modes.

    Returns:
        The decoded images, (1, B, H, W, C) in [-1, 1]. For each image, its KL, the moments of its
        latents and their mean standard deviation. No sums, {}.
    """
    latents = encode_posteriors(config, params, x_BHWC)
    y_BHWC = decode_latents(config, params, latents["mean_BhwZ"])
    measures = {
        "kl_B": kl_divergence(latents),
        "posterior_std_B": jnp.mean(latents["std_BhwZ"], axis=(1, 2, 3)),
    }
    measures |= {f"{name}_B": x_B for name, x_B in latent_moments(latents).items()}
    return y_BHWC[None], measures, {}


def summarize_posteriors(
    config: KLConfig,
    params: PyTree,
    mean: Mapping[str, Any],
    added: Mapping[str, Any],
    images: int,
) -> dict[str, Any]:
    """Summarizes what `measure_posteriors` returned, as JSON data.

    "latent_std" is the standard deviation of all samples of all latents, 1/"latent_scale".
    "stored_latent_std" is the value stored with the weights.
    """
    std = float(np.sqrt(mean["latent_square_B"] - mean["latent_mean_B"] ** 2))
    return {
        "kl": float(mean["kl_B"]),
        "posterior_std": float(mean["posterior_std_B"]),
        "latent_std": std,
        "latent_scale": 1 / std,
        "stored_latent_std": float(params[LATENT_STD_PATH]),
    }


def posterior_lines(report: Mapping[str, Any]) -> list[str]:
    """Formats what `summarize_posteriors` returned as lines of text."""
    return [f"{name:<18}" + form.format(report[name]) for name, form in FORMS.items()]
