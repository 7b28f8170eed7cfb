"""Writes animations of images as they are drawn, scale by scale or step by step."""

import functools
import io
import pathlib
from collections.abc import Mapping

import numpy as np
from PIL import Image

from varjax.errors import InputError
from varjax.storage import files, image_io
from varjax.storage.captioned_grid import Captions, captioned_grid
from varjax.storage.picture_text import film_text

FILM_MILLISECONDS = 3000  # of all steps together
MOST_SIDE = {"gif": 65_535, "webp": 16_383}  # pixels of a side, by the formats
LAST_MILLISECONDS = 1500  # of the finished images, before the animation repeats


def write_film(
    path: pathlib.Path,
    images_NSHWC: np.ndarray,
    columns: int | None = None,
    captions: Captions | None = None,
    text: Mapping[str, str] | None = None,
) -> None:
    """Writes a looping animation atomically: one frame for each step, the last one held.

    Args:
        path: FILE.gif (256 colors a frame) or FILE.webp (exact).
        images_NSHWC: uint8 images after each of S steps.
        columns: number of images in a row; None for a grid that is as square as possible.
        captions: words on each frame; None for none.
        text: text that the file carries, by keyword; see `varjax.storage.picture_text`.
    """
    data = film_bytes(path.suffix.lower()[1:], images_NSHWC, columns, captions, text)
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(data)


def film_bytes(
    kind: str,
    images_NSHWC: np.ndarray,
    columns: int | None = None,
    captions: Captions | None = None,
    text: Mapping[str, str] | None = None,
) -> bytes:
    """Encodes an animation as the content of a file.

    Args:
        kind: "gif" (256 colors a frame) or "webp" (exact).
        images_NSHWC: uint8 images after each of S steps.
        columns: number of images in a row; None for a grid that is as square as possible.
        captions: words on each frame; None for none.
        text: text that the file carries, by keyword.

    Raises:
        InputError: more images in a column or row than the format holds.
    """
    N, S, H, W, _ = images_NSHWC.shape
    if max(size := image_io.grid_size(N, (H, W), columns)) > MOST_SIDE[kind]:
        raise InputError(
            f"an animation of {N:,} images would have {size[0]:,}x{size[1]:,} pixels; a {kind} has "
            f"at most {MOST_SIDE[kind]:,} on a side; give fewer images, or a PNG"
        )
    if captions is None:
        draw = image_io.image_grid
    else:
        draw = functools.partial(captioned_grid, captions=captions, most_side=MOST_SIDE[kind])
    grids = [draw(images_NSHWC[:, step], columns=columns) for step in range(S)]
    frames = [Image.fromarray(np.broadcast_to(g, (*g.shape[:2], 3))) for g in grids]
    durations = [max(40, FILM_MILLISECONDS // S)] * (S - 1) + [LAST_MILLISECONDS]
    exact = {"lossless": True} if kind == "webp" else {}
    file = io.BytesIO()
    frames[0].save(
        file,
        format=kind,
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        **exact,
        **film_text(text or {}, kind),
    )
    return file.getvalue()
