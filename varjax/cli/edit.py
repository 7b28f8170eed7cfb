"""The command line of sample.py edit: parts of an image drawn anew, without further training."""

import dataclasses
from typing import Literal, get_args

import numpy as np
from tqdm import tqdm

from varjax.cli.sample import Common, common_parser, read_request
from varjax.core import image_io
from varjax.core.errors import InputError
from varjax.sampling.masks import box_mask, read_mask
from varjax.sampling.outputs import check_out
from varjax.var.load import load

Mode = Literal["inpaint", "outpaint", "class"]


@dataclasses.dataclass(frozen=True)
class EditRequest(Common):
    """`count` variations of an image; `box` or `mask` says where, `mode` what is done there."""

    image: str
    box: str | None
    mask: str | None
    mode: Mode
    label: int | None


def parse(arguments: list[str]) -> EditRequest:
    """Reads the command line; exits with its usage if it cannot be read."""
    parser = common_parser(
        "sample.py edit",
        "Draws parts of an image anew, several times, and shows original, mask and results.",
        "edit.png",
        "FILE.png",
    )
    add = parser.add_argument
    add("--image", required=True, help="any image file; resized and center-cropped for the model")
    add(
        "--box",
        help="y0,x0,y1,x1 in pixels of the image as the model sees it, or, if none is above 1, in "
        "fractions of its height and width",
    )
    add("--mask", help="instead of a box, an image of the same size: white is drawn anew")
    add(
        "--mode",
        choices=get_args(Mode),
        default="inpaint",
        help="draw the inside of the box anew; all but the inside; the inside as --label",
    )
    add("--label", type=int, help="class of what is drawn (default: none)")
    return read_request(EditRequest, parser.parse_args(arguments))


def run(request: EditRequest) -> None:
    """Edits and writes one picture; raises InputError before any long work."""
    request.check()
    _check_combination(request)
    check_out(request.out)
    picture = image_io.open_image(request.image)
    model = load(request.weights, request.dtype)
    options = model.options(**request.options)
    classes, shape = model.classes, model.image_shape
    if request.label is not None and not 0 <= request.label < classes:
        raise InputError(f"label={request.label}: allowed are 0 … {classes - 1}")
    image_HWC = image_io.fit(picture, shape)
    finest = model.edit_shape
    if request.box is not None:
        redraw_hw = box_mask(request.box, shape[:2], finest)
        redraw_hw = ~redraw_hw if request.mode == "outpaint" else redraw_hw
        if not redraw_hw.any():
            raise InputError(f"box={request.box} covers everything: nothing is left to draw")
    else:
        assert request.mask is not None
        redraw_hw = read_mask(request.mask, picture.size, shape[:2], finest)
    if picture.size != (shape[1], shape[0]):
        print(
            f"{request.image}: {picture.width}x{picture.height} pixels, resized (shorter side) and "
            f"center-cropped to {shape[1]}x{shape[0]}"
        )
    label = classes if request.label is None else request.label
    batch = min(request.count, request.batch_size * len(model.devices))
    results = []
    for start in tqdm(range(0, request.count, batch), "editing", unit="batch"):
        images_BHWC = model.edit(
            image_HWC[None],
            ~redraw_hw,
            np.full(batch, label),
            request.seed,
            index=np.arange(start, start + batch),
            **dataclasses.asdict(options),
        )
        results.append(image_io.to_uint8(np.asarray(images_BHWC)))
    results_NHWC = np.concatenate(results)[: request.count]
    image_io.write_png(request.out, side_by_side(image_HWC, redraw_hw, results_NHWC))
    print(f"{request.out}: original, what is drawn anew (red), {request.count} results")


def side_by_side(
    image_HWC: np.ndarray, redraw_hw: np.ndarray, results_NHWC: np.ndarray
) -> np.ndarray:
    """One uint8 RGB picture: the image, the same with what is drawn anew in red, the results."""
    H, W, _ = image_HWC.shape
    h, w = redraw_hw.shape
    redraw_HW1 = redraw_hw.repeat(H // h, axis=0).repeat(W // w, axis=1)[..., None]
    red_HW3 = (np.broadcast_to(image_HWC, (H, W, 3)) // 2) + np.array([127, 0, 0], np.uint8)
    images = [image_HWC, np.where(redraw_HW1, red_HW3, image_HWC), *results_NHWC]
    images_NHWC = np.stack([np.broadcast_to(image, (H, W, 3)) for image in images])
    return image_io.grid(images_NHWC, columns=min(len(images), 10))


def _check_combination(request):
    if (request.box is None) == (request.mask is None):
        raise InputError("say where to draw: either --box=y0,x0,y1,x1 or --mask=FILE.png")
    if request.mask is not None and request.mode == "outpaint":
        raise InputError("mode=outpaint needs a --box; a --mask is white where to draw already")
    if request.mode == "class" and request.label is None:
        raise InputError("mode=class needs --label: the class that the inside of the box becomes")
    if not request.out.endswith(".png"):
        raise InputError(f"out={request.out}: an edit is one picture; give FILE.png")
