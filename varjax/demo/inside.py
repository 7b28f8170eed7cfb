"""Shows what a model makes of a picture: its tokens, their errors, and likely alternatives."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from varjax.demo.drawing import DemoModel
from varjax.errors import InputError
from varjax.models import LoadedTokenizer
from varjax.storage.image_files import to_uint8
from varjax.tokenizers.image_metrics import psnr
from varjax.tokenizers.losses.lpips import lpips

MAP_SIDE = 144  # pixels of a token map on the page
GOLDEN_RATIO = 0.618034  # fraction of the color circle between two codes, so that neighbors differ
ALTERNATIVES = 6  # codes that are shown for a token


@dataclasses.dataclass(frozen=True)
class Insides:
    """Holds what a page shows of a picture.

    Attributes:
        images: images of the model's shape by name: the original, and its reconstructions.
        maps: RGB images (MAP_SIDE, MAP_SIDE, 3) by name: the error, and tokens as colors.
        summary: sentence about the quality of the reconstruction.
        tokens_BL: tokens (1, L) of a model that draws scale by scale; None for others.
    """

    images: dict[str, np.ndarray]
    maps: dict[str, np.ndarray]
    summary: str
    tokens_BL: np.ndarray | None = None


def look_inside(model: DemoModel, image_HWC: np.ndarray) -> Insides:
    """Encodes a picture, and decodes it: scale by scale, from codes, or from a mean and a sample.

    Args:
        model: model whose tokenizer is used.
        image_HWC: uint8 image of the model's shape.
    """
    sampler = model.sampler
    tokenizer = LoadedTokenizer(sampler.tokenizer, sampler.params["tokenizer"])
    latents = tokenizer.encode(image_HWC[None])
    images, tokens_BL = {"original": image_HWC}, None
    if model.keeps_scales:
        tokens_BL = np.asarray(latents["tokens"])
        images_KBHWC = to_uint8(np.asarray(sampler.decode(tokens_BL, every_scale=True)))
        images |= {f"after scale {k + 1}": x[0] for k, x in enumerate(images_KBHWC)}
        result_HWC = images_KBHWC[-1, 0]
        pyramid = sampler.tokenizer.pyramid
        maps = {
            f"tokens of scale {k + 1}": code_colors(tokens_BL[0, scale].reshape(shape))
            for k, (scale, shape) in enumerate(zip(pyramid.slices, pyramid.shapes, strict=True))
        }
        sees_LL = pyramid.level_L[:, None] >= pyramid.level_L[None]
        maps["attention: who (row) sees whom"] = _map_image(sees_LL.astype(np.uint8) * 255)
    elif "tokens" in latents:  # of one scale
        result_HWC = to_uint8(np.asarray(tokenizer.decode(latents)))[0]
        images["from its codes"] = result_HWC
        maps = {"tokens": code_colors(np.asarray(latents["tokens"]).reshape(sampler.edit_shape))}
    else:
        mean_BhwZ, std_BhwZ = latents["mean"], latents["std"]
        noise_BhwZ = jax.random.normal(jax.random.key(0), mean_BhwZ.shape)
        sample_BhwZ = mean_BhwZ + std_BhwZ * noise_BhwZ
        mean_HWC, sample_HWC = (
            to_uint8(np.asarray(tokenizer.decode(x)))[0] for x in (mean_BhwZ, sample_BhwZ)
        )
        images |= {"posterior mean": mean_HWC, "posterior sample": sample_HWC}
        result_HWC = mean_HWC
        maps = {"latents, three channels": _latent_colors(np.asarray(mean_BhwZ)[0])}
    pair = (jnp.asarray(x[None] / np.float32(255)) for x in (image_HWC, result_HWC))
    original_BHWC, result_BHWC = pair
    error_HW = np.asarray(jnp.abs(original_BHWC - result_BHWC).mean(axis=-1))[0]
    most = float(error_HW.max())
    error = _map_image(to_uint8(error_HW / max(most, 1e-6)))
    summary = f"PSNR {float(psnr(original_BHWC, result_BHWC)[0]):.1f} dB; "
    if model.lpips is not None:
        # LPIPS compares images in [-1, 1].
        distance_B = jax.jit(lpips)(model.lpips, 2 * original_BHWC - 1, 2 * result_BHWC - 1)
        summary += f"LPIPS {float(distance_B[0]):.3f}; "
    summary += f"largest error {most:.3f} of 1"
    return Insides(images, {"error, white is the largest": error} | maps, summary, tokens_BL)


def likeliest_codes(
    model: DemoModel, tokens_BL: np.ndarray, label: int, scale: int, position: tuple[float, float]
) -> tuple[dict[str, np.ndarray], str]:
    """Decodes a picture with other codes at one of its tokens: those that VAR finds most likely.

    Args:
        model: model that draws scale by scale.
        tokens_BL: tokens (1, L) of the picture.
        label: class that the prediction is for.
        scale: index of the scale, from 0.
        position: (y, x) within the token map, in [0, 1).

    Returns:
        Images by code and probability, and a sentence about the picture's own code.

    Raises:
        InputError: there is no such scale.
    """
    sampler: Any = model.sampler
    pyramid = sampler.tokenizer.pyramid
    if not 0 <= scale < len(pyramid):
        raise InputError(f"scale {scale + 1}: allowed are 1 … {len(pyramid)}")
    (h, w), begin = pyramid.shapes[scale], pyramid.slices[scale].start
    y, x = (min(int(part * side), side - 1) for part, side in zip(position, (h, w), strict=True))
    token = begin + y * w + x
    logits_V = np.asarray(sampler.logits(tokens_BL, [label]))[0, token].astype(np.float64)
    probability_V = np.exp(logits_V - logits_V.max())
    probability_V /= probability_V.sum()
    own = int(tokens_BL[0, token])
    codes = np.argsort(-probability_V, kind="stable")[:ALTERNATIVES]
    # The shape is always the same, also for a vocabulary of fewer codes.
    changed_BL = np.repeat(tokens_BL, ALTERNATIVES, axis=0)
    changed_BL[: len(codes), token] = codes
    images_BHWC = to_uint8(np.asarray(sampler.decode(changed_BL)))
    names = [f"code {code}: {probability_V[code]:.1%}" for code in codes]
    rank = int((probability_V > probability_V[own]).sum()) + 1
    about = (
        f"Scale {scale + 1}, row {y + 1}, column {x + 1}: the picture has code {own}, probability "
        f"{probability_V[own]:.1%}, number {rank} of {len(probability_V)}."
    )
    return dict(zip(names, images_BHWC, strict=False)), about


def code_colors(code_hw: np.ndarray) -> np.ndarray:
    """Returns a map of codes as RGB; equal codes have equal colors, neighboring ones do not."""
    hue_hw = (code_hw * GOLDEN_RATIO % 1 * 255).astype(np.uint8)
    full_hw = np.full_like(hue_hw, 255)
    hsv = Image.merge("HSV", [Image.fromarray(x) for x in (hue_hw, full_hw // 2 + 60, full_hw)])
    return _map_image(np.asarray(hsv.convert("RGB")))


def _latent_colors(mean_hwZ: np.ndarray) -> np.ndarray:
    """Returns up to three channels of latents as colors, each over its own range."""
    first_hwZ = mean_hwZ[..., :3]
    low, high = first_hwZ.min(axis=(0, 1)), first_hwZ.max(axis=(0, 1))
    colors_hwZ = to_uint8((first_hwZ - low) / np.maximum(high - low, 1e-6))
    return _map_image(colors_hwZ if colors_hwZ.shape[-1] == 3 else colors_hwZ[..., 0])


def _map_image(map_hwC: np.ndarray) -> np.ndarray:
    """Returns a map of any size as an RGB image of MAP_SIDE pixels a side."""
    size = MAP_SIDE, MAP_SIDE
    smaller = max(map_hwC.shape[:2]) > MAP_SIDE
    resampling = Image.Resampling.BOX if smaller else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(map_hwC).resize(size, resampling).convert("RGB"))
