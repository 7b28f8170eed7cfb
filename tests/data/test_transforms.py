import numpy as np
import pytest
from PIL import Image

from varjax.data import transforms
from varjax.data.sources import Folder

RNG = np.random.default_rng(0)
NOISE_HWC = RNG.integers(0, 256, (50, 83, 3), np.uint8)


def official_center_crop(image_HWC, size):
    """Crops a validation image as the official trainer does with torchvision."""
    height, width, _ = image_HWC.shape
    short = round(1.125 * size)
    if height <= width:
        new = int(short * width / height), short
    else:
        new = short, int(short * height / width)
    resized = Image.fromarray(image_HWC).resize(new, Image.Resampling.LANCZOS)
    left, top = int(round((new[0] - size) / 2.0)), int(round((new[1] - size) / 2.0))
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("size", [8, 20, 31, 64])
@pytest.mark.parametrize("shape", [(50, 83), (83, 50), (41, 41), (9, 200), (37, 36)])
def test_center_crop_equals_that_of_the_official_trainer(shape, size):
    image_HWC = RNG.integers(0, 256, (*shape, 3), np.uint8)
    expected = official_center_crop(image_HWC, size)
    np.testing.assert_array_equal(transforms.center_crop(image_HWC, (size, size)), expected)


def test_resize_to_cover_resizes_until_the_image_just_covers_the_size():
    def shape(height, width):
        return transforms.resize_to_cover(NOISE_HWC, height, width).shape[:2]

    assert shape(25, 25) == (25, 41)  # 41.5, rounded down
    assert shape(25, 60) == (36, 60)
    assert shape(10, 83) == (50, 83)
    assert transforms.resize_to_cover(NOISE_HWC, 50, 50) is NOISE_HWC
    gray_HWC = NOISE_HWC[..., :1]
    resized = transforms.resize_to_cover(gray_HWC, 20, 20)
    expected = Image.fromarray(gray_HWC[..., 0]).resize((33, 20), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(resized[..., 0], np.asarray(expected))


@pytest.mark.parametrize("size", [(8, 8), (4, 16), (16, 4)])
def test_random_crops_reach_every_position_and_no_others(size):
    image_HWC = NOISE_HWC[:20, :28]
    resized = transforms.resize_to_cover(image_HWC, *(round(1.125 * side) for side in size))
    views = np.lib.stride_tricks.sliding_window_view(resized, (*size, 3))[:, :, 0]
    places = {view.tobytes(): place for place, view in _places(views)}
    rng, seen = np.random.default_rng(1), []
    for _ in range(12 * len(places)):
        seen.append(places[transforms.random_crop(image_HWC, rng, size).tobytes()])
    assert set(seen) == set(places.values())


def test_flip_mirrors_about_half_of_random_crops_and_changes_nothing_else():
    plain, flipping = np.random.default_rng(2), np.random.default_rng(2)
    flipped = 0
    for _ in range(200):
        crop = transforms.random_crop(NOISE_HWC, plain, (32, 32))
        view = transforms.random_crop(NOISE_HWC, flipping, (32, 32), flip=True)
        flipped += np.array_equal(view, crop[:, ::-1])
        assert np.array_equal(view, crop) or np.array_equal(view, crop[:, ::-1])
    assert 70 < flipped < 130


def test_the_random_numbers_drawn_do_not_depend_on_the_image():
    states = []
    for image_HWC in (NOISE_HWC, NOISE_HWC[:20, :20], NOISE_HWC[..., :1]):
        for flip in (False, True):
            rng = np.random.default_rng(3)
            transforms.random_crop(image_HWC, rng, (16, 16), flip)
            states.append(rng.bit_generator.state)
    assert all(state == states[0] for state in states)


def adm_code(image_HWC, size):
    """Crops with a copy of `center_crop_arr` from the guided-diffusion repository."""
    pil_image = Image.fromarray(image_HWC)
    while min(*pil_image.size) >= 2 * size:
        pil_image = pil_image.resize(tuple(x // 2 for x in pil_image.size), resample=Image.BOX)
    scale = size / min(*pil_image.size)
    pil_image = pil_image.resize(
        tuple(round(x * scale) for x in pil_image.size), resample=Image.BICUBIC
    )
    arr = np.array(pil_image)
    crop_y, crop_x = (arr.shape[0] - size) // 2, (arr.shape[1] - size) // 2
    return arr[crop_y : crop_y + size, crop_x : crop_x + size]


SHAPES = [(300, 517), (64, 64), (129, 128), (128, 127), (517, 128), (50, 83), (9, 40), (40, 9)]


@pytest.mark.parametrize("size", [64, 31])
@pytest.mark.parametrize("shape", SHAPES)
def test_adm_center_crop_equals_the_original_code(shape, size):
    alpha_HWC = RNG.integers(0, 256, (*shape, 4), np.uint8)
    for image_HWC in (alpha_HWC, alpha_HWC[..., :3]):
        np.testing.assert_array_equal(
            transforms.adm_center_crop(image_HWC, (size, size)), adm_code(image_HWC, size)
        )
    gray_HWC = image_HWC[..., :1]
    found = transforms.adm_center_crop(gray_HWC, (size, size))
    np.testing.assert_array_equal(found, adm_code(gray_HWC[..., 0], size)[..., None])


def test_adm_center_crops_that_are_not_square_cover_both_sides():
    image_HWC = RNG.integers(0, 256, (64, 64, 3), np.uint8)
    half_HWC = np.asarray(Image.fromarray(image_HWC).resize((32, 32), Image.Resampling.BOX))
    wide, high = (transforms.adm_center_crop(image_HWC, size) for size in ((16, 32), (32, 16)))
    np.testing.assert_array_equal(wide, half_HWC[8:24])
    np.testing.assert_array_equal(high, half_HWC[:, 8:24])
    for shape in SHAPES:
        for size in ((7, 31), (31, 7), (13, 11)):
            gray_HWC = np.full((*shape, 1), 255, np.uint8)  # black beyond the border
            assert np.array_equal(
                transforms.adm_center_crop(gray_HWC, size), np.full((*size, 1), 255)
            )


def test_center_crops_are_mirrored_in_every_second_view():
    state = RNG.bit_generator.state
    for flip in (False, True):
        views = [
            Folder("", (16, 12), crop="center", flip=flip).augment(NOISE_HWC, view, RNG)
            for view in range(7, 11)
        ]
        plain = Folder("", (16, 12), crop="center").preprocess(NOISE_HWC)
        for view, found in zip(range(7, 11), views, strict=True):
            mirrored = flip and view % 2 == 1
            np.testing.assert_array_equal(found, plain[:, ::-1] if mirrored else plain)
    assert RNG.bit_generator.state == state


@pytest.mark.parametrize("flip", [False, True])
def test_random_crops_do_not_depend_on_the_index_of_the_view(flip):
    plain, viewed = np.random.default_rng(4), np.random.default_rng(4)
    for view in range(6):
        expected = transforms.random_crop(NOISE_HWC, plain, (16, 12), flip)
        found = Folder("", (16, 12), flip=flip).augment(NOISE_HWC, view, viewed)
        np.testing.assert_array_equal(found, expected)
    assert plain.bit_generator.state == viewed.bit_generator.state
    np.testing.assert_array_equal(
        Folder("", (16, 12)).preprocess(NOISE_HWC),
        transforms.center_crop(NOISE_HWC, (16, 12)),
    )


def test_crop_size_and_channels_are_checked():
    with pytest.raises(ValueError, match="crop=centre: must be random or center"):
        Folder("", crop="centre")
    assert transforms.height_width(5) == (5, 5) and transforms.height_width((4, 6)) == (4, 6)
    for size, channels in ((0, 3), ((4, -1), 3), (8, 2)):
        with pytest.raises(ValueError, match="size is|channels is 2"):
            transforms.check_image_size(size, channels)


def _places(views):
    return [((y, x), views[y, x]) for y in range(views.shape[0]) for x in range(views.shape[1])]
