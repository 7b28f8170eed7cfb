"""Enlarges a small picture to the model's size: VAR draws the details (super-resolution).

varjax upscale --weights=weights/d16 --image=small.png --count=4 --out=large.png

The coarse scales come from the picture, the finer ones are drawn. The output shows the picture,
enlarged without a model, and the results.
"""

import dataclasses
import logging

import numpy as np

from varjax.cli.edit import check_label, check_picture_out, draw_results, model_with_scales
from varjax.cli.sample import add_sampling_flags, check_sampling_flags, companions
from varjax.errors import InputError
from varjax.models import load, option_classes
from varjax.runtime.commands import command_parser, run_command
from varjax.runtime.compilation_cache import use_compilation_cache
from varjax.sampling.outputs import check_out_holds
from varjax.sampling.sampler import given_options
from varjax.storage import image_io


def upscale_image(arguments: list[str]) -> None:
    """Reads the command line, enlarges a picture and writes the results as one picture.

    Raises InputError, before any long work, if the request is invalid.
    """
    parser = command_parser("varjax upscale", __doc__)
    add = parser.add_argument
    add("--image", required=True, help="image file, smaller than the model's images")
    about = "number of scales that come from the picture (those that its pixels fill)"
    add("--keep_scales", type=int, help=about)
    add("--label", type=int, help="class to draw (default: no class)")
    add_sampling_flags(parser, "upscaled.png", "output, FILE.png (upscaled.png)")
    flags = parser.parse_args(arguments)
    check_sampling_flags(flags)
    check_picture_out(flags.out)
    picture = image_io.open_image(flags.image)
    model = model_with_scales(load(flags.weights, flags.dtype, **companions(flags)), "upscale")
    options = model.options(**given_options(flags, option_classes()))
    H, W, channels = model.image_shape
    small_shape = small_size(picture.size, (H, W))
    check_label(flags.label, model.classes)
    check_out_holds(flags.out, flags.count + 1, model.image_shape)
    small_HWC = image_io.resize_and_crop(picture, (*small_shape, channels))

    def draw(label_B, index_B):
        return model.upscale(
            small_HWC[None],
            flags.keep_scales,
            label_B,
            flags.seed,
            index=index_B,
            **dataclasses.asdict(options),
        )

    results_NHWC = draw_results(model, flags, options, draw)
    large_HWC = image_io.resize_and_crop(picture, model.image_shape)
    images_NHWC = np.concatenate([large_HWC[None], results_NHWC])
    image_io.write_png(flags.out, image_io.image_grid(images_NHWC, min(len(images_NHWC), 10)))
    print(
        f"{flags.out}: the picture ({small_shape[1]}x{small_shape[0]} pixels), and {flags.count} "
        "results with its coarse scales"
    )


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
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs internal details
    use_compilation_cache()
    return run_command("varjax upscale", lambda: upscale_image(arguments))
