"""Draws variations of an image: VAR keeps its first scales and draws the finer ones.

varjax vary --weights=weights/d16 --image=photo.png --keep_scales=5 --out=variations.png

The output shows the original and the results. Options that you leave out take the model's default
values.
"""

from varjax.cli.pictures import (
    add_picture_flags,
    draw_results,
    note_crop,
    open_request,
    write_results,
)
from varjax.runtime.commands import command_parser, run_command
from varjax.storage import image_io


def vary_image(arguments: list[str]) -> None:
    """Reads the command line, draws variations and writes one picture.

    Raises InputError, before any long work, if the request is invalid.
    """
    parser = command_parser("varjax vary", __doc__)
    about = "number of scales to keep, from the coarsest; the more, the closer the results"
    parser.add_argument("--keep_scales", type=int, required=True, help=about)
    image_help = "image file; resized and center-cropped for the model"
    add_picture_flags(parser, image_help, "variations.png")
    flags = parser.parse_args(arguments)
    request = open_request(flags, "vary", arguments, others=1)
    model = request.model
    note_crop(request)
    image_HWC = image_io.resize_and_crop(request.picture, model.image_shape)

    def draw(label_B, **settings):
        return model.vary(image_HWC[None], flags.keep_scales, label_B, **settings)

    results = draw_results(request, draw)
    about = f"original, {flags.count} results with its first {flags.keep_scales} scales"
    write_results(request, {"original": image_HWC}, results, about)


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    return run_command("varjax vary", lambda: vary_image(arguments))
