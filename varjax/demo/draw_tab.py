"""Makes the tab that draws images, step by step, and links to them."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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

    def draw_images(request: gr.Request, chosen: int, count: Any, seed: Any, *values: Any):
        with shown_errors():
            labels, options = read_controls(controls, chosen, values)
            drawing = checked_drawing(models[chosen], labels, count, seed, options)
        first = drawing.program not in compiled
        yield {note: "compiling the program for these options and this number of images …" * first}
        for film, shown, seconds in played_drawing(drawing):  # noqa: B007  (the last)
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


def add_model_controls(
    models: Sequence[DemoModel], chosen: int = 0, classes: bool = True
) -> tuple[Any, list[OptionControls]]:
    """Adds a choice of models, if there are several, and the controls of each.

    Args:
        models: models of the page.
        chosen: number of the model that is chosen at first.
        classes: whether the controls choose classes, too.

    Returns:
        The choice, whose value is a model's number, and the controls.
    """
    choice = gr.Radio(
        [(model.location, number) for number, model in enumerate(models)],
        value=chosen,
        label="model",
        visible=len(models) > 1,
    )
    groups, controls = [], []
    for number, model in enumerate(models):
        with gr.Column(visible=number == chosen) as group:
            controls.append(OptionControls(model, first_classes(model) if classes else None))
        groups.append(group)
    if len(models) > 1:
        choice.change(
            lambda chosen: [gr.Column(visible=chosen == n) for n in range(len(models))],
            choice,
            groups,
            concurrency_limit=None,
            show_progress="hidden",
        )
    return choice, controls


def first_classes(model: DemoModel) -> list[int]:
    """Returns the classes that a page draws at first, evenly spread."""
    spread = np.linspace(0, model.sampler.classes - 1, FIRST_CLASSES).astype(int)
    return list(dict.fromkeys(spread.tolist()))


def add_seed(name: str = "") -> Any:
    """Adds a random seed, and a button that chooses another one.

    Args:
        name: prefix of the identifier in the page; "" for "seed" alone.
    """
    with gr.Row(equal_height=True):
        identifier = f"{name}-seed".strip("-")
        seed = gr.Number(0, label="seed", precision=0, minimum=0, scale=3, elem_id=identifier)
        another = gr.Button("Another seed", scale=1, min_width=80, size="sm")
    another.click(None, None, seed, js="() => Math.floor(Math.random() * 2 ** 32)")
    return seed


def read_controls(
    controls: Sequence[OptionControls], chosen: int, values: Sequence[Any]
) -> tuple[list[int], dict[str, Any]]:
    """Returns the classes and the options of the chosen model from the page.

    Args:
        controls: controls of each model.
        chosen: number of the chosen model.
        values: values of the components of all models' controls.

    Raises:
        InputError: text that is no value of an option.
    """
    start = sum(len(each.components) for each in controls[:chosen])
    own = controls[chosen]
    return own.read(values[start : start + len(own.components)])


@contextlib.contextmanager
def shown_errors() -> Iterator[None]:
    """Turns a user's mistake into a message on the page; other exceptions keep their traceback."""
    try:
        yield
    except InputError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


def played_drawing(drawing: Drawing) -> Iterator[tuple[Film, int, float]]:
    """Draws images, and yields what `played_films` yields."""
    words = Words(drawing.image_names, drawing.file_names, drawing.texts())
    return played_films(draw_parts(drawing), words, len(words.names))


def played_films(
    parts: Iterable[tuple[np.ndarray, float]], words: Words, images: int
) -> Iterator[tuple[Film, int, float]]:
    """Yields what to show while images are drawn: those so far, and a step of the latest ones.

    Args:
        parts: images after every step, (n, S, H, W, channels) uint8, with the seconds they took.
        words: words of all images.
        images: number of all images.

    Yields:
        A film of the images so far, the step to show, and the seconds that drawing them took. In
        the film, images that were finished before the latest ones do not move, except at its end.

    Raises:
        gr.Error: a user's mistake, such as a model whose images are NaN.
    """
    drawn: list[np.ndarray] = []
    seconds = 0.0
    with shown_errors():
        for latest_NSHWC, part_seconds in parts:
            seconds += part_seconds
            still = [np.repeat(x[:, -1:], x.shape[1], axis=1) for x in drawn]
            drawn.append(latest_NSHWC)
            playing = np.concatenate([*still, latest_NSHWC])
            S = playing.shape[1]
            steps = np.unique(np.linspace(1, S, min(S, MOST_FRAMES)).astype(int))
            for step in steps[:-1]:
                yield Film(playing, words), int(step), seconds
                time.sleep(FILM_SECONDS / len(steps) * len(latest_NSHWC) / images)
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
