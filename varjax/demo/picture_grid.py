"""Shows images on a page, as HTML: pixels enlarged by whole numbers, a click saves a PNG."""

import base64
import dataclasses
import html
import io
import zipfile
from collections.abc import Sequence

import numpy as np

from varjax.storage.image_io import png_bytes

SHOWN_SIDE = 144  # pixels on the page that smaller images are enlarged to, about


@dataclasses.dataclass(frozen=True)
class Film:
    """Holds images after every step, with their words.

    Attributes:
        images_NSHWC: uint8 images, the finished ones last.
        names: caption of each image.
        files: name of the file of each image.
        texts: text that the file of each image carries, by keyword.
    """

    images_NSHWC: np.ndarray
    names: Sequence[str]
    files: Sequence[str]
    texts: Sequence[dict[str, str]]

    @property
    def steps(self) -> int:
        return self.images_NSHWC.shape[1]

    def frame(self, step: int) -> str:
        """Returns the HTML of all images after a step, counted from 1."""
        step = min(max(step, 1), self.steps)
        images_NHWC = self.images_NSHWC[:, step - 1]
        if step < self.steps:
            return picture_grid(images_NHWC, self.names)
        return picture_grid(images_NHWC, self.names, self.files, self.texts)

    def archive(self) -> bytes:
        """Returns a ZIP of the finished images as PNG."""
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:  # PNGs are compressed already
            for number, name in enumerate(self.files):
                image_HWC = self.images_NSHWC[number, -1]
                archive.writestr(name, png_bytes(image_HWC, self.texts[number]))
        return file.getvalue()


def picture_grid(
    images_NHWC: np.ndarray,
    names: Sequence[str],
    files: Sequence[str] = (),
    texts: Sequence[dict[str, str]] = (),
) -> str:
    """Returns HTML that shows images in rows.

    Args:
        images_NHWC: uint8 images to show.
        names: caption of each image.
        files: name of the file that a click on each image saves; () for no files.
        texts: text that each file carries, by keyword.
    """
    enlarge = max(1, SHOWN_SIDE // max(images_NHWC.shape[1:3]))
    H, W = (side * enlarge for side in images_NHWC.shape[1:3])
    figures = []
    for number, (image_HWC, name) in enumerate(zip(images_NHWC, names, strict=True)):
        url = image_url(image_HWC, texts[number] if files else None)
        caption = html.escape(name)
        picture = f'<img src="{url}" width="{W}" height="{H}" alt="{caption}">'
        if files:
            title = f'title="save {html.escape(files[number])}"'
            picture = (
                f'<a href="{url}" download="{html.escape(files[number])}" {title}>{picture}</a>'
            )
        figures.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="picture-grid">{"".join(figures)}</div>'


def image_url(image_HWC: np.ndarray, text: dict[str, str] | None = None) -> str:
    """Returns a PNG as a "data:" URL."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image_HWC, text)).decode()


PAGE_CSS = """
.picture-grid { display: flex; flex-wrap: wrap; gap: 8px; align-items: flex-start; }
.picture-grid figure { margin: 0 !important; max-width: 100%; }
.picture-grid a, .picture-grid img { display: block; margin: 0 !important; padding: 0 !important; }
.picture-grid img {
  max-width: 100%; height: auto; image-rendering: pixelated;
}
.picture-grid figcaption {
  margin: 2px 0 0 !important; font-size: 12px; line-height: 1.2;
  color: var(--body-text-color-subdued);
}
"""
