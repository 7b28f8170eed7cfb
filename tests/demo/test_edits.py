"""Tests edits on the page against the models' methods, and messages about uploads."""

import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.helpers import runs
from varjax.demo import drawing
from varjax.demo.__main__ import open_demo_model
from varjax.demo.edits import checked_page_edit, edit_parts, read_upload
from varjax.errors import InputError
from varjax.storage import image_io

SETTINGS = {"label": 3, "count": 2, "seed": 4, "keep_scales": 2, "paste": False}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(256, size=(8, 8), dtype=np.uint8))
LEFT_HW = np.arange(8)[None].repeat(8, axis=0) < 4
DOT_HW = np.arange(64).reshape(8, 8) == 20


@pytest.fixture(scope="module")
def model():
    return open_demo_model(str(runs.untrained_var()))


def results(model, mode, painted_HW=LEFT_HW, picture=PICTURE, **settings):
    edit = checked_page_edit(model, mode, picture, painted_HW, SETTINGS | settings, {})
    return np.concatenate([images_NSHWC[:, -1] for images_NSHWC, _ in edit_parts(edit)])


def finished(images_SBHWC):
    return image_io.to_uint8(np.asarray(images_SBHWC))[-1]


@pytest.mark.parametrize("mode", ["in-paint", "out-paint", "change class"])
def test_painted_or_unpainted_parts_are_redrawn(model, mode):
    painted_hw = np.arange(4)[None].repeat(4, axis=0) < 2
    keep_hw = painted_hw if mode == "out-paint" else ~painted_hw
    image_HWC = np.asarray(PICTURE)[..., None]
    given = {"seed": 4, "index": range(2), "every_step": True}
    expected = finished(model.sampler.edit(image_HWC[None], keep_hw, [3, 3], **given))
    assert np.array_equal(results(model, mode), expected)
    pasted = results(model, mode, paste=True)
    kept_HW = LEFT_HW if mode == "out-paint" else ~LEFT_HW
    assert np.array_equal(pasted[:, kept_HW], image_HWC[None].repeat(2, axis=0)[:, kept_HW])


def test_vary_and_upscale_keep_the_coarse_scales(model):
    given = {"seed": 4, "index": range(2), "every_step": True}
    image_HWC = np.asarray(PICTURE)[..., None]
    expected = finished(model.sampler.vary(image_HWC[None], 2, [3, 3], **given))
    assert np.array_equal(results(model, "vary", None), expected)
    small = PICTURE.resize((4, 4))
    small_HWC = np.asarray(small)[..., None]
    expected = finished(model.sampler.upscale(small_HWC[None], None, [3, 3], **given))
    assert np.array_equal(results(model, "upscale", None, small), expected)


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        ("in-paint", {"picture": None}, "no picture yet"),
        ("in-paint", {"painted_HW": None}, "nothing is painted"),
        ("in-paint", {"painted_HW": ~LEFT_HW & LEFT_HW}, "nothing is painted"),
        ("in-paint", {"painted_HW": DOT_HW}, r"no token \(2x2 pixels\) .* paint a larger"),
        ("out-paint", {"painted_HW": DOT_HW}, "paint a larger"),
        ("out-paint", {"painted_HW": LEFT_HW | ~LEFT_HW}, "nothing is left to draw"),
        ("change class", {"label": None}, "choose the class"),
        ("upscale", {}, "upscaling takes less than the model's 8x8"),
        ("vary", {"keep_scales": 3}, "keep_scales=3"),
        ("vary", {"count": 0}, "count=0"),
        ("vary", {"seed": None}, "seed=None"),
    ],
)
def test_invalid_edits_are_refused(model, mode, changes, message):
    with pytest.raises(InputError, match=message):
        results(model, mode, **changes)


def test_more_results_than_the_page_can_keep_are_refused(model, monkeypatch):
    monkeypatch.setattr(drawing, "MOST_FILM_BYTES", 2 * 3 * 8 * 8)  # two results after 3 scales
    checked_page_edit(model, "vary", PICTURE, None, SETTINGS, {})
    with pytest.raises(InputError, match="count=3; in 3 steps, .* at most 2"):
        results(model, "vary", count=3)


def test_program_is_equal_for_requests_that_share_a_compilation(model):
    small = PICTURE.resize((4, 4)), PICTURE.resize((2, 2))

    def program(mode, picture=PICTURE, **options):
        return checked_page_edit(model, mode, picture, LEFT_HW, SETTINGS, options).program

    assert program("in-paint") == program("change class", top_k=3)
    programs = [program("in-paint"), program("vary"), *(program("upscale", x) for x in small)]
    programs += [program("in-paint", guidance=guidance) for guidance in (2.0, (1.0, 2.0, 3.0))]
    assert len(set(programs)) == 5  # guidance=2.0 shares the program of the first


@pytest.mark.parametrize("mode", ["vary", "upscale"])
def test_vary_and_upscale_are_refused_for_mar(mode):
    with pytest.raises(InputError, match=f"only a model .*VAR.* can {mode} an image"):
        results(open_demo_model(str(runs.untrained_mar())), mode, None)


def saved(tmp_path, picture, name="upload.png", **settings):
    picture.save(tmp_path / name, **settings)
    return str(tmp_path / name)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_invalid_uploads_give_a_short_error(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    huge = Image.new("1", (10_000, 10_000))
    for path, message in (
        (str(tmp_path / "text.png"), "^text.png is not an image that can be read"),
        (saved(tmp_path, Image.new("L", (1, 1))), "^upload.png has 1x1 pixels; upload"),
        (saved(tmp_path, huge, "huge.png"), "^huge.png .*10000x10000 pixels; at most"),
    ):
        with pytest.raises(InputError, match=message) as error:
            read_upload(path)
        assert str(tmp_path) not in str(error.value)


def png_of_16_bits(image_HW3):
    H, W, _ = image_HW3.shape
    rows = b"".join(b"\0" + row_W3.tobytes() for row_W3 in image_HW3)
    header = struct.pack(">IIBBBBB", W, H, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(kind + content))
        data += struct.pack(">I", len(content)) + kind + content + check
    return data


def test_unusual_uploads_are_converted_and_changes_reported(tmp_path):
    gray = Image.new("L", (8, 8))
    film = saved(
        tmp_path, gray, "film.gif", save_all=True, append_images=[Image.new("L", (8, 8), 9)]
    )
    assert read_upload(film)[1] == "Only the first of its 2 frames is used."
    data = pathlib.Path(film).read_bytes()
    (tmp_path / "cut.gif").write_bytes(data[: data.rindex(b",") + 5])  # "," begins a frame
    assert read_upload(str(tmp_path / "cut.gif"))[1] == ""
    deep = saved(tmp_path, Image.fromarray(np.full((8, 8), 2**15, np.uint16)))
    picture, changes = read_upload(deep)
    assert picture.mode == "L" and changes == "Its 16 bits per channel become 8."
    colors = tmp_path / "colors.png"  # Pillow writes colors only with 8 bits per channel
    colors.write_bytes(png_of_16_bits(np.full((8, 8, 3), 2**15, ">u2")))
    picture, changes = read_upload(str(colors))
    assert picture.mode == "RGB" and changes == "Its 16 bits per channel become 8."
    picture, changes = read_upload(saved(tmp_path, Image.new("RGBA", (8, 8), (0, 0, 0, 0))))
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert changes == "Its transparent parts are white."
    assert read_upload(saved(tmp_path, gray))[1] == ""
