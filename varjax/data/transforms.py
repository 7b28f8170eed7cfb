"""Pure functions on NumPy images; whatever is random is drawn from an explicit Generator."""

import math
from typing import Any

import numpy as np
from scipy import ndimage


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

    Cubic splines, which keep small images sharp; zero beyond the border; uint8 in and out.
    """
    cos, sin = math.cos(math.radians(degrees)) / scale, math.sin(math.radians(degrees)) / scale
    matrix = np.array([[cos, sin], [-sin, cos]])
    center = (np.array(image_HWC.shape[:2]) - 1) / 2
    offset: Any = center - matrix @ (center + np.array(shift))
    channels = [
        # "grid-constant" also interpolates between the border pixels and the zeros around them.
        ndimage.affine_transform(
            image_HWC[..., c].astype(np.float32), matrix, offset, order=3, mode="grid-constant"
        )
        for c in range(image_HWC.shape[-1])
    ]
    return np.rint(np.clip(np.stack(channels, axis=-1), 0, 255)).astype(np.uint8)
