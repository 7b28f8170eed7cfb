"""Redraws parts of an image, in several variations, without further training.

varjax edit --weights=weights/d16 --image=photo.png --box=64,64,192,192 --out=edit.png
varjax edit --weights=weights/d16 --image=photo.png --mask=mask.png --count=8 --paste

The output shows the original, the redrawn parts in red, and the results. Options that you leave out
take the model's default values.
"""

import argparse
import dataclasses
import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from tqdm import tqdm

from varjax.cli.sample import add_sampling_flags, check_sampling_flags, companions
from varjax.errors import InputError
from varjax.models import load, option_classes
from varjax.runtime.commands import command_parser, run_command
from varjax.runtime.compilation_cache import use_compilation_cache
from varjax.sampling.batch_size import choose_batch_size
from varjax.sampling.edit_masks import box_mask, read_mask, read_mask_weights
from varjax.sampling.outputs import check_finite_images, check_out, check_out_holds, file_suffix
from varjax.sampling.paste import paste
from varjax.sampling.sampler import Sampler, given_options
from varjax.storage import image_io

Mode = Literal["inpaint", "outpaint", "class"]


def edit_image(arguments: list[str]) -> None:
    """Reads the command line, edits and writes one picture.

    Raises InputError, before any long work, if the request is invalid.
    """
    flags = _parser().parse_args(arguments)
    check_sampling_flags(flags)
    _check_combination(flags)
    picture = image_io.open_image(flags.image)
    model = load(flags.weights, flags.dtype, **companions(flags))
    options = model.options(**given_options(flags, option_classes()))
    shape = model.image_shape
    check_label(flags.label, model.classes)
    check_out_holds(flags.out, flags.count + 2, shape)
    image_HWC = image_io.resize_and_crop(picture, shape)
    finest = model.edit_shape
    if flags.box is not None:
        redraw_hw = box_mask(flags.box, shape[:2], finest)
        redraw_hw = ~redraw_hw if flags.mode == "outpaint" else redraw_hw
        if not redraw_hw.any():
            raise InputError(f"box={flags.box} covers everything: nothing is left to draw")
    else:
        redraw_hw = read_mask(flags.mask, picture.size, shape[:2], finest)
    note_crop(flags.image, picture, shape)
    redraw_HW = redraw_hw
    if flags.mask is not None and flags.paste is not None:
        redraw_HW = read_mask_weights(flags.mask, picture.size, shape[:2])

    def draw(label_B, index_B):
        results_BHWC = model.edit(
            image_HWC[None],
            ~redraw_hw,
            label_B,
            flags.seed,
            index=index_B,
            **dataclasses.asdict(options),
        )
        if flags.paste is None:
            return results_BHWC
        return paste(
            image_HWC[None], results_BHWC, redraw_HW, None if flags.paste < 0 else flags.paste
        )

    results_NHWC = draw_results(model, flags, options, draw)
    image_io.write_png(flags.out, side_by_side(image_HWC, redraw_hw, results_NHWC))
    print(f"{flags.out}: original, redrawn parts (red), {flags.count} results")


def draw_results(
    model: Sampler,
    flags: argparse.Namespace,
    options: Any,
    draw: Callable[[np.ndarray, np.ndarray], Any],
) -> np.ndarray:
    """Draws --count results, as many at a time as fit in memory.

    Args:
        model: the model that draws.
        flags: flags of the command.
        options: sampling options of the model.
        draw: (labels (B,), numbers of the results (B,)) -> images (B, H, W, channels).

    Returns:
        (count, H, W, channels) uint8.

    Raises:
        InputError: NaN in a result.
    """
    label = model.classes if flags.label is None else flags.label
    batch_size = choose_batch_size(flags.batch_size, model, options, flags.count)
    batch = min(flags.count, batch_size * len(model.devices))
    results = []
    for start in tqdm(range(0, flags.count, batch), "drawing", unit="batch"):
        index_B, label_B = np.arange(start, start + batch), np.full(batch, label)
        # The last batch has the others' size: what it draws beyond --count is not looked at.
        images_BHWC = np.asarray(draw(label_B, index_B))[: flags.count - start]
        check_finite_images(
            images_BHWC, index_B, label_B, flags.seed, lambda: model.advise_on_nan(options)
        )
        results.append(image_io.to_uint8(images_BHWC))
    return np.concatenate(results)


def model_with_scales(model: Any, method: str) -> Any:
    """Returns a model that has the method `vary` or `upscale`, by name; raises InputError else."""
    if not hasattr(model, method):
        raise InputError(f"only a model that draws scale by scale (VAR) can {method} an image")
    return model


def check_label(label: int | None, classes: int) -> None:
    """Raises InputError for a --label that is not a class."""
    if label is not None and not 0 <= label < classes:
        raise InputError(f"label={label}: allowed are 0 … {classes - 1}")


def check_picture_out(out: str) -> None:
    """Raises InputError unless the output is one picture, FILE.png, that can be written."""
    if file_suffix(out) != ".png":
        raise InputError(f"out={out}: the results are one picture; give FILE.png")
    check_out(out)


def note_crop(path: str, picture: Image.Image, shape: tuple[int, int, int]) -> None:
    """Prints how a picture of another size becomes an image of the model's shape."""
    if picture.size != (shape[1], shape[0]):
        print(
            f"{path}: {picture.width}x{picture.height} pixels, resized (shorter side) and "
            f"center-cropped to {shape[1]}x{shape[0]}"
        )


def side_by_side(
    image_HWC: np.ndarray, redraw_hw: np.ndarray, results_NHWC: np.ndarray
) -> np.ndarray:
    """Returns one picture: the image, the image with redrawn parts in red, and the results.

    Args:
        image_HWC: uint8, gray or RGB.
        redraw_hw: bool, True where tokens are redrawn; each entry covers a whole number of pixels.
        results_NHWC: uint8, of the image's size.

    Returns:
        (height, width, 3) uint8.
    """
    H, W, _ = image_HWC.shape
    h, w = redraw_hw.shape
    redraw_HW1 = redraw_hw.repeat(H // h, axis=0).repeat(W // w, axis=1)[..., None]
    red_HW3 = (np.broadcast_to(image_HWC, (H, W, 3)) // 2) + np.array([127, 0, 0], np.uint8)
    images = [image_HWC, np.where(redraw_HW1, red_HW3, image_HWC), *results_NHWC]
    images_NHWC = np.stack([np.broadcast_to(image, (H, W, 3)) for image in images])
    return image_io.image_grid(images_NHWC, columns=min(len(images), 10))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("varjax edit", __doc__)
    add = parser.add_argument
    add("--image", required=True, help="image file; resized and center-cropped for the model")
    add(
        "--box",
        help="y0,x0,y1,x1 in pixels of the cropped image, or, if none is above 1, in fractions of "
        "its height and width; rounded to whole tokens",
    )
    add("--mask", help="replaces --box: an image of the same size, white where to redraw")
    add(
        "--mode",
        choices=get_args(Mode),
        default="inpaint",
        help="inpaint redraws the inside of the box (the default), outpaint everything else; class "
        "redraws the inside as --label",
    )
    add(
        "--paste",
        type=int,
        nargs="?",
        const=-1,
        metavar="PIXELS",
        help="keep the original's pixels outside of the redrawn parts, which fade in over this "
        "many pixels (without a number: 1/64 of the height); gray parts of --mask blend",
    )
    add("--label", type=int, help="class to draw (default: no class)")
    add_sampling_flags(parser, "edit.png", "output, FILE.png (edit.png)")
    return parser


def _check_combination(flags: argparse.Namespace) -> None:
    if (flags.box is None) == (flags.mask is None):
        raise InputError("say where to draw: either --box=y0,x0,y1,x1 or --mask=FILE.png")
    if flags.mask is not None and flags.mode == "outpaint":
        raise InputError("mode=outpaint needs a --box; in a --mask, paint white what to redraw")
    if flags.mode == "class" and flags.label is None:
        raise InputError("mode=class needs --label: the class that the inside of the box becomes")
    if flags.paste is not None and flags.paste < -1:
        raise InputError(f"paste={flags.paste}: give a number of pixels, 0 or more")
    check_picture_out(flags.out)


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs internal details
    use_compilation_cache()
    return run_command("varjax edit", lambda: edit_image(arguments))
