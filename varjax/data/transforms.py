"""Resizes, crops and distorts NumPy images, at random by an explicit Generator."""

import math
from typing import Any, Literal, Protocol, get_args

import numpy as np
from PIL import Image

from varjax.errors import InputError, check_setting
from varjax.storage.image_io import resized_part

Crop = Literal["random", "center"]  # VAR's recipe for photographs, or ADM's, which MAR uses
RESIZE_RATIO = 1.125  # size of the resized image, divided by the crop's


class Photographs(Protocol):
    """Names the settings of a dataset of photographs of any size.

    Its class takes the functions below as methods, `augment = augment_photograph`.
    """

    @property
    def size(self) -> int | tuple[int, int]: ...
    @property
    def channels(self) -> int: ...
    @property
    def crop(self) -> Crop: ...
    @property
    def flip(self) -> bool: ...


def check_photographs(data: Photographs) -> None:
    """Raises InputError for a size, a number of channels or a crop that does not exist."""
    check_image_size(data.size, data.channels)
    check_setting("crop", data.crop, data.crop in get_args(Crop), " or ".join(get_args(Crop)))


def photograph_views(data: Photographs) -> int:
    """Returns the number of views that `augment_photograph` alternates between."""
    return 2 if data.flip and data.crop == "center" else 1


def augment_photograph(
    data: Photographs, image_HWC: np.ndarray, view: int, rng: np.random.Generator
) -> np.ndarray:
    """Augments a photograph as VAR ("random") or as MAR ("center") does.

    Center crops are mirrored in every second view, not at random, so that two views are exactly the
    two orientations of an image. A cache of latents needs no other views.

    Args:
        data: dataset, which sets the size, the kind of crop and whether half of the views are
            mirrored left to right.
        image_HWC: uint8 with 1, 3 or 4 channels.
        view: index of the view, see `varjax.data.stream.ImageDataset.augment`.
        rng: random generator; random crops draw three numbers from it, center crops none.
    """
    size = height_width(data.size)
    if data.crop == "random":
        return random_crop(image_HWC, rng, size, data.flip)
    return _mirrored(adm_center_crop(image_HWC, size), data.flip and view % 2 == 1)


def crop_photograph(data: Photographs, image_HWC: np.ndarray) -> np.ndarray:
    """Cuts out the middle of a photograph, resized as by `augment_photograph`."""
    crop = center_crop if data.crop == "random" else adm_center_crop
    return crop(image_HWC, height_width(data.size))


def random_crop(
    image_HWC: np.ndarray, rng: np.random.Generator, size: tuple[int, int], flip: bool = False
) -> np.ndarray:
    """Augments as the reference does: resizes to cover 1.125 × `size`, cuts out a random part.

    Args:
        image_HWC: uint8 with 1, 3 or 4 channels.
        rng: random generator, from which three numbers are always drawn.
        size: (height, width) of the result.
        flip: whether to mirror every second image left to right.
    """
    (h, w), (height, width) = size, _covering(image_HWC.shape, *_resized(size))
    y, x, mirror = rng.random(3)
    top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
    cropped_HWC = _resized_part(image_HWC, (height, width), (top, left), size)
    return _mirrored(cropped_HWC, flip and mirror < 0.5)


def center_crop(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes as for training and cuts out the middle, (height, width) = `size`: for evaluation."""
    (h, w), (height, width) = size, _covering(image_HWC.shape, *_resized(size))
    # Rounds half to even, as the reference's framework does.
    corner = round((height - h) / 2), round((width - w) / 2)
    return np.ascontiguousarray(_resized_part(image_HWC, (height, width), corner, size))


def adm_center_crop(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cuts out the middle as ADM does (Dhariwal and Nichol 2021; `center_crop_arr` in its code).

    Halves by a box filter while the image stays at least as large as `size`, resizes by bicubic
    interpolation until it just covers `size`, and cuts off the rest. ADM's sizes are square; for
    other sizes, both sides are covered.

    Args:
        image_HWC: uint8 with 1, 3 or 4 channels; the fourth is alpha.
        size: (height, width) of the result.
    """
    (h, w), picture = size, _picture(image_HWC)
    while picture.height >= 2 * h and picture.width >= 2 * w:
        half = picture.width // 2, picture.height // 2
        picture = picture.resize(half, Image.Resampling.BOX)
    scale = max(h / picture.height, w / picture.width)
    covering = round(picture.width * scale), round(picture.height * scale)
    left, top = (covering[0] - w) // 2, (covering[1] - h) // 2
    box = left, top, left + w, top + h
    cropped = resized_part(picture, covering, box, Image.Resampling.BICUBIC)
    return np.asarray(cropped).reshape(h, w, image_HWC.shape[-1])


def resize_to_cover(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes by Lanczos, the aspect kept, until the image just covers (height, width).

    For a square, the shorter side gets the wanted size; the longer one is rounded down.

    Args:
        image_HWC: uint8 with 1, 3 or 4 channels; the fourth is alpha.
        height: height to cover, in pixels.
        width: width to cover, in pixels.
    """
    size = _covering(image_HWC.shape, height, width)
    if size == image_HWC.shape[:2]:
        return image_HWC
    return _resized_part(image_HWC, size, (0, 0), size)


def _covering(shape: tuple[int, ...], height: int, width: int) -> tuple[int, int]:
    """Returns the (height, width) at which an image of `shape` just covers a size."""
    H, W, _ = shape
    if height * W >= width * H:
        return height, height * W // H
    return width * H // W, width


def _resized_part(
    image_HWC: np.ndarray, whole: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Returns the part at `corner`, (top, left), of an image resized to `whole` by Lanczos."""
    (top, left), (h, w) = corner, size
    if whole == image_HWC.shape[:2]:
        return image_HWC[top : top + h, left : left + w]
    box = left, top, left + w, top + h
    picture = resized_part(_picture(image_HWC), (whole[1], whole[0]), box, Image.Resampling.LANCZOS)
    return np.asarray(picture).reshape(h, w, image_HWC.shape[-1])


def _picture(image_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC)


def _mirrored(image_HWC: np.ndarray, mirror: bool) -> np.ndarray:
    return np.ascontiguousarray(image_HWC[:, ::-1] if mirror else image_HWC)


def _resized(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    return round(RESIZE_RATIO * height), round(RESIZE_RATIO * width)


def unchanged(data: Any, image_HWC: np.ndarray) -> np.ndarray:
    """Returns the image itself, for a dataset's `preprocess`."""
    return image_HWC


def augment_by_affine(
    data: Any, image_HWC: np.ndarray, view: int, rng: np.random.Generator
) -> np.ndarray:
    """Moves, rotates and scales an image at random in one resampling, each uniform in its range.

    Args:
        data: dataset with the largest shift in pixels, vertically and horizontally, `shift`, the
            largest rotation in degrees, in both directions, `rotate`, and the largest change of
            the scale, `zoom`. If all are 0, the image itself is returned.
        image_HWC: uint8 image of any size.
        view: index of the view, which makes no difference.
        rng: random generator, from which four numbers are drawn if any of these settings is not 0.
    """
    if data.shift == data.rotate == data.zoom == 0:
        return image_HWC
    y, x, turn, scale = rng.uniform(-1, 1, size=4)
    shift = data.shift * y, data.shift * x
    return affine(image_HWC, shift, data.rotate * turn, 1 + data.zoom * scale)


def affine(
    image_HWC: np.ndarray, shift: tuple[float, float], degrees: float, scale: float
) -> np.ndarray:
    """Scales and rotates an image about its center, then moves it, by sharp cubic splines.

    Args:
        image_HWC: uint8 image; everything beyond its border is zero.
        shift: pixels down and right.
        degrees: rotation in degrees, counter-clockwise.
        scale: factor on the size; above 1 enlarges.
    """
    cos, sin = math.cos(math.radians(degrees)) / scale, math.sin(math.radians(degrees)) / scale
    matrix = np.array([[cos, sin], [-sin, cos]])
    center = (np.array(image_HWC.shape[:2]) - 1) / 2
    from scipy import ndimage  # a quarter of a second; sampling imports this module, too

    offset: Any = center - matrix @ (center + np.array(shift))
    channels = [
        # "grid-constant" also interpolates between the border pixels and the zeros around them.
        ndimage.affine_transform(
            image_HWC[..., c].astype(np.float32), matrix, offset, order=3, mode="grid-constant"
        )
        for c in range(image_HWC.shape[-1])
    ]
    return np.rint(np.clip(np.stack(channels, axis=-1), 0, 255)).astype(np.uint8)


def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Converts the size in a config to (height, width) in pixels."""
    return (size, size) if isinstance(size, int) else size


def check_image_size(size: int | tuple[int, int], channels: int) -> None:
    """Raises InputError for an impossible size or number of channels."""
    if min(height_width(size)) < 1:
        raise InputError(f"size is {size}, but must be at least 1 pixel")
    if channels not in (1, 3, 4):
        raise InputError(f"channels is {channels}, but must be 1, 3 or 4 (with alpha)")
