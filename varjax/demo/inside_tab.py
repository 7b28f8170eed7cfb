"""Makes the tab that shows the tokens of a picture, their errors, and likely alternatives."""

from collections.abc import Sequence
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np
from PIL import Image

from varjax.demo.controls import class_control, model_choice
from varjax.demo.drawing import MODEL_LOCK, DemoModel
from varjax.demo.inside import MAP_SIDE, code_colors, likeliest_codes, look_inside
from varjax.demo.picture_grid import ImageTexts, picture_grid
from varjax.demo.picture_source import add_picture_source
from varjax.demo.playback import COMPUTATION, shown_errors
from varjax.errors import InputError
from varjax.storage import image_io


def add_inside_tab(models: Sequence[DemoModel], drawn_film: Any) -> None:
    """Adds the components and events of the tab to the page that is being made.

    Args:
        models: models to look into.
        drawn_film: state with the `Film` of the tab that draws, or None.
    """
    scaled = any(model.keeps_scales for model in models)
    shape = models[0].sampler.image_shape
    with gr.Row():
        with gr.Column(min_width=300):
            source = add_picture_source("inside")
            preview = gr.HTML()
        with gr.Column(min_width=300):
            choice = model_choice(models)
            look = gr.Button("Look inside", variant="primary", elem_id="look")
            summary = gr.Markdown(elem_id="summary")
    images = gr.HTML(min_height=120, elem_id="reconstructions")
    maps = gr.HTML(elem_id="maps")
    insides = gr.State()
    with gr.Row(visible=scaled):
        with gr.Column(min_width=300):
            gr.Markdown("Choose a scale, then click on a token to see what else VAR may draw.")
            scale = gr.Slider(1, _scales(models), _scales(models), step=1, label="scale")
            label = class_control(models[0], [models[0].sampler.classes], several=False)
            tokens = gr.Image(
                show_label=False,
                interactive=False,
                buttons=[],
                width=MAP_SIDE * 2,
                height=MAP_SIDE * 2,
                elem_id="tokens",
            )
        with gr.Column(min_width=300):
            own = gr.Markdown(elem_id="own")
            alternatives = gr.HTML(elem_id="alternatives")

    def show_insides(picture: Image.Image | None, chosen: int, scale: int):
        if picture is None:
            raise gr.Error("there is no picture yet: upload or take one", print_exception=False)
        model = models[chosen]
        with shown_errors(), MODEL_LOCK:
            found = look_inside(model, image_io.resize_and_crop(picture, model.sampler.image_shape))
        return [
            _grid(found.images),
            _grid(found.maps),
            found.summary,
            (chosen, found.tokens_BL),
            _tokens_of_scale(models, (chosen, found.tokens_BL), scale),
            "",
            "",
        ]

    def show_alternatives(insides: Any, scale: int, label: int | None, event: gr.SelectData):
        with shown_errors(), MODEL_LOCK:
            if insides is None or insides[1] is None:
                raise InputError("look inside a picture with a model that draws scale by scale")
            chosen, tokens_BL = insides
            label = models[chosen].sampler.classes if label is None else label
            x, y = event.index[0], event.index[1]
            position = y / (2 * MAP_SIDE), x / (2 * MAP_SIDE)
            k = _scale_index(models, insides, scale)
            found, about = likeliest_codes(models[chosen], tokens_BL, label, k, position)
        return about, _grid(found)

    source.connect(
        drawn_film,
        shape,
        lambda x: _grid({"picture": image_io.resize_and_crop(x, shape)}),
        preview,
    )
    look.click(
        show_insides,
        [source.picture, choice, scale],
        [images, maps, summary, insides, tokens, own, alternatives],
        concurrency_id=COMPUTATION,
        concurrency_limit=1,
        show_progress_on=images,
    )
    scale.input(
        lambda insides, scale: _tokens_of_scale(models, insides, scale),
        [insides, scale],
        tokens,
        concurrency_limit=None,
        show_progress="hidden",
    )
    tokens.select(
        show_alternatives,
        [insides, scale, label],
        [own, alternatives],
        concurrency_id=COMPUTATION,
        concurrency_limit=1,
        show_progress_on=alternatives,
    )


def _scales(models: Sequence[DemoModel]) -> int:
    """Returns the largest number of scales of the models, at least 2, as a slider needs."""
    scaled = [model.sampler for model in models if model.keeps_scales]
    return max([2, *(sampler.steps(sampler.options()) for sampler in scaled)])


def _scale_index(models: Sequence[DemoModel], insides: Any, scale: int) -> int:
    """Returns the index of a scale of the slider, which may exceed the scales of the model."""
    return min(int(scale), len(models[insides[0]].sampler.tokenizer.pyramid)) - 1


def _tokens_of_scale(models: Sequence[DemoModel], insides: Any, scale: int) -> Any:
    """Returns the token map of a scale as an image; None if there is none."""
    if insides is None or insides[1] is None:
        return None
    pyramid = models[insides[0]].sampler.tokenizer.pyramid
    k = _scale_index(models, insides, scale)
    colors = code_colors(insides[1][0, pyramid.slices[k]].reshape(pyramid.shapes[k]))
    return colors.repeat(2, axis=0).repeat(2, axis=1)


def _grid(images: dict[str, np.ndarray]) -> str:
    """Returns HTML of images of one shape, by name."""
    return picture_grid(np.stack([*images.values()]), ImageTexts([*images]))
