import numpy as np
import pytest
from PIL import ImageFont

from tests.helpers.tiles import tiles
from varjax.storage import captioned_grid as grids
from varjax.storage import image_io
from varjax.storage.captioned_grid import Captions, captioned_grid, drawable, grid_layout, wrapped

LONG = (
    "soft-coated wheaten terrier of an uncommonly long name",
    "Donaudampfschifffahrtsgesellschaft",
)
GRIDS = (
    (7, (8, 8), Captions("digits · seed 0", tiles=["3", LONG[0], LONG[1]] + ["7"] * 4), None),
    (6, (28, 20), Captions(" ".join(LONG), rows=[LONG[0], LONG[1]]), 3),
    (6, (64, 64), Captions(columns=[LONG[0], "2", LONG[1]], rows=["a", LONG[1]]), 3),
    (2, (8, 64), Captions("a", tiles=LONG), 1),
    (4, (300, 300), Captions("a", rows=LONG, columns=LONG), 2),
)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_are_enlarged_by_a_whole_number_and_separated(channels):
    images_NHWC = np.random.default_rng(0).integers(0, 256, (7, 8, 8, channels), np.uint8)
    captions = Captions("digits · seed 0", tiles=[*"3141592"])
    picture_HWC = captioned_grid(images_NHWC, captions)
    layout = grid_layout(7, (8, 8), captions)
    assert layout.enlarge * 8 * 3 >= 512 > (layout.enlarge - 1) * 8 * 3
    for image_HWC, tile_HWC in zip(
        images_NHWC, tiles(picture_HWC, (8, 8), captions, 7, 3), strict=True
    ):
        assert np.array_equal(image_HWC, tile_HWC)
    (y, x), (h, w) = layout.corner(0), layout.tile
    assert (picture_HWC[y : y + h, x + w : x + w + grids.GUTTER] == 255).all()


@pytest.mark.parametrize(("images", "shape", "captions", "columns"), GRIDS)
def test_words_are_neither_cut_off_nor_hidden_by_images(images, shape, captions, columns):
    layout = grid_layout(images, shape, captions, columns)
    words = grids._draw_words(layout, captions, images)
    assert words.shape == layout.size and (words < 100).any()
    edge = 3
    inside = words[edge:-edge, edge:-edge]
    assert np.count_nonzero(words < 255) == np.count_nonzero(inside < 255)
    for i in range(images):
        (y, x), (h, w) = layout.corner(i), layout.tile
        assert (words[y : y + h, x : x + w] == 255).all()


def test_row_names_are_next_to_their_rows():
    captions = Captions(rows=["3", "", "7"])
    layout = grid_layout(6, (8, 8), captions, 2)
    words = grids._draw_words(layout, captions, 6)
    heights = [layout.corner(2 * row)[0] for row in range(3)]
    inks = [(words[y : y + layout.tile[0]] < 100).any() for y in heights]
    assert inks == [True, False, True]


def test_text_that_does_not_fit_ends_in_an_ellipsis():
    font = ImageFont.load_default(14)
    assert wrapped("golden retriever", 1000, 2, font) == ["golden retriever"]
    assert wrapped("golden retriever", 80, 2, font) == ["golden", "retriever"]
    first, second = wrapped(" ".join(LONG), 80, 2, font)
    assert first == "soft-coated" and second.endswith("…")
    assert all(font.getlength(line) <= 80 for line in (first, second))
    assert wrapped("", 80, 2, font) == []


def test_letters_that_the_font_lacks_are_replaced():
    assert drawable("crème brûlée · 犬 × …") == "creme brulee · ? ? …"
    font = ImageFont.load_default(14)
    missing = bytes(font.getmask("\uffff"))
    assert all(bytes(font.getmask(letter)) != missing for letter in "·…")


def test_words_are_left_out_if_the_picture_would_be_too_large(monkeypatch):
    images_NHWC = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    monkeypatch.setattr(grids, "MOST_PIXELS", 4 * 64 * 64)
    picture_HWC = captioned_grid(images_NHWC, Captions("a"))
    assert np.array_equal(picture_HWC, image_io.image_grid(images_NHWC))
