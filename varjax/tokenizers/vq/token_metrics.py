"""Measures the scales and codes of a VQ tokenizer, in addition to its reconstructions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn.autoencoder import to_unit_range
from varjax.nn.compute import EXACT, Precision
from varjax.tokenizers import image_metrics
from varjax.tokenizers.vq.model import (
    VQConfig,
    bound_quantizer,
    decode_every_scale,
    image_features,
    quantize_images,
)
from varjax.tokenizers.vq.quantizer import code_counts, code_perplexity
from varjax.trees import PyTree

SHORTER: tuple[Precision, ...] = ("bfloat16", "tf32", "bfloat16_3x", "tf32_3x")
SAME = tuple(f"same_in_{precision}" for precision in SHORTER)
LEAST_POWER = 1e-12  # below any real mean square
COLUMNS = {"psnr": "{:.2f}", "rest": "{:.3f}", "perplexity": "{:.1f}", "codes": "{}"}
COLUMNS |= {"usage": "{:.2f}"}


def measure_tokens(
    config: VQConfig, params: PyTree, x_BHWC: jax.Array, valid_B: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """Quantizes images in [-1, 1] and decodes them after each scale.

    Returns:
        The images after each scale, (K, B, H, W, C) in [-1, 1]. For each image: psnr_KB after each
        scale, rest_KB (the mean square of the features' residual), power_B (that of the features),
        and same_in_<precision>_B, the fraction of tokens that do not change if the encoder
        multiplies less precisely. And counts_KV of codes in valid images.
    """
    f_BhwZ = image_features(config, params, x_BHWC)
    quantized = bound_quantizer(config, params)(f_BhwZ)
    f_hat_KBhwZ = jnp.stack(quantized.f_hats)
    y_KBHWC = decode_every_scale(config, params, quantized.f_hats)
    a_BHWC = to_unit_range(x_BHWC)
    measures = {
        "psnr_KB": jax.vmap(lambda y: image_metrics.psnr(a_BHWC, to_unit_range(y)))(y_KBHWC),
        "rest_KB": jnp.mean(jnp.square(f_hat_KBhwZ - f_BhwZ[None]), axis=(2, 3, 4)),
        "power_B": jnp.mean(jnp.square(f_BhwZ), axis=(1, 2, 3)),
    }
    for precision in SHORTER:
        compute = dataclasses.replace(EXACT, encoder_precision=precision)
        tokens_BL = quantize_images(config, params, x_BHWC, compute).tokens_BL
        same_BL = (tokens_BL == quantized.tokens_BL).astype(jnp.float32)
        measures[f"same_in_{precision}_B"] = jnp.mean(same_BL, axis=1)
    counts_KV = code_counts(config.pyramid, config.vocab, quantized.tokens_BL, valid_B)
    return y_KBHWC, measures, {"counts_KV": counts_KV}


def summarize_tokens(
    config: VQConfig,
    params: PyTree,
    mean: Mapping[str, Any],
    added: Mapping[str, Any],
    images: int,
) -> dict[str, Any]:
    """Summarizes what `measure_tokens` returned as JSON data, in lists over scales."""
    pyramid, counts_KV = config.pyramid, added["counts_KV"]
    used_K = np.sum(counts_KV > 0, axis=1)
    could_K = np.minimum(config.vocab, images * np.array(pyramid.lengths))
    return {
        **{name: float(mean[f"{name}_B"]) for name in SAME},
        "scales": [list(shape) for shape in pyramid.shapes],
        "scale_psnr": mean["psnr_KB"].tolist(),
        "scale_rest": (mean["rest_KB"] / max(mean["power_B"], LEAST_POWER)).tolist(),
        "scale_perplexity": code_perplexity(counts_KV / images, np).tolist(),
        "scale_codes": used_K.tolist(),
        "scale_usage": (used_K / could_K).tolist(),
    }


def token_lines(report: Mapping[str, Any]) -> list[str]:
    """Formats what `summarize_tokens` returned as lines of text."""
    lines = [f"{name:<20}{report[name]:.4f}" for name in SAME]
    lines.append("".join(f"{name:>12}" for name in ("scale", *COLUMNS)))
    for k, (h, w) in enumerate(report["scales"]):
        cells = [form.format(report[f"scale_{name}"][k]) for name, form in COLUMNS.items()]
        lines.append("".join(f"{cell:>12}" for cell in (f"{h}×{w}", *cells)))
    return lines
