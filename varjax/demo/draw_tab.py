"""Makes the tab that draws images, step by step, and links to them."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np

from varjax.demo.controls import OptionControls, link_query
from varjax.demo.drawing import DemoModel, Drawing, checked_drawing, draw_parts
from varjax.demo.picture_grid import Film, Words
from varjax.errors import InputError

COMPUTATION = "computation"  # what Gradio runs one at a time, and queues
FILM_SECONDS = 2.0  # of the frames of a request, together
MOST_FRAMES = 16  # of these; the slider shows all steps
FIRST_CLASSES = 4
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


def add_draw_tab(models: Sequence[DemoModel], folder: pathlib.Path) -> DrawTab:
    """Adds the components and events of the tab to the page that is being made.

    Args:
        models: models to draw with.
        folder: folder for the files of downloads.
    """
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            choice, groups, controls = add_model_controls(models)
            with gr.Row():
                count = gr.Slider(1, 16, 2, step=1, label="count", info="images of each class")
            seed, die = add_seed()
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
    compiled: set[Any] = set()
    inputs = [choice, count, seed, *(part for each in controls for part in each.components)]

    def draw_images(request: gr.Request, chosen: int, count: Any, seed: Any, *values: Any):
        drawing = read_drawing(models, controls, chosen, count, seed, values)
        first = drawing.program not in compiled
        yield {note: "compiling the program for these options and this number of images …" * first}
        for film, shown, seconds in played_films(drawing, FILM_SECONDS):  # noqa: B007  (the last)
            yield {pictures: film.frame(shown)}
        file = folder / f"{request.session_hash}.zip"
        label = "after scale" if drawing.model.keeps_scales else "after step"
        file.write_bytes(film.archive())
        compiled.add(drawing.program)
        yield {
            step: gr.Slider(1, film.steps, film.steps, label=label, visible=film.steps > 1),
            note: speed_note(film, seconds, first),
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
    stop.click(None, cancels=[drawn])
    step.input(
        lambda film, step: film.frame(int(step)) if film else gr.skip(),
        [drawn_film, step],
        pictures,
        concurrency_limit=None,
        show_progress="hidden",
        trigger_mode="always_last",
    )

    def read_link(request: gr.Request) -> list[Any]:
        values = dict(request.query_params)
        skipped = [gr.skip() for _ in inputs]
        try:
            number = int(values.get("model", 0))
            if not 0 <= number < len(models):
                raise InputError(f"model={number}: this page has {len(models)}, counted from 0")
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


def add_model_controls(models: Sequence[DemoModel]) -> tuple[Any, list[Any], list[OptionControls]]:
    """Adds a choice of models, if there are several, and the controls of each.

    Returns:
        The choice, whose value is a model's number, groups of controls, and the controls.
    """
    choice = gr.Radio(
        [(model.location, number) for number, model in enumerate(models)],
        value=0,
        label="model",
        visible=len(models) > 1,
    )
    groups, controls = [], []
    for number, model in enumerate(models):
        with gr.Column(visible=number == 0) as group:
            classes = np.linspace(0, model.sampler.classes - 1, FIRST_CLASSES).astype(int)
            controls.append(OptionControls(model, list(dict.fromkeys(classes.tolist()))))
        groups.append(group)
    if len(models) > 1:
        choice.change(
            lambda chosen: [gr.Column(visible=chosen == n) for n in range(len(models))],
            choice,
            groups,
            concurrency_limit=None,
            show_progress="hidden",
        )
    return choice, groups, controls


def add_seed() -> tuple[Any, Any]:
    """Adds a random seed, and a button that chooses another one."""
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="seed", precision=0, minimum=0, scale=3, elem_id="seed")
        die = gr.Button("Another seed", scale=1, min_width=80, size="sm", elem_id="die")
    die.click(None, None, seed, js="() => Math.floor(Math.random() * 2 ** 32)")
    return seed, die


def read_drawing(
    models: Sequence[DemoModel],
    controls: Sequence[OptionControls],
    chosen: int,
    count: Any,
    seed: Any,
    values: Sequence[Any],
) -> Drawing:
    """Returns the request of a page, checked.

    Args:
        models: models of the page.
        controls: controls of each model.
        chosen: number of the chosen model.
        count: number of images of each class.
        seed: random seed of all images.
        values: values of the components of all models' controls.

    Raises:
        gr.Error: a value out of range, which the page then shows.
    """
    start = sum(len(each.components) for each in controls[:chosen])
    with shown_errors():
        own = controls[chosen]
        labels, options = own.read(values[start : start + len(own.components)])
        return checked_drawing(models[chosen], labels, count, seed, options)


@contextlib.contextmanager
def shown_errors() -> Iterator[None]:
    """Turns a user's mistake into a message on the page; other exceptions keep their traceback."""
    try:
        yield
    except InputError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


def played_films(drawing: Drawing, film_seconds: float) -> Iterator[tuple[Film, int, float]]:
    """Draws images, and yields what to show: the images so far, and a step of the latest ones.

    Args:
        drawing: request for images.
        film_seconds: time over which the frames are shown.

    Yields:
        A film of the images so far, the step to show, and the seconds that drawing them took. In
        the film, images that were finished before the latest ones do not move, except at its end.

    Raises:
        gr.Error: a user's mistake, such as a model whose images are NaN.
    """
    words = Words(drawing.image_names, drawing.file_names, drawing.texts())
    drawn: list[np.ndarray] = []
    seconds = 0.0
    with shown_errors():
        for latest_NSHWC, part_seconds in draw_parts(drawing):
            seconds += part_seconds
            still = [np.repeat(x[:, -1:], x.shape[1], axis=1) for x in drawn]
            drawn.append(latest_NSHWC)
            playing = np.concatenate([*still, latest_NSHWC])
            S, images = playing.shape[1], len(drawing.job.label_N)
            steps = np.unique(np.linspace(1, S, min(S, MOST_FRAMES)).astype(int))
            for step in steps[:-1]:
                yield Film(playing, words), int(step), seconds
                time.sleep(film_seconds / len(steps) * len(latest_NSHWC) / images)
            yield Film(np.concatenate(drawn), words), S, seconds


def speed_note(film: Film, seconds: float, first: bool) -> str:
    """Returns what a page says about the speed of a drawing.

    Args:
        film: images that were drawn.
        seconds: time that drawing them took.
        first: whether their program was compiled for them.
    """
    N = len(film.images_NSHWC)
    speed = f"{N} {'image' if N == 1 else 'images'} in {seconds:.2f} s ({N / seconds:.1f} images/s)"
    return f"{speed}, with compiling: the next ones are faster" if first else speed
