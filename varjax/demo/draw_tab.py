"""Makes the tab that draws images, step by step, and links to them."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]

from varjax.demo.controls import add_model_controls, add_seed, link_query, read_controls
from varjax.demo.drawing import DemoModel, checked_drawing
from varjax.demo.playback import (
    COMPUTATION,
    DRAWING,
    WAITING,
    connect_step_slider,
    connect_stop,
    played_drawing,
    shown_errors,
    speed_note,
    step_slider,
    wait_for_model,
)
from varjax.errors import InputError

OPEN_LINK = "(go) => { if (go) document.querySelector('#draw').click() }"
# The page's address becomes the link, so that a reload draws the same images.
SHOW_LINK = """(query) => {
    const link = new URL(query, location.href.split('?')[0]);
    history.replaceState(null, '', link);
    return link.href;
}"""


@dataclasses.dataclass(frozen=True)
class DrawTab:
    """Holds what other parts of the page need of the tab.

    Attributes:
        film: state with the drawn `Film`, or None.
        read_link: function of a request that returns values of `link_outputs`.
        link_outputs: components that a link sets; the last one says whether to draw.
    """

    film: Any
    read_link: Callable[..., list[Any]]
    link_outputs: list[Any]


def add_draw_tab(models: Sequence[DemoModel], folder: pathlib.Path, compiled: set[Any]) -> DrawTab:
    """Adds the components and events of the tab to the page that is being made.

    Args:
        models: models to draw with.
        folder: folder for the files of downloads.
        compiled: programs that were compiled so far, which grow with each drawing.
    """
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            choice, controls = add_model_controls(models)
            with gr.Row():
                count = gr.Slider(1, 16, 2, step=1, label="count", info="images of each class")
            seed = add_seed()
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
        with gr.Column(scale=2, min_width=300):
            pictures = gr.HTML(min_height=220, elem_id="pictures")
            step = gr.Slider(1, 2, 1, step=1, visible=False, elem_id="step")
            note = gr.Markdown(elem_id="note")
            download = gr.DownloadButton(
                "Download the PNGs (ZIP)", visible=False, size="sm", elem_id="download"
            )
            with gr.Accordion("The same images elsewhere", open=False):
                link = gr.Textbox(label="link", interactive=False, buttons=["copy"], elem_id="link")
                command = gr.Code(
                    label="command line", language="shell", wrap_lines=True, elem_id="command"
                )
                snippet = gr.Code(label="Python", language="python", elem_id="snippet")
    drawn_film = gr.State()
    go = gr.Checkbox(visible="hidden")
    inputs = [choice, count, seed, *(part for each in controls for part in each.components)]

    def draw_images(chosen: int, count: Any, seed: Any, *values: Any):
        with shown_errors():
            labels, options = read_controls(controls, chosen, values)
            drawing = checked_drawing(models[chosen], labels, count, seed, options)
        for _ in wait_for_model():
            yield {note: WAITING}
        compiles = drawing.program not in compiled
        compiling = "compiling the program for these options and this number of images …"
        # What belongs to the images before must not stand next to unfinished ones.
        yield {
            note: compiling if compiles else DRAWING,
            step: gr.Slider(visible=False),
            download: gr.DownloadButton(visible=False),
            **dict.fromkeys((command, snippet, link), ""),
            drawn_film: None,
        }
        for film, shown, seconds in played_drawing(drawing):  # noqa: B007  (the last)
            yield {pictures: film.frame(shown), note: DRAWING}
        # Each drawing has its own address, since browsers may reuse a download of the same one.
        file = pathlib.Path(tempfile.mkdtemp(dir=folder)) / "samples.zip"
        file.write_bytes(film.archive())
        label = "after scale" if drawing.model.keeps_scales else "after step"
        compiled.add(drawing.program)
        yield {
            step: step_slider(film, label),
            note: speed_note(film, seconds, compiles),
            download: gr.DownloadButton(value=str(file), visible=True),
            command: drawing.command(),
            snippet: drawing.snippet(),
            link: link_query(drawing, chosen),
            drawn_film: film,
        }

    outputs = [pictures, step, note, download, command, snippet, link, drawn_film]
    drawn = draw.click(
        draw_images,
        inputs,
        outputs,
        concurrency_id=COMPUTATION,
        concurrency_limit=1,
        show_progress_on=pictures,
    )
    drawn.success(None, link, link, js=SHOW_LINK)
    connect_stop(stop, drawn, [note])
    connect_step_slider(step, drawn_film, pictures)

    def read_link(request: gr.Request) -> list[Any]:
        values = dict(request.query_params)
        skipped = [gr.skip() for _ in inputs]
        try:
            number = int(values.get("model", 0))
            if not 0 <= number < len(models):
                raise InputError(f"model={number}: this page has {len(models)}, counted from 0")
            known = {"model", "labels", "count", "seed", *controls[number].names}
            for name in values.keys() - known:
                if not name.startswith("__"):  # such as Gradio's __theme
                    raise InputError(
                        f"{name}={values[name]}: {models[number].location} has no such option; the "
                        "link may be one of another model"
                    )
            chosen = controls[number].values_of_link(values)
            parts = [
                chosen if each is controls[number] else [gr.skip() for _ in each.components]
                for each in controls
            ]
            count = int(values["count"]) if "count" in values else gr.skip()
            seed = int(values["seed"]) if "seed" in values else gr.skip()
        except ValueError as error:  # an InputError is one, too
            gr.Warning(f"The link is not understood: {error}")
            return [*skipped, False]
        return [number, count, seed, *(x for part in parts for x in part), "labels" in values]

    return DrawTab(drawn_film, read_link, [*inputs, go])
