import json

import numpy as np
import pytest
from PIL import Image

from varjax.errors import InputError
from varjax.sampling.films import write_film
from varjax.storage import image_io
from varjax.storage.picture_text import command_text, image_text, read_picture_text

TEXT = command_text("varjax sample", ["--out=a b — ü.png", "--count=2"], {"seed": 3})


def test_a_png_carries_text_and_the_same_pixels(tmp_path):
    image_HWC = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    image_io.write_png(tmp_path / "a.png", image_HWC, TEXT)
    about, text = read_picture_text(tmp_path / "a.png")
    assert about == "PNG image, 9x8 pixels" and text == TEXT
    assert text["Command"] == "varjax sample '--out=a b — ü.png' --count=2"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), image_HWC)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_a_film_carries_text(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    images_NSHWC = np.arange(2, dtype=np.uint8)[None, :, None, None, None].repeat(64, 2)
    write_film(path, 99 * images_NSHWC.repeat(64, 3), text=TEXT)
    assert read_picture_text(path) == (f"{suffix.upper()} image, 64x64 pixels, 2 frames", TEXT)


def test_a_film_with_damaged_later_frames_is_read_as_its_first_frame(tmp_path):
    later = [Image.new("L", (8, 8), 9)]
    Image.new("L", (8, 8)).save(tmp_path / "a.gif", save_all=True, append_images=later)
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(data[: data.rindex(b",") + 5])  # "," begins a frame
    assert read_picture_text(tmp_path / "cut.gif")[0] == "GIF image, 8x8 pixels"


def test_the_text_of_one_of_many_images_has_its_number_and_label():
    text = image_text({"seed": 3}, 12, np.int64(7))
    assert (text["Image"], text["Label"], json.loads(text["Settings"])) == ("12", "7", {"seed": 3})


def test_other_pictures_have_their_own_text_or_none(tmp_path):
    picture = Image.new("L", (4, 4))
    picture.save(tmp_path / "a.jpg", comment=b"a photo")
    picture.save(tmp_path / "a.webp")
    assert read_picture_text(tmp_path / "a.jpg")[1] == {"Comment": "a photo"}
    assert read_picture_text(tmp_path / "a.webp") == ("WEBP image, 4x4 pixels", {})
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match="text.png is not an image"):
        read_picture_text(tmp_path / "text.png")
