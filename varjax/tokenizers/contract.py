"""The contract between a tokenizer and everything that makes or reads its latents."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from varjax import trees
from varjax.errors import InputError
from varjax.nn.compute import EXACT, ComputeConfig
from varjax.storage.image_files import check_pixels
from varjax.trees import PyTree

Latents = Mapping[str, jax.Array]


class Tokenizer(Protocol):
    """Maps images to latents and back: a frozen dataclass of settings with pure methods.

    Parameters are arguments, so that every method can be jitted, and config and parameters can be
    kept apart. The latent cache, the commands and the second stage know tokenizers only through
    this contract; `varjax.models.TOKENIZERS` lists the kinds there are.

        config = VQConfig()
        params = config.init(jax.random.key(0))
        latents = config.encode(params, images_BHWC)  # {"tokens_BL": (B, 680) int32}
        images_BHWC = config.decode(params, latents)
    """

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels) of an image."""
        ...

    @property
    def latent_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and storage dtype of one image's latents, by their names in a batch.

        A name ends in the shape with its leading batch axis: {"tokens_BL": ((L,), uint16)}. In a
        batch integers are int32 and floats float32, regardless of the storage. The first array is
        enough for `decode`.
        """
        ...

    def init(self, key: jax.Array) -> PyTree:
        """Draws untrained parameters, all float32."""
        ...

    def encode(
        self, params: PyTree, images_BHWC: jax.Array, compute: ComputeConfig = EXACT
    ) -> dict[str, jax.Array]:
        """Encodes images into latents that training may read instead of them.

        Args:
            params: parameters in the layout of `init`.
            images_BHWC: uint8, or floats in [0, 1].
            compute: execution settings: `encoder_precision`, and the platform to compile for.

        Returns:
            The arrays of `latent_spec`, each with a leading batch axis, int32 or float32.
        """
        ...

    def decode(self, params: PyTree, latents: Latents, compute: ComputeConfig = EXACT) -> jax.Array:
        """Decodes what `encode` returns into images (B, H, W, channels), float32 in [0, 1].

        Args:
            params: parameters in the layout of `init`.
            latents: arrays of `latent_spec`, of which only the first is required.
            compute: dtype of the decoder, and the platform to compile for.
        """
        ...

    def identity(self, params: PyTree) -> dict[str, Any]:
        """Returns flat JSON data that identifies this tokenizer and its weights."""
        ...


def checked_images(
    images_BHWC: np.ndarray | jax.Array, image_shape: tuple[int, int, int]
) -> jax.Array:
    """Returns images that a tokenizer may encode, as uint8 or float32.

    Raises InputError for images of another shape, type or range.
    """
    trees.refuse_tracers(images_BHWC)
    images_BHWC = jnp.asarray(images_BHWC)
    if images_BHWC.ndim != 4 or images_BHWC.shape[1:] != image_shape:
        raise InputError(f"images have shape {images_BHWC.shape}; needed is (B, *{image_shape})")
    if not len(images_BHWC):
        raise InputError("there are no images; give one or more")
    check_pixels(images_BHWC)
    return images_BHWC if images_BHWC.dtype == jnp.uint8 else images_BHWC.astype(jnp.float32)


def check_image_shape(tokenizer: Tokenizer, image_shape: tuple[int, int, int]) -> None:
    """Raises InputError where a tokenizer does not take images (H, W, channels)."""
    if tuple(image_shape) != tokenizer.image_shape:
        raise InputError(
            f"the data's images are {tuple(image_shape)}, but the tokenizer takes "
            f"{tokenizer.image_shape} (height, width, channels); change the data, or the "
            "tokenizer's settings"
        )
