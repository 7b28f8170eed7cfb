"""Tests the events of the page's tabs, without a browser."""

import asyncio
import dataclasses
import pathlib
import types
import urllib.parse

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers.fake_sampler import FakeSampler
from varjax.demo.drawing import MODEL_LOCK, DemoModel
from varjax.demo.inside import Insides
from varjax.errors import InputError
from varjax.storage import image_io
from varjax.tokenizers.vq.pyramid import Pyramid

gr = pytest.importorskip("gradio", reason='needs Gradio: pip install ".[demo]"')
from gradio.context import LocalContext  # noqa: E402  (needs Gradio)

from varjax.demo import inside_tab, playback  # noqa: E402
from varjax.demo.page import make_page  # noqa: E402
from varjax.demo.server import serve_page  # noqa: E402

PAINTED = {"layers": [np.full((8, 8, 4), 255, np.uint8)]}
# Values of the components by label. The state that holds the picture to edit has no label.
REQUEST = {"model": 0, "count": 1, "seed": 0, "classes": [3], None: Image.new("L", (8, 8))}
REQUEST |= {"class": 3, "mode": "in-paint", "keep_scales": 2, "paste": True}
REQUEST |= {"paint over the parts to redraw (out-paint: to keep)": PAINTED}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(playback, "FILM_SECONDS", 0)


@dataclasses.dataclass
class Sampler(FakeSampler):
    """Draws and edits in `number_of_steps` steps."""

    devices: tuple = (jax.local_devices()[0],)
    number_of_steps: int = 3

    def steps(self, options):
        return self.number_of_steps

    def sample(self, labels, seed=0, *, index=None, every_step=False, **options):
        return np.stack([super().sample(labels, seed, index=index)] * self.number_of_steps)

    def edit(self, images_BHWC, keep, labels=None, seed=0, *, index=None, **options):
        images_BHWC = super().edit(images_BHWC, keep, labels, seed, index=index)
        return np.stack([images_BHWC] * self.number_of_steps)


def page_of(model, folder):
    """Makes the page inside an event loop; without one, Gradio opens a loop and never closes it."""

    async def make():
        return make_page([model], folder)

    return asyncio.run(make())


@pytest.mark.parametrize(("keeps_scales", "steps"), [(False, 3), (True, 2)])
def test_a_page_opens_for_models_with_no_scales_or_two(tmp_path, keeps_scales, steps):
    model = DemoModel("fake", Sampler(number_of_steps=steps), keeps_scales=keeps_scales)
    assert page_of(model, tmp_path).fns


def started(page, model, name, **given):
    """Returns the generator of an event."""
    event = next(x for x in page.fns.values() if x.name == name)
    given = dataclasses.asdict(model.sampler.options()) | REQUEST | given
    return event.fn(*[given[x.label] for x in event.inputs])


def shown(page, model, name, **given):
    """Returns the last value of each component that an event shows, by identifier or label."""
    listening = LocalContext.in_event_listener.set(True)
    try:
        updates = [
            value for update in started(page, model, name, **given) for value in update.items()
        ]
    finally:
        LocalContext.in_event_listener.reset(listening)
    return {x.elem_id or getattr(x, "label", None): value for x, value in updates}


def test_each_drawing_has_its_own_file(tmp_path):
    model = DemoModel("fake", Sampler())
    page = page_of(model, tmp_path)
    downloads = [shown(page, model, "draw_images", seed=seed)["download"] for seed in (0, 1)]
    files = [pathlib.Path(download.constructor_args["value"]) for download in downloads]
    assert all(tmp_path in file.parents for file in files)
    assert files[0] != files[1] and files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.parametrize(
    ("event", "slider"), [("draw_images", "step"), ("edit_picture", "after scale or step")]
)
def test_a_single_step_has_no_step_slider(tmp_path, event, slider):
    for steps in (1, 3):
        model = DemoModel("fake", Sampler(number_of_steps=steps))
        values = shown(page_of(model, tmp_path), model, event)
        given = values[slider].constructor_args
        assert given["value"] == steps and given["visible"] == (steps > 1)


@pytest.mark.parametrize("event", ["draw_images", "edit_picture", "draw_both"])
def test_a_request_stopped_while_waiting_is_not_computed(tmp_path, event, monkeypatch):
    monkeypatch.setattr(playback, "WAIT_SECONDS", 0)
    model = DemoModel("fake", Sampler())
    request = started(page_of(model, tmp_path), model, event)
    with MODEL_LOCK:  # as if a stopped computation were still running
        for _ in range(3):
            assert playback.WAITING in next(request).values()
        request.close()
    assert not model.sampler.calls


def test_outputs_of_earlier_images_are_cleared_while_drawing(tmp_path):
    model = DemoModel("fake", Sampler())
    update = next(started(page_of(model, tmp_path), model, "draw_images"))
    values = {component.elem_id: value for component, value in update.items()}
    assert not values["download"].visible and not values["step"].visible
    assert values["command"] == values["snippet"] == values["link"] == "" and values[None] is None


def test_the_note_of_a_stopped_request_says_stopped(tmp_path):
    page = page_of(DemoModel("fake", Sampler()), tmp_path)
    ends = [x for x in page.fns.values() if x.name == "end_notes"]
    assert len(ends) == 3 * 2  # three tabs, each stopped by a button or an error
    for event in ends:
        for text, ended in ((playback.DRAWING, "stopped"), ("2 images in 1 s", gr.skip())):
            # A tab with two notes has text in only one of them.
            values = event.fn(text, *[None] * (len(event.outputs) - 1))
            assert [*values] == event.outputs
            assert [*values.values()] == [ended, *[gr.skip()] * (len(event.outputs) - 1)]


def test_a_click_on_a_token_map_uses_its_scale(tmp_path, monkeypatch):
    sampler = Sampler()
    sampler.tokenizer = types.SimpleNamespace(pyramid=Pyramid((1, 2, 4)))
    page = page_of(DemoModel("fake", sampler, keeps_scales=True), tmp_path)
    event = next(x for x in page.fns.values() if x.name == "show_alternatives")
    image_HWC = np.zeros((8, 8, 1), np.uint8)

    def likeliest_codes(model, tokens_BL, label, scale, position):
        return {"code 0": image_HWC}, f"scale {scale + 1}"

    monkeypatch.setattr(inside_tab, "likeliest_codes", likeliest_codes)
    insides, click = (0, np.zeros((1, 21), int)), types.SimpleNamespace(index=[0, 0])
    for chosen, shown_scale in ((2, 2), (10, 3)):  # the slider may exceed the model's scales
        assert event.fn(insides, chosen, None, click)[0] == f"scale {shown_scale}"


def test_alternatives_of_an_earlier_picture_are_cleared(tmp_path, monkeypatch):
    page = page_of(DemoModel("fake", Sampler()), tmp_path)
    event = next(x for x in page.fns.values() if x.name == "show_insides")
    image_HWC = np.zeros((8, 8, 1), np.uint8)
    found = Insides({"original": image_HWC}, {"error": image_HWC}, "PSNR 9 dB")
    monkeypatch.setattr(inside_tab, "look_inside", lambda *_: found)
    values = dict(zip(event.outputs, event.fn(Image.new("L", (8, 8)), 0, 1), strict=True))
    values = {component.elem_id: value for component, value in values.items()}
    assert values["own"] == values["alternatives"] == "" and values["summary"] == "PSNR 9 dB"


def linked(folder, query):
    """Returns the value that a link sets for each control, and whether the link draws."""
    page = page_of(DemoModel("fake", Sampler()), folder)
    event = next(x for x in page.fns.values() if x.name == "read_link")
    values = event.fn(types.SimpleNamespace(query_params=dict(urllib.parse.parse_qsl(query, True))))
    return {x.label: value for x, value in zip(event.outputs[:-1], values, strict=False)}, values[
        -1
    ]


def test_a_link_sets_the_controls_that_it_names(tmp_path):
    values, draws = linked(tmp_path, "labels=3,none&guidance=2.5&__theme=dark")
    assert draws and values["classes"] == [3, 10] and values["guidance"] == 2.5
    assert values["seed"] == values["top_k"] == gr.skip()


@pytest.mark.parametrize("query", ["guidance=1,2,3", "guidance=nan", "guidance=99", "guidance="])
def test_a_link_with_a_value_outside_its_slider_shows_a_warning(tmp_path, query):
    with pytest.warns(UserWarning, match="guidance=.* one number from 1 to 10"):
        assert not linked(tmp_path, f"labels=3&{query}")[1]


def test_a_link_with_an_unknown_option_shows_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="diffusion_steps=50: fake has no such option"):
        assert not linked(tmp_path, "labels=3&diffusion_steps=50")[1]


@pytest.mark.parametrize(("size", "kept_size"), [((640, 480), (8, 8)), ((6, 9), (6, 9))])
def test_a_page_keeps_only_what_it_needs_of_an_upload(tmp_path, size, kept_size):
    pixels = np.random.default_rng(0).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    page = page_of(DemoModel("fake", Sampler()), tmp_path)
    for event in [x for x in page.fns.values() if x.name == "open_upload"]:
        kept, about, _ = event.fn(str(tmp_path / "photo.png"))
        assert kept.size == kept_size and about.startswith(f"{size[0]}x{size[1]} pixels")
        image_HWC = image_io.read_image(tmp_path / "photo.png", (8, 8, 1))
        assert np.array_equal(image_io.resize_and_crop(kept, (8, 8, 1)), image_HWC)


def test_an_unreachable_page_gives_an_error(tmp_path, monkeypatch):
    def launch(self, **settings):
        self.local_url = "http://127.0.0.1:7860/"
        raise ValueError("When localhost is not accessible, a shareable link must be created.")

    async def serve():
        serve_page([DemoModel("fake", Sampler())], "127.0.0.1", 7860, False, tmp_path)

    monkeypatch.setattr(gr.Blocks, "launch", launch)
    with pytest.raises(InputError, match="does not answer at http://127.0.0.1:7860/"):
        asyncio.run(serve())
