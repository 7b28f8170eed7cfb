"""Shows images on a page, as HTML: pixels enlarged by whole numbers, a click saves a PNG."""

import base64
import dataclasses
import html
import io
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from varjax.storage.image_io import png_bytes

SHOWN_SIDE = 144  # pixels on the page that smaller images are enlarged to, about


@dataclasses.dataclass(frozen=True)
class ImageTexts:
    """Holds the texts of images, in their order; there may be more than images so far.

    Attributes:
        captions: caption of each image.
        file_names: name of the file that a click on each image saves; () for no files.
        metadata: text that each file carries, by keyword.
    """

    captions: Sequence[str]
    file_names: Sequence[str] = ()
    metadata: Sequence[Mapping[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Film:
    """Holds images after every step, with their captions and files.

    Attributes:
        images_NSHWC: uint8 images, the finished ones last.
        texts: captions and files of the images.
    """

    images_NSHWC: np.ndarray
    texts: ImageTexts

    @property
    def steps(self) -> int:
        """Number of steps S."""
        return self.images_NSHWC.shape[1]

    def frame(self, step: int) -> str:
        """Returns the HTML of all images after a step, counted from 1."""
        step = min(max(step, 1), self.steps)
        texts = self.texts if step == self.steps else ImageTexts(self.texts.captions)
        return picture_grid(self.images_NSHWC[:, step - 1], texts)

    def archive(self) -> bytes:
        """Returns a ZIP of the finished images as PNG."""
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:  # PNGs are compressed already
            for number, image_SHWC in enumerate(self.images_NSHWC):
                data = png_bytes(image_SHWC[-1], self.texts.metadata[number])
                archive.writestr(self.texts.file_names[number], data)
        return file.getvalue()


def picture_grid(images_NHWC: np.ndarray, texts: ImageTexts) -> str:
    """Returns HTML that shows images in rows.

    Args:
        images_NHWC: uint8 images to show.
        texts: captions and files of the images.
    """
    enlarge = max(1, SHOWN_SIDE // max(images_NHWC.shape[1:3]))
    H, W = (side * enlarge for side in images_NHWC.shape[1:3])
    figures = []
    for number, image_HWC in enumerate(images_NHWC):
        url = image_url(image_HWC, texts.metadata[number] if texts.file_names else None)
        caption = html.escape(texts.captions[number])
        picture = f'<img src="{url}" width="{W}" height="{H}" alt="{caption}">'
        if texts.file_names:
            file = html.escape(texts.file_names[number])
            picture = f'<a href="{url}" download="{file}" title="save {file}">{picture}</a>'
        figures.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="picture-grid">{"".join(figures)}</div>'


def image_url(image_HWC: np.ndarray, text: Mapping[str, str] | None = None) -> str:
    """Returns a PNG as a "data:" URL."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image_HWC, text)).decode()


PAGE_CSS = """
.picture-grid { display: flex; flex-wrap: wrap; gap: 8px; align-items: flex-start; }
.picture-grid figure { margin: 0 !important; max-width: 100%; }
.picture-grid a, .picture-grid img { display: block; margin: 0 !important; padding: 0 !important; }
.picture-grid img {
  max-width: 100%; height: auto; image-rendering: pixelated;
  outline: 1px solid var(--border-color-primary);
}
.picture-grid figcaption {
  margin: 2px 0 0 !important; font-size: 12px; line-height: 1.2;
  color: var(--body-text-color-subdued);
}
"""
