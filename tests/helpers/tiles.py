"""Cuts the images out of a captioned grid."""

import numpy as np

from varjax.storage.captioned_grid import Captions, grid_layout


def tiles(
    picture_HWC: np.ndarray,
    shape: tuple[int, int],
    captions: Captions,
    images: int,
    columns: int | None = None,
) -> list[np.ndarray]:
    """Returns the images of a grid with these captions, without their enlargement.

    Only the size of the grid is checked, so tests must compare the pixels.
    """
    layout = grid_layout(images, shape, captions, columns or images)
    assert picture_HWC.shape[:2] == layout.size, (picture_HWC.shape, layout)
    (h, w), step = layout.tile, layout.enlarge
    corners = [layout.corner(i) for i in range(images)]
    return [picture_HWC[y : y + h : step, x : x + w : step] for y, x in corners]
