"""The tabs of the page, without a browser: what their events return."""

import asyncio
import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from tests.helpers.fake_sampler import FakeSampler
from varjax.demo.drawing import DemoModel

gr = pytest.importorskip("gradio", reason='needs Gradio: pip install ".[demo]"')
from gradio.context import LocalContext  # noqa: E402  (needs Gradio)

from varjax.demo import playback  # noqa: E402
from varjax.demo.page import make_page  # noqa: E402


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(playback, "FILM_SECONDS", 0)


@dataclasses.dataclass
class Sampler(FakeSampler):
    """Draws and edits in a number of steps."""

    devices: tuple = (jax.local_devices()[0],)
    number_of_steps: int = 3

    def steps(self, options):
        return self.number_of_steps

    def sample(self, labels, seed=0, *, index=None, every_step=False, **options):
        return np.stack([super().sample(labels, seed, index=index)] * self.number_of_steps)


def page_of(model, folder):
    """Returns the page; where no event loop runs, Gradio would make one and not close it."""

    async def make():
        return make_page([model], folder)

    return asyncio.run(make())


@pytest.mark.parametrize(("keeps_scales", "steps"), [(False, 3), (True, 2)])
def test_a_page_opens_for_a_model_that_has_no_scales_or_two(tmp_path, keeps_scales, steps):
    model = DemoModel("fake", Sampler(number_of_steps=steps), keeps_scales=keeps_scales)
    assert page_of(model, tmp_path).fns


def drawn(page, model, **given):
    """Returns the last value of each component, by identifier, after a drawing."""
    event = next(x for x in page.fns.values() if x.name == "draw_images")
    own = model.sampler.options()
    given = {"model": 0, "count": 1, "seed": 0, "classes": [3]} | dataclasses.asdict(own) | given
    values = [given[x.label] for x in event.inputs]
    listening = LocalContext.in_event_listener.set(True)
    try:
        shown = [value for update in event.fn(*values) for value in update.items()]
    finally:
        LocalContext.in_event_listener.reset(listening)
    return {component.elem_id: value for component, value in shown}


def test_each_drawing_has_a_file_of_its_own(tmp_path):
    model = DemoModel("fake", Sampler())
    page = page_of(model, tmp_path)
    downloads = [drawn(page, model, seed=seed)["download"] for seed in (0, 1)]
    files = [pathlib.Path(download.constructor_args["value"]) for download in downloads]
    assert all(tmp_path in file.parents for file in files)
    assert files[0] != files[1] and files[0].read_bytes() != files[1].read_bytes()
