"""Code shared by `varjax edit`, `vary` and `upscale`, which start from a picture."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from varjax.checkpoints.class_names import ClassNames
from varjax.cli.captions import class_titles, picture_title
from varjax.cli.sample import (
    add_every_step_flag,
    add_sampling_flags,
    check_sampling_flags,
    choose_labels,
    companions,
    shows_every_step,
)
from varjax.errors import InputError
from varjax.models import family_of, load, open_model, option_classes
from varjax.runtime.compilation_cache import use_compilation_cache
from varjax.runtime.first_call import FirstCall, announce_compilation
from varjax.sampling.batch_size import choose_batch_size
from varjax.sampling.grid_output import PictureWords, name_in_title
from varjax.sampling.guidance import check_guide_is_used
from varjax.sampling.outputs import (
    FILM_SUFFIXES,
    check_finite_images,
    check_out,
    check_out_holds,
    file_suffix,
    open_output,
)
from varjax.sampling.sampler import given_options
from varjax.storage import image_io
from varjax.storage.buckets import as_path, in_bucket
from varjax.storage.picture_text import command_text

COLUMNS = 10  # at most, of the output


@dataclasses.dataclass(frozen=True)
class PictureRequest:
    """Holds the validated inputs of a command.

    Attributes:
        flags: flags of the command.
        picture: picture that the command starts from, as it was read.
        model: model that draws.
        options: sampling options of the model.
        label: class to draw, or a mix of classes as text.
        every_step: whether the output shows the results after every scale or step.
        command: name and arguments of the command, which the output carries as text.
    """

    flags: argparse.Namespace
    picture: Image.Image
    model: Any  # a `Sampler`; of families that keep scales, with `vary` and `upscale`
    options: Any
    label: int | str
    every_step: bool
    command: tuple[str, tuple[str, ...]]


def add_picture_flags(parser: argparse.ArgumentParser, image_help: str, out: str) -> None:
    """Adds the flags that these commands share.

    Args:
        parser: parser of the command, which gets the flags.
        image_help: help text of --image.
        out: default value of --out.
    """
    parser.add_argument("--image", required=True, help=image_help)
    about = "class to draw, by number or name, or a mix: 207:0.5+980:0.5 (default: no class)"
    parser.add_argument("--label", help=about)
    add_every_step_flag(parser)
    # Refused with advice; without this, it would be an unknown flag.
    parser.add_argument("--accept", help=argparse.SUPPRESS)
    add_sampling_flags(parser, out, f"FILE.png, or an animation: FILE.gif or FILE.webp ({out})")


def open_request(
    flags: argparse.Namespace, command: str, arguments: Sequence[str], others: int
) -> PictureRequest:
    """Checks the flags that these commands share, and reads the picture and the model.

    Args:
        flags: flags of the command.
        command: name of the command, which is a method of the models that it works with.
        arguments: command line, from which the flags were read.
        others: number of pictures that the output shows in addition to the results.

    Raises:
        InputError: a flag out of range, an output that would overwrite an input, no such picture or
            model, or a model that cannot do this.
    """
    check_sampling_flags(flags)
    if flags.accept is not None:
        raise InputError(
            f"accept={flags.accept}: varjax sample alone has a classifier choose; raise --count, "
            "and choose by eye"
        )
    if file_suffix(flags.out) not in (".png", *FILM_SUFFIXES):
        raise InputError(
            f"out={flags.out}: the results are one picture; give FILE.png, or for an animation "
            "FILE.gif or FILE.webp"
        )
    check_out(flags.out)
    for name in ("image", "mask"):  # only edits have a mask
        if (source := getattr(flags, name, None)) and _same_file(source, flags.out):
            raise InputError(
                f"out={flags.out} is also the {name}, which would be overwritten; give another out"
            )
    picture = image_io.open_image(flags.image)
    use_compilation_cache()
    weights = open_model(flags.weights)
    if command != "edit" and not family_of(weights).keeps_scales:
        raise InputError(f"only a model that draws scale by scale (VAR) can {command} an image")
    model = load(weights, flags.dtype, **companions(flags))
    options = model.options(**given_options(flags, option_classes()))
    check_guide_is_used(flags.guide, [options])
    label = model.classes if flags.label is None else _only_label(flags.label, model.labels)
    every_step = shows_every_step(flags)
    steps = model.steps(options) if every_step else None
    images = flags.count + others
    check_out_holds(flags.out, images, model.image_shape, steps, min(COLUMNS, images))
    return PictureRequest(
        flags, picture, model, options, label, every_step, (command, tuple(arguments))
    )


def note_crop(request: PictureRequest) -> None:
    """Prints how a picture of another size becomes an image of the model's shape."""
    picture, (H, W, _) = request.picture, request.model.image_shape
    if picture.size != (W, H):
        print(
            f"{request.flags.image}: {picture.width}x{picture.height} pixels, resized (shorter "
            f"side) and center-cropped to {W}x{H}"
        )


def draw_results(request: PictureRequest, draw: Callable[..., Any]) -> np.ndarray:
    """Draws --count results, as many at a time as fit in memory.

    Args:
        request: the request, whose flags say how many results to draw.
        draw: (labels (B,), seed, index, options by name) -> images (B, H, W, channels), or with
            `every_step` (S, B, H, W, channels).

    Returns:
        (count, H, W, channels) uint8, or with `every_step` (count, S, H, W, channels).

    Raises:
        InputError: NaN in a result.
    """
    flags, model, options = request.flags, request.model, request.options
    batch_size = choose_batch_size(flags.batch_size, model, options, flags.count)
    batch = min(flags.count, batch_size * len(model.devices))
    settings = dataclasses.asdict(options) | {"seed": flags.seed}
    settings |= {"every_step": True} if request.every_step else {}
    draw = FirstCall(draw, lambda: announce_compilation("the sampler"))
    results = []
    for start in tqdm(range(0, flags.count, batch), "drawing", unit="batch"):
        index_B, label_B = np.arange(start, start + batch), np.full(batch, request.label)
        images = np.asarray(draw(label_B, index=index_B, **settings))
        images = np.moveaxis(images, 1, 0) if request.every_step else images
        # The last batch has the others' size: what it draws beyond --count is not looked at.
        images = images[: flags.count - start]
        check_finite_images(
            images, index_B, label_B, flags.seed, lambda: model.advise_on_nan(options)
        )
        results.append(image_io.to_uint8(images))
    return np.concatenate(results)


def write_results(
    request: PictureRequest, shown: Mapping[str, np.ndarray], results: np.ndarray, about: str
) -> None:
    """Writes the output, and prints a line about it.

    Args:
        request: the request, whose flags name the output.
        shown: uint8 images (H, W, channels) that are shown before the results, except in a strip,
            by name.
        results: results, from `draw_results`.
        about: what a picture or an animation shows.
    """
    columns, out = min(COLUMNS, len(shown) + len(results)), request.flags.out
    strip = request.every_step and file_suffix(out) == ".png"
    names = [f"result {number + 1}" for number in range(len(results))]
    if not strip:
        images = np.stack([*shown.values()])
        if request.every_step:
            images = np.repeat(images[:, None], results.shape[1], axis=1)
        channels = max(images.shape[-1], results.shape[-1])
        both = [np.broadcast_to(x, (*x.shape[:-1], channels)) for x in (images, results)]
        results, names = np.concatenate(both), [*shown, *names]
    output = open_output(
        out, np.zeros(len(results)), columns, 0, {}, request.every_step, _words(request, names)
    )
    output.begin(write=True)
    output.add(range(len(results)), results)
    message = output.finish()
    print(message if strip else f"{out}: {about}")


def _same_file(a: str, b: str) -> bool:
    """Returns whether two locations name the same file, perhaps through a link."""
    paths = as_path(a), as_path(b)
    if any(map(in_bucket, paths)):
        return paths[0] == paths[1]
    try:
        return paths[0].samefile(paths[1])
    except OSError:  # one does not exist
        return False


def _words(request: PictureRequest, names: Sequence[str]) -> PictureWords:
    """Returns the words of the output, whose images have these names."""
    flags, model, (command, arguments) = request.flags, request.model, request.command
    label = class_titles([request.label], model.labels)[0]
    title = f"{command}: {picture_title(flags, request.options)} · {name_in_title(label)}"
    settings = {"label": request.label, "count": flags.count, "seed": flags.seed}
    settings |= dataclasses.asdict(request.options) | model.identity()
    return PictureWords(title, names, command_text(f"varjax {command}", arguments, settings))


def _only_label(text: str, names: ClassNames) -> int | str:
    """Returns the one class that --label names."""
    labels = choose_labels(text, names)
    if len(labels) != 1:
        raise InputError(f"label={text}: give one class, or a mix such as 207:0.5+980:0.5")
    return labels[0]
