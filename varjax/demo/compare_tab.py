"""Makes the tab that draws with two models, or two settings, on one seed."""

from collections.abc import Sequence
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]

from varjax.demo.controls import (
    add_model_controls,
    add_seed,
    class_control,
    first_classes,
    read_controls,
)
from varjax.demo.drawing import DemoModel, checked_drawing
from varjax.demo.picture_grid import Film
from varjax.demo.playback import (
    COMPUTATION,
    DRAWING,
    WAITING,
    connect_stop,
    played_drawing,
    shown_errors,
    speed_note,
    wait_for_model,
)


def add_compare_tab(models: Sequence[DemoModel], compiled: set[Any]) -> None:
    """Adds the components and events of the tab to the page that is being made.

    Args:
        models: models to draw with; the sides begin with the first and the last one.
        compiled: programs that were compiled so far, which grow with each drawing.
    """
    with gr.Row():
        labels = class_control(models[0], first_classes(models[0])[:2])
        count = gr.Slider(
            1, 16, 2, step=1, label="count", info="images of each class", elem_id="compare-count"
        )
        with gr.Column(min_width=260):
            seed = add_seed("compare")
    with gr.Row():
        draw = gr.Button("Draw both", variant="primary", elem_id="compare-draw")
        stop = gr.Button("Stop", variant="stop")
    sides = []
    with gr.Row():
        for name, chosen in (("left", 0), ("right", len(models) - 1)):
            with gr.Column(min_width=300):
                choice, controls = add_model_controls(models, chosen, classes=False)
                note = gr.Markdown(elem_id=f"{name}-note")
                pictures = gr.HTML(min_height=180, elem_id=name)
                sides.append((choice, controls, note, pictures))
    done = gr.Slider(1, 100, 100, step=1, label="after % of the scales or steps", visible=False)
    films = gr.State()
    components = [[part for each in side[1] for part in each.components] for side in sides]
    inputs = [labels, count, seed, *(side[0] for side in sides), *components[0], *components[1]]

    def draw_both(labels: list[int], count: Any, seed: Any, left: int, right: int, *values: Any):
        divided = values[: len(components[0])], values[len(components[0]) :]
        with shown_errors():
            drawings = []
            for chosen, own, (_, controls, _, _) in zip((left, right), divided, sides, strict=True):
                _, options = read_controls(controls, chosen, own)
                drawings.append(checked_drawing(models[chosen], labels, count, seed, options))
        for _ in wait_for_model():
            yield {note: WAITING for _, _, note, _ in sides}
        notes = dict.fromkeys((note for _, _, note, _ in sides), "")
        yield {**notes, films: None, done: gr.Slider(visible=False)}
        drawn: list[Film] = []
        for drawing, (_, _, note, pictures) in zip(drawings, sides, strict=True):
            compiles = drawing.program not in compiled
            yield {note: "compiling …" if compiles else DRAWING}
            for film, shown, seconds in played_drawing(drawing):  # noqa: B007  (the last)
                yield {pictures: film.frame(shown), note: DRAWING}
            drawn.append(film)
            compiled.add(drawing.program)
            yield {note: f"{speed_note(film, seconds, compiles)}\n\n`{drawing.command()}`"}
        yield {films: drawn, done: gr.Slider(value=100, visible=True)}

    outputs = [part for side in sides for part in side[2:]]
    drawn = draw.click(
        draw_both,
        inputs,
        [*outputs, films, done],
        concurrency_id=COMPUTATION,
        concurrency_limit=1,
        show_progress_on=[side[3] for side in sides],
    )
    connect_stop(stop, drawn, [side[2] for side in sides])
    done.input(
        lambda films, done: [
            film.frame(round(film.steps * done / 100)) if film else gr.skip()
            for film in films or (None, None)
        ],
        [films, done],
        [side[3] for side in sides],
        concurrency_limit=None,
        show_progress="hidden",
        trigger_mode="always_last",
    )
