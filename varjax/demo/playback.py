"""Plays images step by step on the page while they are drawn, and turns mistakes into messages."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np

from varjax.demo.drawing import Drawing, draw_parts
from varjax.demo.picture_grid import Film, ImageTexts
from varjax.errors import InputError

COMPUTATION = "computation"  # what Gradio runs one at a time, and queues
FILM_SECONDS = 2.0  # of the frames of a request, together
MOST_FRAMES = 16  # of these; the slider shows all steps


@contextlib.contextmanager
def shown_errors() -> Iterator[None]:
    """Turns a user's mistake into a message on the page; other exceptions keep their traceback."""
    try:
        yield
    except InputError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


def played_drawing(drawing: Drawing) -> Iterator[tuple[Film, int, float]]:
    """Draws images, and yields what `played_films` yields."""
    texts = ImageTexts(drawing.image_names, drawing.file_names, drawing.texts())
    return played_films(draw_parts(drawing), texts, len(texts.captions))


def played_films(
    parts: Iterable[tuple[np.ndarray, float]], texts: ImageTexts, images: int
) -> Iterator[tuple[Film, int, float]]:
    """Yields what to show while images are drawn: those so far, and a step of the latest ones.

    Args:
        parts: images after every step, (n, S, H, W, channels) uint8, with the seconds they took.
        texts: captions and files of all images.
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
                yield Film(playing, texts), int(step), seconds
                time.sleep(FILM_SECONDS / len(steps) * len(latest_NSHWC) / images)
            yield Film(np.concatenate(drawn), texts), S, seconds


def connect_step_slider(step: Any, film: Any, pictures: Any) -> None:
    """Lets a slider choose the step of a film that the page shows.

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
