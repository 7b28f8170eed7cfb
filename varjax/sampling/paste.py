"""Pastes the pixels that an edit keeps back from the original image."""

from typing import Any

import numpy as np

from varjax.config.numbers import whole_number
from varjax.errors import InputError
from varjax.storage.image_files import check_pixels

BLEND_PART = 64  # by default, pixels are blended over 1 / 64 of the height


def paste(images_BHWC: Any, results_BHWC: Any, redraw: Any, blend: int | None = None) -> np.ndarray:
    """Pastes the kept pixels of the originals into the results of an edit.

        edited = model.edit(images, keep, labels)
        edited = varjax.paste(images, edited, redraw=~keep)

    An edit keeps tokens, whose pixels are a reconstruction. Here the pixels outside of `redraw` are
    those of the original, and inside the results fade in over a few pixels from its border.

    Args:
        images_BHWC: originals, uint8 or floats in [0, 1]; one, or one for each result.
        results_BHWC: results of `edit`, floats in [0, 1] or uint8.
        redraw: (h, w) or (B, h, w), bool or weights of the results in [0, 1]; its sides divide
            those of the images.
        blend: number of pixels over which the results fade in; None for 1 / 64 of the height, at
            least 1.

    Returns:
        (B, H, W, channels) float32 in [0, 1].

    Raises:
        InputError: shapes that do not fit, images of another type or range, weights outside of
            [0, 1], or a negative `blend`.
    """
    images, results = _unit_floats("images", images_BHWC), _unit_floats("results", results_BHWC)
    if results.ndim != 4 or images.shape not in (results.shape, (1, *results.shape[1:])):
        raise InputError(
            f"images have shape {images.shape} and results {results.shape}; needed are "
            "(B, H, W, channels) of both, or one image"
        )
    B, H, W, _ = results.shape
    blend = max(1, H // BLEND_PART) if blend is None else whole_number("blend", blend, 0)
    weight = np.asarray(redraw, np.float32)
    weight = weight[None] if weight.ndim == 2 else weight
    if weight.ndim != 3 or len(weight) not in (1, B) or H % weight.shape[1] or W % weight.shape[2]:
        raise InputError(
            f"redraw has shape {np.shape(redraw)}; needed is (h, w) or ({B}, h, w), where h "
            f"divides {H} and w divides {W}"
        )
    if not ((weight >= 0) & (weight <= 1)).all():
        raise InputError("redraw has numbers outside of [0, 1]; 1 shows the results, 0 the images")
    weight = weight.repeat(H // weight.shape[1], axis=1).repeat(W // weight.shape[2], axis=2)
    fade_in = np.stack([_fade_in(mask_HW, blend) for mask_HW in weight > 0])
    weight_BHW1 = (weight * fade_in)[..., None]
    return np.where(weight_BHW1 > 0, weight_BHW1 * results + (1 - weight_BHW1) * images, images)


def _unit_floats(name: str, images_BHWC: Any) -> np.ndarray:
    """Returns images, uint8 or floats in [0, 1], as float32 in [0, 1]."""
    images = np.asarray(images_BHWC)
    finite = images[np.isfinite(images)]  # NaN is reported where images are written, with advice
    if finite.size:
        check_pixels(finite, name)
    return images.astype(np.float32) / np.float32(255 if images.dtype == np.uint8 else 1)


def _fade_in(mask_HW: np.ndarray, blend: int) -> np.ndarray:
    """Returns weights that rise from the border of a mask to 1 within `blend` pixels."""
    if mask_HW.all():  # no border
        return np.ones(mask_HW.shape, np.float32)
    from scipy import ndimage  # a quarter of a second, and only pasted edits need it

    distance_HW = np.asarray(ndimage.distance_transform_edt(mask_HW))
    return np.minimum(1, distance_HW / (blend + 1)).astype(np.float32)
