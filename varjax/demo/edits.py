"""Edits a picture as a page asks: parts of it, its class, its details."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from varjax.cli.edit import original_and_redrawn
from varjax.cli.upscale import small_size
from varjax.config.numbers import seed_number, whole_number
from varjax.demo.drawing import (
    MODEL_LOCK,
    MOST_IMAGES,
    DemoModel,
    check_image_count,
    part_size,
    static_options,
)
from varjax.errors import InputError
from varjax.sampling.edit_masks import white_tokens
from varjax.sampling.outputs import check_finite_images
from varjax.sampling.paste import paste
from varjax.storage import image_io
from varjax.storage.buckets import as_path

MASKED = ("in-paint", "out-paint", "change class")  # modes that redraw painted parts, or the others
SCALED = ("vary", "upscale")  # modes that keep the first scales, of models that have scales
LEAST_SIDE = 4  # pixels of an upload


@dataclasses.dataclass(frozen=True)
class PageEdit:
    """Holds a request to edit a picture, checked.

    Attributes:
        model: model that draws.
        mode: one of MASKED and SCALED.
        image_HWC: picture that the results start from, uint8; smaller than the model's to upscale.
        redraw_hw: tokens that are drawn; None to vary and upscale.
        label: class to draw; the number of classes means "no class".
        count: number of results.
        seed: random seed of all results.
        options: sampling options of the model, a frozen dataclass.
        keep_scales: number of scales to keep; only to vary.
        paste: whether the other pixels are the original's.
    """

    model: DemoModel
    mode: str
    image_HWC: np.ndarray
    redraw_hw: np.ndarray | None
    label: int
    count: int
    seed: int
    options: Any
    keep_scales: int
    paste: bool

    @property
    def program(self) -> tuple[Any, ...]:
        """Returns what the compiled program depends on, so that an equal one is not compiled."""
        size = part_size(self.model.sampler, self.options, self.count)
        kind = self.mode if self.mode in SCALED else "edit"
        shape, options = self.image_HWC.shape, static_options(self.options)
        return kind, self.model.location, size, shape, options

    def shown(self) -> dict[str, np.ndarray]:
        """Returns what the results are shown with, by name: the original, and what is redrawn."""
        if self.redraw_hw is None:
            return {"the picture": self.image_HWC}
        original_HW3, red_HW3 = original_and_redrawn(self.image_HWC, self.redraw_hw)
        return {"original": original_HW3, "redrawn parts": red_HW3}


def checked_page_edit(
    model: DemoModel,
    mode: str,
    picture: Image.Image | None,
    painted_HW: np.ndarray | None,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
) -> PageEdit:
    """Checks a request to edit a picture.

    Args:
        model: model that draws.
        mode: one of MASKED and SCALED.
        picture: picture to edit, of any size; None if there is none yet.
        painted_HW: whether each pixel of the model's image size is painted.
        settings: "label", "count", "seed", "keep_scales" and "paste".
        options: sampling options to replace, by name.

    Raises:
        InputError: there is no picture, nothing is painted, a number is out of range, or the model
            does not have the mode.
    """
    sampler = model.sampler
    if mode in SCALED and not model.keeps_scales:
        raise InputError(
            f"only a model that draws scale by scale (VAR) can {mode} an image, and "
            f"{model.location} does not; choose another model"
        )
    if picture is None:
        raise InputError("there is no picture yet: upload one, or take a drawn one")
    chosen = sampler.options(**options)
    count = whole_number("count", settings["count"], 1, MOST_IMAGES)
    check_image_count(sampler, chosen, count, f"count={count}")
    label = settings["label"]
    label = sampler.classes if label is None else whole_number("class", label, 0, sampler.classes)
    image_HWC = image_io.resize_and_crop(picture, sampler.image_shape)
    redraw_hw = None
    if mode == "upscale":
        H, W, channels = sampler.image_shape
        size = small_size(picture.size, (H, W))
        image_HWC = image_io.resize_and_crop(picture, (*size, channels))
    elif mode in MASKED:
        if painted_HW is None or not painted_HW.any():
            raise InputError("nothing is painted: paint over the parts to redraw, or to keep")
        if mode == "change class" and label == sampler.classes:
            raise InputError("choose the class that the painted parts become")
        painted_hw = white_tokens(painted_HW.astype(np.float32), sampler.edit_shape)
        if not painted_hw.any():
            (H, W, _), (h, w) = sampler.image_shape, sampler.edit_shape
            raise InputError(
                f"no token ({W // w}x{H // h} pixels) is painted by more than half: paint a larger "
                "part"
            )
        redraw_hw = ~painted_hw if mode == "out-paint" else painted_hw
        if not redraw_hw.any():
            raise InputError("everything is painted: nothing is left to draw outside")
    return PageEdit(
        model,
        mode,
        image_HWC,
        redraw_hw,
        label,
        count,
        seed_number("seed", settings["seed"]),
        chosen,
        int(settings["keep_scales"]),
        bool(settings["paste"]),
    )


def edit_parts(edit: PageEdit) -> Iterator[tuple[np.ndarray, float]]:
    """Draws results, some at a time, until all are drawn or the caller stops iterating.

    Yields:
        The next results after every step, (n, S, H, W, channels) uint8, and the seconds that they
        took.

    Raises:
        InputError: NaN in a result.
    """
    sampler = edit.model.sampler
    size = part_size(sampler, edit.options, edit.count) * len(sampler.devices)
    settings = dataclasses.asdict(edit.options) | {"seed": edit.seed, "every_step": True}
    for first in range(0, edit.count, size):
        with MODEL_LOCK:
            start = time.perf_counter()
            index_B, label_B = np.arange(first, first + size), np.full(size, edit.label)
            settings |= {"labels": label_B, "index": index_B}
            if edit.mode == "vary":
                images = sampler.vary(edit.image_HWC[None], edit.keep_scales, **settings)
            elif edit.mode == "upscale":
                images = sampler.upscale(edit.image_HWC[None], **settings)
            else:
                assert edit.redraw_hw is not None
                images = sampler.edit(edit.image_HWC[None], ~edit.redraw_hw, **settings)
            # The last part has the others' size: what it draws beyond `count` is not looked at.
            images_SBHWC = np.asarray(images)[:, : edit.count - first]
            if edit.paste and edit.redraw_hw is not None:
                original, redraw_hw = edit.image_HWC[None], edit.redraw_hw
                images_SBHWC = np.stack([paste(original, x, redraw_hw) for x in images_SBHWC])
            images_BSHWC = np.moveaxis(images_SBHWC, 1, 0)
            check_finite_images(
                images_BSHWC,
                index_B,
                label_B,
                edit.seed,
                lambda: sampler.advise_on_nan(edit.options),
            )
            seconds = time.perf_counter() - start
        yield image_io.to_uint8(images_BSHWC), seconds


def read_upload(path: str) -> tuple[Image.Image, str]:
    """Reads a picture that somebody uploads.

    Returns:
        The picture as 8-bit gray or RGB, and sentences about what was changed; "" for nothing.

    Raises:
        InputError: the file is no picture, or too small or too large.
    """
    name = as_path(path).name
    try:
        picture = image_io.open_image(path)
    except InputError as error:
        raise InputError(str(error).replace(str(path), name)) from error
    if min(picture.size) < LEAST_SIDE:
        raise InputError(
            f"{name} has {picture.width}x{picture.height} pixels; upload a picture of "
            f"{LEAST_SIDE}x{LEAST_SIDE} or more"
        )
    frames = image_io.frame_count(path)
    with Image.open(path) as original:
        # Pillow's mode has the bits of gray images alone, its raw mode has those of colors, too.
        raw_modes = [str(tile[3]) for tile in original.tile]
        deep = original.mode.startswith("I") or any(";16" in raw for raw in raw_modes)
        changes = {
            f"Only the first of its {frames} frames is used.": frames > 1,
            "Its transparent parts are white.": original.has_transparency_data,
            "Its 16 bits per channel become 8.": deep,
        }
    return picture, " ".join(text for text, changed in changes.items() if changed)


def kept_picture(picture: Image.Image, shape: tuple[int, int, int]) -> Image.Image:
    """Returns what the page keeps of a picture: the part that models see, or the whole if smaller.

    A smaller one stays as it is, because upscaling starts from its own pixels.

    Args:
        picture: picture of any size.
        shape: (H, W, channels) of the models' images.
    """
    H, W, channels = shape
    if picture.width < W or picture.height < H:
        return picture
    image_HWC = image_io.resize_and_crop(picture, shape)
    return Image.fromarray(image_HWC[..., 0] if channels == 1 else image_HWC)
