"""Adds the buttons that choose a picture: an upload, or one that was drawn."""

import dataclasses
from collections.abc import Callable
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
from PIL import Image

from varjax.demo.edits import kept_picture, read_upload
from varjax.demo.playback import shown_errors


@dataclasses.dataclass(frozen=True)
class PictureSource:
    """Holds the components that choose a picture.

    Attributes:
        picture: state with the picture, a Pillow image, or None.
        about: text about the picture.
        upload: button that uploads a picture.
        number: number of a drawn picture, from 1.
        take: button that takes the drawn picture of that number.
    """

    picture: Any
    about: Any
    upload: Any
    number: Any
    take: Any

    def connect(
        self,
        drawn_film: Any,
        shape: tuple[int, int, int],
        show: Callable[[Image.Image], Any],
        shown: Any,
    ) -> None:
        """Adds the events of the buttons.

        Args:
            drawn_film: state with the `Film` of the tab that draws, or None.
            shape: (H, W, channels) of the models' images.
            show: function of a picture that returns the value of `shown`.
            shown: component that shows the picture.
        """

        def open_upload(path: str):
            with shown_errors():
                opened, changes = read_upload(path)
            kept = kept_picture(opened, shape)
            return kept, f"{opened.width}x{opened.height} pixels. {changes}", show(kept)

        def take_drawn(film: Any, number: Any):
            if film is None:
                raise gr.Error("nothing is drawn yet: draw in the tab Draw", print_exception=False)
            images_NHWC = film.images_NSHWC[:, -1]
            number = min(max(int(number or 1), 1), len(images_NHWC))
            image_HWC = images_NHWC[number - 1]
            taken = Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC)
            return taken, f"Drawn picture {number}.", show(taken)

        outputs = [self.picture, self.about, shown]
        self.upload.upload(open_upload, self.upload, outputs, concurrency_limit=None)
        self.take.click(take_drawn, [drawn_film, self.number], outputs, concurrency_limit=None)


def add_picture_source(name: str) -> PictureSource:
    """Adds the components that choose a picture.

    Args:
        name: prefix of their identifiers in the page.
    """
    with gr.Row():
        upload = gr.UploadButton("Upload a picture", size="sm", elem_id=f"{name}-upload")
        number = gr.Number(1, label="drawn picture", precision=0, minimum=1, min_width=80)
        take = gr.Button("Take it", size="sm", min_width=80, elem_id=f"{name}-take")
    about = gr.Markdown("Upload a picture, or take one from the tab Draw.")
    return PictureSource(gr.State(), about, upload, number, take)
