"""Tests drawings of the demo against the command line and Python, and refused requests."""

import argparse
import dataclasses
import io
import os
import shlex
import socket
import sys
import urllib.request
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.helpers import runs
from tests.helpers.fake_sampler import FakeSampler
from varjax.cli import sample
from varjax.demo.__main__ import check_same_images, open_demo, open_demo_model
from varjax.demo.drawing import DemoModel, Drawing, checked_drawing, draw_steps
from varjax.demo.picture_grid import Film, ImageTexts, image_url, picture_grid
from varjax.errors import InputError
from varjax.sampling.sampler import add_option_flags, given_options, replace_options
from varjax.storage import image_io
from varjax.var.sample import VAROptions


@pytest.fixture(scope="module")
def model():
    return open_demo_model(str(runs.untrained_var()))


@pytest.fixture(scope="module")
def drawing(model):
    return checked_drawing(model, [3, 10], count=1, seed=5, options={"guidance": 2.0, "top_k": 9})


@pytest.fixture(scope="module")
def film(drawing):
    steps = [*draw_steps(drawing)]
    assert [(x.step, x.steps) for x in steps] == [(1, 3), (2, 3), (3, 3)]
    texts = ImageTexts(drawing.image_names, drawing.file_names, drawing.texts())
    return Film(np.stack([x.images_NHWC for x in steps], axis=1), texts)


def test_the_command_line_draws_the_same_files(drawing, film, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, command, *flags = shlex.split(drawing.command())
    assert (program, command) == ("varjax", "sample")
    sample.draw_samples(flags)
    with zipfile.ZipFile(io.BytesIO(film.archive())) as archive:
        assert archive.namelist() == sorted(x.name for x in tmp_path.glob("samples/*.png"))
        for name in archive.namelist():
            data = archive.read(name)
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels(name))
            assert Image.open(io.BytesIO(data)).info["Command"] == drawing.command()


def pixels(name):
    return np.asarray(Image.open(f"samples/{name}"))


def test_the_snippet_draws_the_same_images(drawing, film, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(drawing.snippet(), names)
    images_BHWC = image_io.to_uint8(np.asarray(names["images_BHWC"]))
    assert np.array_equal(images_BHWC, film.images_NSHWC[:, -1])
    assert (tmp_path / "samples.png").exists()


def test_a_film_has_the_image_after_each_scale(model, film):
    assert film.images_NSHWC.shape == (2, 3, 8, 8, 1)
    images_SBHWC = model.sampler.sample([3, 10], 5, guidance=2.0, top_k=9, every_step=True)
    images_BSHWC = np.moveaxis(np.asarray(images_SBHWC), 1, 0)
    assert np.array_equal(film.images_NSHWC, image_io.to_uint8(images_BSHWC))


def test_the_command_has_only_changed_options(model):
    own = model.sampler.options()
    drawing = checked_drawing(model, [], 1, 0, {"guidance": own.guidance, "temperature": 0.5})
    assert drawing.changes == {"temperature": 0.5}
    assert "--temperature=0.5" in drawing.command() and "guidance" not in drawing.command()
    assert "--labels=none" in drawing.command()


def test_the_command_line_and_the_snippet_keep_a_chosen_dtype(drawing):
    assert "dtype" not in drawing.command() + drawing.snippet()
    model = dataclasses.replace(drawing.model, dtype="float32")
    chosen = dataclasses.replace(drawing, model=model)
    assert "--dtype=float32" in shlex.split(chosen.command())
    assert f"varjax.load({model.location!r}, dtype='float32')" in chosen.snippet()


@pytest.mark.parametrize("smooth", [True, False])
def test_the_command_line_accepts_boolean_options(smooth):
    class Sampler(FakeSampler):
        def options(self, **given):
            return replace_options(VAROptions(smooth=not smooth), given)

    options = Sampler().options(smooth=smooth)
    drawing = Drawing(DemoModel("runs/x", Sampler()), (3,), count=1, seed=5, options=options)
    parser = argparse.ArgumentParser()
    add_option_flags(parser, [VAROptions])
    flags, _ = parser.parse_known_args(shlex.split(drawing.command()))
    assert given_options(flags, [VAROptions]) == {"smooth": smooth}


@pytest.mark.parametrize(
    ("labels", "count", "seed", "options", "message"),
    [
        ([11], 1, 0, {}, "class=11"),
        ([1], 0, 0, {}, "count=0"),
        ([1], None, 0, {}, "count=None"),
        ([1], 1, -1, {}, "seed=-1"),
        ([1], 1, None, {}, "seed=None"),
        ([1], 1, 0, {"top_p": 2.0}, "top_p=2.0"),
        (range(10), 16, 0, {}, "16 images of each of 10 classes are 160; .* at most 64"),
    ],
)
def test_invalid_drawings_are_refused(model, labels, count, seed, options, message):
    with pytest.raises(InputError, match=message):
        checked_drawing(model, labels, count, seed, options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 1000}, "also=b: its number of classes is 1000, and that of a is 10"),
        ({"image_shape": (4, 4, 1)}, r"also=b: its shape of images is \(4, 4, 1\), and that of a"),
    ],
)
def test_models_with_other_classes_or_image_shapes_cannot_share_a_page(changes, message):
    models = [DemoModel("a", FakeSampler()), DemoModel("b", FakeSampler(**changes))]
    check_same_images([models[0], models[0]])
    with pytest.raises(InputError, match=message):
        check_same_images(models)


def test_the_error_for_missing_gradio_names_the_extra(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r'needs gradio .*or pip install "\.\[demo\]"'):
        open_demo(["--weights=nowhere"])


@pytest.mark.parametrize(("host", "message"), [("127.0.0.1", "in use"), ("192.0.2.1", "assign")])
def test_an_unusable_address_is_refused_before_models_load(host, message, monkeypatch):
    pytest.importorskip("gradio", reason='needs Gradio: pip install ".[demo]"')
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"host={host}, port={port}: cannot .*{message}"):
            open_demo(["--weights=nowhere", f"--host={host}", f"--port={port}"])


def test_the_page_is_requested_without_a_proxy(monkeypatch):
    pytest.importorskip("gradio", reason='needs Gradio: pip install ".[demo]"')
    given = {"HTTP_PROXY": "http://127.0.0.1:9", "no_proxy": "example.org", "NO_PROXY": "unused"}
    monkeypatch.setattr(os, "environ", dict(os.environ) | given)
    monkeypatch.setattr("varjax.demo.__main__.open_demo_model", lambda *_: None)
    bypassed = []
    with socket.create_server(("0.0.0.0", 0)) as probe:
        port = probe.getsockname()[1]

    def serve_page(models, host, port, share, folder):
        for name in (host, "127.0.0.1", "localhost", "example.org", "example.com"):
            bypassed.append(bool(urllib.request.proxy_bypass(name)))

    monkeypatch.setattr("varjax.demo.server.serve_page", serve_page)
    open_demo(["--weights=fake", "--host=0.0.0.0", f"--port={port}"])
    assert bypassed == [True, True, True, True, False]


def test_images_are_enlarged_by_integers_and_captions_escaped():
    images_NHWC = np.zeros((1, 8, 8, 1), np.uint8)
    page = picture_grid(images_NHWC, ImageTexts(["<b>"], ["a.png"], [{"Command": "x"}]))
    assert 'width="144" height="144"' in page and "<b>" not in page and "&lt;b&gt;" in page
    assert 'download="a.png"' in page and image_url(images_NHWC[0], {"Command": "x"}) in page
    assert 'width="256"' in picture_grid(np.zeros((1, 256, 256, 3), np.uint8), ImageTexts(["x"]))


def test_a_film_clamps_its_step_and_offers_only_final_files(film):
    assert film.frame(0) == film.frame(1) != film.frame(3) == film.frame(9)
    assert "download" in film.frame(3) and "download" not in film.frame(2)
