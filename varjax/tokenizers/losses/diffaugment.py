"""DiffAugment: differentiable augmentations of all that a discriminator sees (arXiv 2006.10738).

The discriminator cannot memorize its few training images, and gradients still reach the
reconstructions.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

Augmentation = Literal["color", "translation", "cutout"]
MAX_TRANSLATION = 1 / 8  # of a side
CUTOUT_SIDE = 1 / 5  # of a side; the paper, which generates images, uses 1 / 2


def diffaugment(
    image_BHWC: jax.Array, key_B: jax.Array, augmentations: Sequence[Augmentation]
) -> jax.Array:
    """Augments images, each by its own key alone.

    Args:
        image_BHWC: images in [-1, 1].
        key_B: random keys, one for each image.
        augmentations: names of the augmentations, in the order of application.

    Returns:
        Images of the same shape, not clipped.
    """

    def one(image_HWC, key):
        for i, name in enumerate(augmentations):
            image_HWC = AUGMENTATIONS[name](image_HWC, jax.random.fold_in(key, i))
        return image_HWC

    return jax.vmap(one)(image_BHWC, key_B)


def color(image_HWC: jax.Array, key: jax.Array) -> jax.Array:
    """Changes brightness by up to ±0.5, saturation times 0 … 2, contrast times 0.5 … 1.5."""
    brightness, saturation, contrast = jax.random.uniform(key, (3,))
    image_HWC = image_HWC + (brightness - 0.5)
    gray_HW1 = jnp.mean(image_HWC, axis=-1, keepdims=True)
    image_HWC = gray_HW1 + (image_HWC - gray_HW1) * (2 * saturation)
    mean = jnp.mean(image_HWC)
    return mean + (image_HWC - mean) * (contrast + 0.5)


def translation(image_HWC: jax.Array, key: jax.Array) -> jax.Array:
    """Moves the image by up to an eighth of each side and fills with zeros."""
    for axis, axis_key in enumerate(jax.random.split(key)):
        size = image_HWC.shape[axis]
        most = round(size * MAX_TRANSLATION)
        shift = jax.random.randint(axis_key, (), -most, most + 1)
        # A matrix product gives the same result on any mesh, and its gradient is also one.
        position = jnp.arange(size)
        from_to = (position[:, None] + shift == position[None]).astype(image_HWC.dtype)
        image_HWC = jnp.moveaxis(
            jnp.tensordot(from_to, image_HWC, ((0,), (axis,)), precision="highest"), 0, axis
        )
    return image_HWC


def cutout(image_HWC: jax.Array, key: jax.Array) -> jax.Array:
    """Sets a rectangle of a fifth of each side, centered anywhere, to zero."""
    inside = []
    for axis, axis_key in enumerate(jax.random.split(key)):
        size = image_HWC.shape[axis]
        side = round(size * CUTOUT_SIDE)
        start = jax.random.randint(axis_key, (), 0, size) - side // 2
        position = jnp.arange(size)
        inside.append((position >= start) & (position < start + side))
    return jnp.where((inside[0][:, None] & inside[1][None])[..., None], 0, image_HWC)


AUGMENTATIONS = {"color": color, "translation": translation, "cutout": cutout}
