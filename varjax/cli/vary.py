"""Draws variations of an image: VAR keeps its first scales and draws the finer ones.

varjax vary --weights=weights/d16 --image=photo.png --keep_scales=5 --out=variations.png

The output shows the original and the results. Options that you leave out take the model's default
values.
"""

import dataclasses
import logging

import numpy as np

from varjax.cli.edit import (
    check_label,
    check_picture_out,
    draw_results,
    model_with_scales,
    note_crop,
)
from varjax.cli.sample import add_sampling_flags, check_sampling_flags, companions
from varjax.models import load, option_classes
from varjax.runtime.commands import command_parser, run_command
from varjax.runtime.compilation_cache import use_compilation_cache
from varjax.sampling.outputs import check_out_holds
from varjax.sampling.sampler import given_options
from varjax.storage import image_io


def vary_image(arguments: list[str]) -> None:
    """Reads the command line, draws variations and writes one picture.

    Raises InputError, before any long work, if the request is invalid.
    """
    parser = command_parser("varjax vary", __doc__)
    add = parser.add_argument
    add("--image", required=True, help="image file; resized and center-cropped for the model")
    about = "number of scales to keep, from the coarsest; the more, the closer the results"
    add("--keep_scales", type=int, required=True, help=about)
    add("--label", type=int, help="class to draw (default: no class)")
    add_sampling_flags(parser, "variations.png", "output, FILE.png (variations.png)")
    flags = parser.parse_args(arguments)
    check_sampling_flags(flags)
    check_picture_out(flags.out)
    picture = image_io.open_image(flags.image)
    model = model_with_scales(load(flags.weights, flags.dtype, **companions(flags)), "vary")
    options = model.options(**given_options(flags, option_classes()))
    check_label(flags.label, model.classes)
    check_out_holds(flags.out, flags.count + 1, model.image_shape)
    note_crop(flags.image, picture, model.image_shape)
    image_HWC = image_io.resize_and_crop(picture, model.image_shape)

    def draw(label_B, index_B):
        return model.vary(
            image_HWC[None],
            flags.keep_scales,
            label_B,
            flags.seed,
            index=index_B,
            **dataclasses.asdict(options),
        )

    results_NHWC = draw_results(model, flags, options, draw)
    images_NHWC = np.concatenate([image_HWC[None], results_NHWC])
    image_io.write_png(flags.out, image_io.image_grid(images_NHWC, min(len(images_NHWC), 10)))
    print(f"{flags.out}: original, {flags.count} results with its first {flags.keep_scales} scales")


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs internal details
    use_compilation_cache()
    return run_command("varjax vary", lambda: vary_image(arguments))
