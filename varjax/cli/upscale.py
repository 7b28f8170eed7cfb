"""Enlarges a small picture to the model's size: VAR draws the details (super-resolution).

varjax upscale --weights=weights/d16 --image=small.png --count=4 --out=large.png

The coarse scales come from the picture, the finer ones are drawn. The output shows the picture,
enlarged without a model, and the results.
"""

import numpy as np

from varjax.cli.pictures import add_picture_flags, draw_results, open_request, write_results
from varjax.errors import InputError
from varjax.runtime.commands import command_parser, run_command
from varjax.storage import image_io


def upscale_image(arguments: list[str]) -> None:
    """Reads the command line, enlarges a picture and writes the results as one picture.

    Raises InputError, before any long work, if the request is invalid.
    """
    parser = command_parser("varjax upscale", __doc__)
    about = "number of scales that come from the picture (those that its pixels fill)"
    parser.add_argument("--keep_scales", type=int, help=about)
    image_help = "image file, smaller than the model's images"
    add_picture_flags(parser, image_help, "upscaled.png")
    flags = parser.parse_args(arguments)
    request = open_request(flags, "upscale", arguments, others=1)
    picture, model = request.picture, request.model
    H, W, channels = model.image_shape
    small_shape = small_size(picture.size, (H, W))
    small_HWC = image_io.resize_and_crop(picture, (*small_shape, channels))

    def draw(label_B, **settings):
        return model.upscale(small_HWC[None], flags.keep_scales, label_B, **settings)

    results = draw_results(request, draw)
    large_HWC = image_io.resize_and_crop(picture, model.image_shape)
    about = (
        f"the picture ({small_shape[1]}x{small_shape[0]} pixels), and {flags.count} results with "
        "its coarse scales"
    )
    write_results(request, {"the picture": large_HWC}, results, about)


def small_size(size: tuple[int, int], model_size: tuple[int, int]) -> tuple[int, int]:
    """Returns the size (h, w) of the largest part of a picture with the model's ratio of sides.

    Args:
        size: (width, height) of the picture.
        model_size: (H, W) of the model's images.

    Raises:
        InputError: a picture that is not smaller than the model's images.
    """
    (width, height), (H, W) = size, model_size
    unit_h, unit_w = H // np.gcd(H, W), W // np.gcd(H, W)
    units = min(height // unit_h, width // unit_w)
    h, w = int(units * unit_h), int(units * unit_w)
    if not 0 < h < H:
        raise InputError(
            f"the picture has {width}x{height} pixels; upscaling takes less than the model's "
            f"{W}x{H} (varjax vary draws variations of a larger one)"
        )
    return h, w


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    return run_command("varjax upscale", lambda: upscale_image(arguments))
