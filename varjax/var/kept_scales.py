"""Which tokens of an image VAR keeps in an edit: by their position, or whole scales."""

import jax
import jax.numpy as jnp
import numpy as np

from varjax.config.numbers import whole_number
from varjax.errors import InputError
from varjax.nn import resize
from varjax.tokenizers.vq.pyramid import Pyramid


def keep_at_every_scale(pyramid: Pyramid, keep_Bhw: jax.Array | np.ndarray) -> jax.Array:
    """Resizes a mask of what to keep to every scale, as the reference does.

    Bilinear, then True where more than half is kept. A first scale with a single token is always
    kept.

    Args:
        pyramid: the sizes of the scales.
        keep_Bhw: bool, True on the finest token map where tokens are kept.

    Returns:
        (B, L) bool.
    """
    weight_Bhw1 = jnp.asarray(keep_Bhw, jnp.float32)[..., None]
    keeps = []
    for shape in pyramid.shapes:
        keep = resize.bilinear(weight_Bhw1, shape).reshape(weight_Bhw1.shape[0], -1) > 0.5
        keeps.append(keep | (shape == (1, 1)))
    return jnp.concatenate(keeps, axis=1)


def keep_first_scales(pyramid: Pyramid, keep_scales: int) -> np.ndarray:
    """Returns which tokens are in the first `keep_scales` scales, (L,) bool.

    Raises InputError unless at least one scale is kept and one is drawn.
    """
    most = len(pyramid) - 1
    if not most:
        raise InputError("this model has one scale, so none can be kept while others are drawn")
    allowed = f"a whole number, 1 … {most}: the scales are {pyramid.scales}"
    return pyramid.level_L < whole_number("keep_scales", keep_scales, 1, most, allowed=allowed)


def scales_of_size(
    size: tuple[int, ...], image_shape: tuple[int, int, int], pyramid: Pyramid
) -> int:
    """Returns how many scales of an enlarged image to keep: those that show what it contains.

    A token of a kept scale covers at least half as many pixels of the small image, along a side,
    as a token of the finest scale covers in an image of the model's size. So 64 pixels fill the
    scales up to 8x8 of a model for 256 pixels.

    Args:
        size: (h, w) of the small image.
        image_shape: (H, W, channels) of the model's images.
        pyramid: the model's scales.

    Raises:
        InputError: an image that is not smaller than the model's, or smaller than one token.
    """
    H, W, _ = image_shape
    finest_h, finest_w = pyramid.finest
    if len(size) != 2 or not 0 < size[0] < H or size[0] * W != size[1] * H:
        raise InputError(
            f"the images have {'x'.join(map(str, size))} pixels; upscaling takes (B, h, w, "
            f"channels) with h below {H} and the same ratio of h to w as {H}x{W}"
        )
    scales = sum(h * H <= 2 * finest_h * size[0] for h, _ in pyramid.shapes)
    if not scales:
        smallest = -(-H // (2 * finest_h))
        raise InputError(
            f"the images have {size[0]}x{size[1]} pixels; at least {smallest} rows fill the "
            "first scale"
        )
    return min(scales, len(pyramid) - 1)
