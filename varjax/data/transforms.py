"""Pure functions on NumPy images; whatever is random is drawn from an explicit Generator."""

import math

import numpy as np


def random_affine(
    image_HWC: np.ndarray,
    rng: np.random.Generator,
    shift: float = 0.0,
    rotate: float = 0.0,
    zoom: float = 0.0,
) -> np.ndarray:
    """Moves by up to `shift` pixels, turns by up to `rotate` degrees, scales by 1 ± `zoom`.

    Each is uniform in its range; the whole is one resampling. Four numbers are drawn always.
    """
    y, x, turn, scale = rng.uniform(-1, 1, size=4)
    return affine(image_HWC, (shift * y, shift * x), rotate * turn, 1 + zoom * scale)


def affine(
    image_HWC: np.ndarray, shift: tuple[float, float], degrees: float, scale: float
) -> np.ndarray:
    """Scales and turns (counter-clockwise) about the center, then moves down and right by `shift`.

    Bilinear, zero beyond the border; dtype uint8 in and out.
    """
    H, W, _ = image_HWC.shape
    center = (H - 1) / 2, (W - 1) / 2
    cos, sin = math.cos(math.radians(degrees)) / scale, math.sin(math.radians(degrees)) / scale
    y_H1 = np.arange(H)[:, None] - center[0] - shift[0]
    x_1W = np.arange(W)[None, :] - center[1] - shift[1]
    y_HW, x_HW = cos * y_H1 + sin * x_1W + center[0], cos * x_1W - sin * y_H1 + center[1]
    padded_HWC = np.pad(image_HWC, ((1, 1), (1, 1), (0, 0))).astype(np.float64)
    top_HW, y_HW = _floor(y_HW, H)
    left_HW, x_HW = _floor(x_HW, W)
    result_HWC = np.zeros(image_HWC.shape)
    for dy, row_HW in ((0, 1 - y_HW), (1, y_HW)):
        for dx, column_HW in ((0, 1 - x_HW), (1, x_HW)):
            weight_HW1 = (row_HW * column_HW)[..., None]
            result_HWC += weight_HW1 * padded_HWC[top_HW + dy, left_HW + dx]
    return np.rint(result_HWC).astype(np.uint8)


def _floor(position: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Index into an axis padded by 1 on both sides, and the fraction towards the next index."""
    inside = np.clip(position + 1, 0, size + 1)
    index = np.minimum(inside.astype(np.int64), size)
    return index, inside - index
