"""Tests that a page shows each step while later ones are computed, one request at a time."""

import concurrent.futures
import dataclasses
import threading
import types

import jax
import numpy as np
import pytest

from tests.helpers.fake_sampler import FakeSampler
from varjax.demo import drawing
from varjax.demo.drawing import MODEL_LOCK, DemoModel, DrawnStep, checked_drawing, draw_steps
from varjax.demo.picture_grid import ImageTexts
from varjax.errors import InputError

SECONDS = 30  # more than any test waits
DEVICE = jax.local_devices()[0]


@pytest.fixture(autouse=True)
def small_images_are_slow(monkeypatch):
    monkeypatch.setattr(drawing, "STREAMED_SIDE", 8)


@dataclasses.dataclass
class SlowSampler(FakeSampler):
    """Draws three steps; waits after the first one until `released` is set."""

    devices: tuple = (DEVICE,)
    started: threading.Event = dataclasses.field(default_factory=threading.Event)
    released: threading.Event = dataclasses.field(default_factory=threading.Event)
    finished: threading.Event = dataclasses.field(default_factory=threading.Event)
    error: Exception | None = None

    def steps(self, options):
        return 3

    def sample(self, labels, seed=0, *, index=None, every_step=False, **options):
        self.started.set()
        images_BHWC = np.array(super().sample(labels, seed, index=index))
        steps = [np.zeros_like(images_BHWC), np.ones_like(images_BHWC), images_BHWC]
        if every_step is True:
            return np.stack(steps)
        every_step(0, steps[0])
        assert self.released.wait(SECONDS)
        if self.error is not None:
            raise self.error
        every_step(1, steps[1])
        every_step(2, steps[2])
        self.finished.set()
        return images_BHWC


def requested(sampler, count=2, **options):
    return checked_drawing(DemoModel("fake", sampler), [3], count, 0, options)


def test_a_step_is_yielded_before_the_next_one_is_computed():
    sampler = SlowSampler()
    steps = draw_steps(requested(sampler, count=9))
    first = next(steps)
    assert (first.step, first.steps, first.images_NHWC.shape) == (1, 3, (8, 8, 8, 1))
    assert first.images_NHWC.dtype == np.uint8 and not sampler.finished.is_set()
    sampler.released.set()
    others = [*steps]
    assert [(x.step, len(x.images_NHWC)) for x in others] == [
        (2, 8),
        (3, 8),
        (1, 1),
        (2, 1),
        (3, 1),
    ]
    assert others[1].images_NHWC[:, 0, 0, 0].tolist() == [*range(8)]
    assert others[1].seconds >= others[0].seconds >= first.seconds > 0


def test_the_page_shows_a_step_before_the_next_one_is_computed(monkeypatch):
    playback = pytest.importorskip("varjax.demo.playback", exc_type=ImportError)
    monkeypatch.setattr(playback, "FILM_SECONDS", 0)
    sampler = SlowSampler()
    played = playback.played_drawing(requested(sampler, count=9))
    film, step, _ = next(played)
    assert film.frame(step).count("<img") == 8 and "download" not in film.frame(step)
    assert not sampler.finished.is_set()
    sampler.released.set()
    shown = [(film.frame(step), film) for film, step, _ in played]
    assert [frame.count("<img") for frame, _ in shown] == [8, 8, 9, 9, 9]
    assert [frame.count("download") for frame, _ in shown] == [0, 8, 0, 0, 9]
    assert shown[-1][1].images_NSHWC.shape == (9, 3, 8, 8, 1)
    assert shown[-1][1].images_NSHWC[:, :2].reshape(9, 2, -1).mean(axis=(0, 2)).tolist() == [0, 255]


def test_a_cancelled_drawing_ends_before_the_next_one_begins():
    cancelled, waiting = SlowSampler(), SlowSampler()
    steps = draw_steps(requested(cancelled, count=16))
    next(steps)
    steps.close()
    waiting.released.set()
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        drawn = executor.submit(lambda: [*draw_steps(requested(waiting))])
        assert not waiting.started.wait(0.1) and not cancelled.finished.is_set()
        cancelled.released.set()
        assert len(drawn.result(SECONDS)) == 3
    assert cancelled.finished.is_set() and cancelled.calls == 1  # only one of two parts
    assert MODEL_LOCK.acquire(timeout=SECONDS)
    MODEL_LOCK.release()


@pytest.mark.parametrize("nan", [False, True])
def test_an_error_after_the_first_step_is_shown(nan):
    playback = pytest.importorskip("varjax.demo.playback", exc_type=ImportError)
    sampler = SlowSampler(error=None if nan else InputError("out of luck"))
    if nan:
        sampler.nan = frozenset([1])
    sampler.released.set()
    message = "image 1 .*holds NaN" if nan else "out of luck"
    with pytest.raises(playback.gr.Error, match=message):
        for _ in playback.played_drawing(requested(sampler)):
            pass
    assert len([*draw_steps(requested(sampler_of_another_request()))]) == 3


def sampler_of_another_request():
    sampler = SlowSampler()
    sampler.released.set()
    return sampler


def test_several_devices_yield_the_steps_of_finished_parts():
    sampler = SlowSampler(devices=(DEVICE, DEVICE))
    steps = [*draw_steps(requested(sampler, count=16))]
    assert [(x.step, len(x.images_NHWC)) for x in steps] == [(1, 16), (2, 16), (3, 16)]
    assert steps[2].images_NHWC[:, 0, 0, 0].tolist() == [*range(16)]


def frames(monkeypatch, steps, seconds_of_a_step):
    """Returns the shown steps and their times, on a fake clock that drawing and waiting advance."""
    playback = pytest.importorskip("varjax.demo.playback", exc_type=ImportError)
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(playback, "time", clock)

    def drawn():
        for step in range(1, steps + 1):
            sleep(seconds_of_a_step)
            image_1HWC = np.full((1, 8, 8, 1), step, np.uint8)
            yield DrawnStep(image_1HWC, step, steps, step * seconds_of_a_step)

    played = playback.played_steps(drawn(), ImageTexts(["3"], ["a.png"], [{}]), 1)
    shown = [(int(film.images_NSHWC[0, step - 1, 0, 0, 0]), now[0]) for film, step, _ in played]
    return [step for step, _ in shown], [when for _, when in shown]


def test_fast_drawings_play_as_a_film_and_slow_ones_show_every_step(monkeypatch):
    steps, times = frames(monkeypatch, 64, 0.001)
    assert len(steps) == 16 and steps[0] == 1 and steps[-1] == 64
    assert np.allclose(np.diff(times), 2 / 16) and times[-1] < 2
    steps, times = frames(monkeypatch, 4, 0)
    assert steps == [1, 2, 3, 4] and np.allclose(np.diff(times), 2 / 4)
    steps, times = frames(monkeypatch, 64, 0.5)
    assert steps == [*range(1, 65)] and np.allclose(np.diff(times), 0.5)


def test_steps_of_a_fast_drawing_are_yielded_together(monkeypatch):
    """The program of `every_step=True` has no callbacks, so JAX can cache it on disk."""
    monkeypatch.setattr(drawing, "STREAMED_SIDE", 9)
    sampler = SlowSampler()  # would block if it had to report each step
    steps = [*draw_steps(requested(sampler, count=2))]
    assert [x.step for x in steps] == [1, 2, 3] and not sampler.finished.is_set()
