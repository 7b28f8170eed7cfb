"""Plays images step by step on the page while they are drawn, and turns mistakes into messages."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np

from varjax.demo.drawing import MODEL_LOCK, Drawing, DrawnStep, draw_steps
from varjax.demo.picture_grid import Film, ImageTexts
from varjax.errors import InputError

COMPUTATION = "computation"  # what Gradio runs one at a time, and queues
FILM_SECONDS = 2.0  # of the frames of a request, together
MOST_FRAMES = 16  # of these, where drawing is faster; the slider shows all steps
WAIT_SECONDS = 0.5  # between two looks whether a computation has ended
DRAWING = "drawing …"
WAITING = "waiting for a stopped computation, which ends with the images in progress …"


@contextlib.contextmanager
def shown_errors() -> Iterator[None]:
    """Turns a user's mistake into a message on the page; other exceptions keep their traceback."""
    try:
        yield
    except InputError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


def wait_for_model() -> Iterator[None]:
    """Yields twice a second while the computation of an earlier, cancelled request still runs.

    Gradio ends a request that is stopped, or whose page is closed, only where its function yields.
    A function that waited for the lock instead would then compute for nobody.
    """
    while MODEL_LOCK.locked():
        yield
        time.sleep(WAIT_SECONDS)


def played_drawing(drawing: Drawing) -> Iterator[tuple[Film, int, float]]:
    """Draws images, and yields what `played_steps` yields."""
    texts = ImageTexts(drawing.image_names, drawing.file_names, drawing.texts())
    return played_steps(draw_steps(drawing), texts, len(texts.captions))


def played_steps(
    drawn_steps: Iterable[DrawnStep], texts: ImageTexts, images: int
) -> Iterator[tuple[Film, int, float]]:
    """Yields what to show while images are drawn.

    A step is shown as soon as it is drawn, but steps that are drawn faster than an animation of
    FILM_SECONDS shows them wait, and some of them are left out.

    Args:
        drawn_steps: the images, some at a time, after each step.
        texts: captions and files of all images.
        images: number of all images.

    Yields:
        An animation, its step to show, and the seconds that drawing took so far. Until the latest
        images are finished, it has only one step: the earlier images, and these. Then it has
        all steps of all images so far.

    Raises:
        gr.Error: a user's mistake, such as a model whose images are NaN.
    """
    finished: list[np.ndarray] = []
    latest: list[np.ndarray] = []
    seconds, shown_at = 0.0, -math.inf
    with shown_errors():
        for drawn in drawn_steps:
            latest.append(drawn.images_NHWC)
            S = drawn.steps
            frames = np.linspace(1, S, min(S, MOST_FRAMES)).astype(int)
            pause = FILM_SECONDS / len(frames) * len(drawn.images_NHWC) / images
            ahead = pause - (time.monotonic() - shown_at)
            if ahead > 0:
                if drawn.step not in frames:
                    continue
                time.sleep(ahead)
            if drawn.step < S:
                shown_NHWC = np.concatenate([*(x[:, -1] for x in finished), drawn.images_NHWC])
                film = Film(shown_NHWC[:, None], ImageTexts(texts.captions))
                yield film, 1, seconds + drawn.seconds
            else:
                seconds += drawn.seconds
                finished.append(np.stack(latest, axis=1))
                latest = []
                yield Film(np.concatenate(finished), texts), S, seconds
            shown_at = time.monotonic()


def connect_stop(stop: Any, event: Any, notes: Sequence[Any]) -> None:
    """Lets a button cancel an event, and ends the notes that say that it is running.

    Args:
        stop: button that cancels the event.
        event: listener that computes images.
        notes: components whose text ends in "…" while it is running.
    """

    def end_notes(*texts: str | None):
        ended = ["stopped" if (text or "").endswith("…") else gr.skip() for text in texts]
        return dict(zip(notes, ended, strict=True))

    settings: dict[str, Any] = {"inputs": [*notes], "outputs": [*notes], "show_progress": "hidden"}
    stop.click(end_notes, **settings, cancels=[event], concurrency_limit=None)
    event.failure(end_notes, **settings, concurrency_limit=None)


def step_slider(film: Film, label: str) -> Any:
    """Returns what makes a step slider choose between the steps of a finished animation.

    Args:
        film: finished animation; the slider is hidden if it has a single step.
        label: text above the slider.
    """
    S = film.steps
    # Gradio's sliders need two values, also while they are hidden.
    return gr.Slider(1, max(2, S), S, label=label, visible=S > 1)


def connect_step_slider(step: Any, film: Any, pictures: Any) -> None:
    """Lets a slider choose the step of an animation that the page shows.

    Args:
        step: slider, from 1.
        film: state with the `Film`, or None.
        pictures: component that shows a frame.
    """
    step.input(
        lambda film, step: film.frame(int(step)) if film else gr.skip(),
        [film, step],
        pictures,
        concurrency_limit=None,
        show_progress="hidden",
        trigger_mode="always_last",
    )


def speed_note(film: Film, seconds: float, compiled: bool) -> str:
    """Returns what a page says about the speed of a drawing.

    Args:
        film: images that were drawn.
        seconds: time that drawing them took.
        compiled: whether their program was compiled for them.
    """
    N = len(film.images_NSHWC)
    speed = f"{N} {'image' if N == 1 else 'images'} in {seconds:.2f} s ({N / seconds:.1f} images/s)"
    return f"{speed}, with compiling: the next ones are faster" if compiled else speed
