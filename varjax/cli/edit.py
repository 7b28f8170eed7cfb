"""Redraws parts of an image, in several variations, without further training.

varjax edit --weights=weights/d16 --image=photo.png --box=64,64,192,192 --out=edit.png
varjax edit --weights=weights/d16 --image=photo.png --mask=mask.png --count=8 --paste

The output shows the original, the redrawn parts in red, and the results. Options that you leave out
take the model's default values.
"""

import argparse
from typing import Literal, get_args

import numpy as np

from varjax.cli.pictures import (
    PictureRequest,
    add_picture_flags,
    draw_results,
    note_crop,
    open_request,
    write_results,
)
from varjax.errors import InputError
from varjax.runtime.commands import command_parser, run_command
from varjax.sampling.edit_masks import box_mask, mask_tokens, read_mask
from varjax.sampling.paste import paste
from varjax.storage import image_io

Mode = Literal["inpaint", "outpaint", "class"]


def edit_image(arguments: list[str]) -> None:
    """Reads the command line, edits and writes one picture.

    Raises InputError, before any long work, if the request is invalid.
    """
    flags = _parser().parse_args(arguments)
    _check_combination(flags)
    request = open_request(flags, "edit", arguments, others=2)
    model = request.model
    redraw_hw, weight = redrawn_parts(request)
    note_crop(request)
    image_HWC = image_io.resize_and_crop(request.picture, model.image_shape)

    def draw(label_B, **settings):
        results = model.edit(image_HWC[None], ~redraw_hw, label_B, **settings)
        if flags.paste is None:
            return results
        blend = None if flags.paste < 0 else flags.paste
        steps = results if request.every_step else [results]
        pasted = [paste(image_HWC[None], step_BHWC, weight, blend) for step_BHWC in steps]
        return np.stack(pasted) if request.every_step else pasted[0]

    results = draw_results(request, draw)
    original_HW3, red_HW3 = original_and_redrawn(image_HWC, redraw_hw)
    about = f"original, redrawn parts (red), {flags.count} results"
    write_results(request, {"original": original_HW3, "redrawn parts": red_HW3}, results, about)


def redrawn_parts(request: PictureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Returns which tokens (h, w) --box or --mask redraws, and weights of the results for `paste`.

    Raises InputError for a box or a mask that does not fit the picture, or redraws nothing.
    """
    flags, model = request.flags, request.model
    size, finest = model.image_shape[:2], model.edit_shape
    if flags.mask is not None:
        white_HW = read_mask(flags.mask, request.picture.size, size)
        return mask_tokens(white_HW, finest, flags.mask), white_HW
    redraw_hw = box_mask(flags.box, size, finest)
    redraw_hw = ~redraw_hw if flags.mode == "outpaint" else redraw_hw
    if not redraw_hw.any():
        raise InputError(f"box={flags.box} covers everything: nothing is left to draw")
    return redraw_hw, redraw_hw


def original_and_redrawn(
    image_HWC: np.ndarray, redraw_hw: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns an image, and the image with redrawn parts in red, as RGB.

    Args:
        image_HWC: uint8, gray or RGB.
        redraw_hw: bool, True where tokens are redrawn; each entry covers a whole number of pixels.

    Returns:
        Two images (H, W, 3) uint8.
    """
    H, W, _ = image_HWC.shape
    h, w = redraw_hw.shape
    redraw_HW1 = redraw_hw.repeat(H // h, axis=0).repeat(W // w, axis=1)[..., None]
    image_HW3 = np.broadcast_to(image_HWC, (H, W, 3))
    red_HW3 = image_HW3 // 2 + np.array([127, 0, 0], np.uint8)
    return image_HW3, np.where(redraw_HW1, red_HW3, image_HW3)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("varjax edit", __doc__)
    add = parser.add_argument
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
    image_help = "image file; resized and center-cropped for the model"
    add_picture_flags(parser, image_help, "edit.png")
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


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    return run_command("varjax edit", lambda: edit_image(arguments))
