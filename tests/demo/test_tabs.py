"""The tabs of the page, without a browser: what their events return."""

import asyncio
import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers.fake_sampler import FakeSampler
from varjax.demo.drawing import DemoModel

gr = pytest.importorskip("gradio", reason='needs Gradio: pip install ".[demo]"')
from varjax.demo.page import make_page  # noqa: E402  (needs Gradio)


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
