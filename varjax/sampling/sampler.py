"""The contract between a model family and everything that draws images with it."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np


class Sampler(Protocol):
    """Draws images from labels; grids, folders, resuming and many devices are built on top of it.

    Attributes:
        classes: number of classes; the label `classes` itself means "no class".
        image_shape: (H, W, channels) of an image.
        edit_shape: (h, w) of the map on which an edit says what to keep.
        devices: the devices that share out a batch.
    """

    @property
    def classes(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def edit_shape(self) -> tuple[int, int]: ...

    @property
    def devices(self) -> tuple[Any, ...]: ...

    def options(self, **given: Any) -> Any:
        """Returns the model's own sampling options, a frozen dataclass, with `given` replaced.

        Raises InputError for a value out of range.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """Returns all that images depend on besides labels, seed and options, as JSON data."""
        ...

    def sample(
        self,
        labels: Any,
        seed: int = 0,
        *,
        index: Sequence[int] | np.ndarray | None = None,
        **options: Any,
    ) -> jax.Array:
        """Draws one image for each label: (B, H, W, channels) float32 in [0, 1].

        Args:
            labels: (B,) classes.
            seed: image i is a function of (seed, index[i], label, options) alone.
            index: (B,) numbers of the images; None for 0 … B-1.
            options: fields of `options()` to replace.
        """
        ...

    def edit(
        self,
        images_BHWC: Any,
        keep: np.ndarray,
        labels: Any = None,
        seed: int = 0,
        *,
        index: Sequence[int] | np.ndarray | None = None,
        **options: Any,
    ) -> jax.Array:
        """Draws everything outside of `keep` anew; the rest as in `sample`.

        Args:
            images_BHWC: uint8, or float in [0, 1]; one image, or one for each of `index`.
            keep: (h, w) or (B, h, w) bool on a map of `edit_shape`.
            labels: (B,) classes; None for no class.
        """
        ...
