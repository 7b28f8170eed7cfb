"""Makes the tab that edits an uploaded or drawn picture: parts, class, variations, details."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np
from PIL import Image

from varjax.demo.controls import add_model_controls, add_seed, class_control, read_controls
from varjax.demo.drawing import DemoModel, steps_of_part
from varjax.demo.edits import MASKED, SCALED, checked_page_edit, edit_parts
from varjax.demo.picture_grid import ImageTexts, picture_grid
from varjax.demo.picture_source import add_picture_source
from varjax.demo.playback import (
    COMPUTATION,
    DRAWING,
    WAITING,
    connect_step_slider,
    connect_stop,
    played_steps,
    shown_errors,
    speed_note,
    step_slider,
    wait_for_model,
)
from varjax.storage import image_io
from varjax.storage.picture_text import image_text

CANVAS_SIDE = 256  # pixels on the page that smaller images are enlarged to, about
BRUSH_PART = 8  # of the canvas's side: width of the brush
STEP_LABEL = "after scale or step"


def add_edit_tab(models: Sequence[DemoModel], drawn_film: Any, compiled: set[Any]) -> None:
    """Adds the components and events of the tab to the page that is being made.

    Args:
        models: models to edit with.
        drawn_film: state with the `Film` of the tab that draws, or None.
        compiled: programs that were compiled so far, which grow with each edit.
    """
    shape = models[0].sampler.image_shape
    scaled = [model.sampler for model in models if model.keeps_scales]
    # Gradio's sliders need two values, also where no model has as many scales to keep.
    most_scales = max([2, *(sampler.steps(sampler.options()) - 1 for sampler in scaled)])
    modes = [*MASKED, *(SCALED if scaled else ())]
    with gr.Row():
        with gr.Column(min_width=300):
            source = add_picture_source("edit")
            editor = gr.ImageEditor(
                label="paint over the parts to redraw (out-paint: to keep)",
                sources=(),
                transforms=(),
                layers=False,
                format="png",
                height=CANVAS_SIDE + 140,
                brush=gr.Brush(CANVAS_SIDE // BRUSH_PART, colors=["#ff0000"], color_mode="fixed"),
                elem_id="editor",
            )
            mode = gr.Radio(modes, value=modes[0], label="mode", elem_id="mode")
        with gr.Column(min_width=300):
            choice, controls = add_model_controls(models, classes=False)
            label = class_control(models[0], [models[0].sampler.classes], several=False)
            keep_scales = gr.Slider(
                1,
                most_scales,
                2,
                step=1,
                label="keep_scales",
                info="to vary: first scales to keep; the more, the closer",
                visible=False,
            )
            paste = gr.Checkbox(True, label="paste", info="keep the original's other pixels")
            count = gr.Slider(1, 16, 4, step=1, label="count", info="number of results")
            seed = add_seed("edit")
            with gr.Row():
                edit = gr.Button("Edit", variant="primary", elem_id="edit")
                stop = gr.Button("Stop", variant="stop")
    before = gr.HTML(elem_id="before")
    results = gr.HTML(min_height=120, elem_id="results")
    step = gr.Slider(1, 2, 1, step=1, label=STEP_LABEL, visible=False)
    note = gr.Markdown(elem_id="edit-note")
    film = gr.State()

    def edit_picture(picture: Any, editor: Any, mode: str, chosen: int, *values: Any):
        *fixed, count, seed = values[:5]
        names = ("label", "keep_scales", "paste", "count", "seed")
        settings: dict[str, Any] = dict(zip(names, (*fixed, count, seed), strict=True))
        with shown_errors():
            _, options = read_controls(controls, chosen, values[5:])
            request = checked_page_edit(
                models[chosen], mode, picture, painted(editor, shape), settings, options
            )
        for _ in wait_for_model():
            yield {note: WAITING}
        compiles = request.program not in compiled
        shown = request.shown()
        channels = max(image.shape[-1] for image in shown.values())
        images = [np.broadcast_to(x, (*x.shape[:2], channels)) for x in shown.values()]
        yield {
            before: picture_grid(np.stack(images), ImageTexts([*shown])),
            note: "compiling …" if compiles else DRAWING,
            step: gr.Slider(visible=False),
            film: None,
        }
        made_by = {"mode": mode, **settings, **dataclasses.asdict(request.options)}
        made_by |= request.model.sampler.identity()
        numbers = range(1, request.count + 1)
        texts = ImageTexts(
            [f"result {number}" for number in numbers],
            [f"{mode}_{number}.png" for number in numbers],
            [image_text(made_by, number, request.label) for number in numbers],
        )
        steps = itertools.chain.from_iterable(steps_of_part(*part) for part in edit_parts(request))
        played = played_steps(steps, texts, request.count)
        for last, shown_step, seconds in played:  # noqa: B007  (the last)
            yield {results: last.frame(shown_step), note: DRAWING}
        compiled.add(request.program)
        yield {
            film: last,
            note: speed_note(last, seconds, compiles),
            step: step_slider(last, STEP_LABEL),
        }

    source.connect(drawn_film, shape, lambda picture: canvas(picture, shape), editor)
    options = [part for each in controls for part in each.components]
    # Each mode shows the settings that it reads.
    mode.change(
        lambda mode: [gr.update(visible=mode == "vary"), gr.update(visible=mode in MASKED)],
        mode,
        [keep_scales, paste],
        show_progress="hidden",
    )
    edited = edit.click(
        edit_picture,
        [source.picture, editor, mode, choice, label, keep_scales, paste, count, seed, *options],
        [before, results, step, note, film],
        concurrency_id=COMPUTATION,
        concurrency_limit=1,
        show_progress_on=results,
    )
    connect_stop(stop, edited, [note])
    connect_step_slider(step, film, results)


def canvas(picture: Image.Image, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Returns the editor's value: a picture as the model sees it, enlarged by a whole number."""
    image_HWC = image_io.resize_and_crop(picture, shape)
    enlarge = max(1, CANVAS_SIDE // max(shape[:2]))
    large_HWC = image_HWC.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
    background = np.broadcast_to(large_HWC, (*large_HWC.shape[:2], 3))
    return {"background": background, "layers": [], "composite": background}


def painted(value: Any, shape: tuple[int, int, int]) -> np.ndarray | None:
    """Returns which pixels (H, W) of the model's images are painted in the editor, or None."""
    if not value or not value.get("layers"):
        return None
    H, W, _ = shape
    alpha_NHW = np.stack([layer[..., 3] for layer in value["layers"]])
    alpha = Image.fromarray(alpha_NHW.max(axis=0)).resize((W, H), Image.Resampling.BOX)
    return np.asarray(alpha) > 127
