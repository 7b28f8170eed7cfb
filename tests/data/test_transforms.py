import numpy as np
import pytest
from PIL import Image

from varjax.data import transforms

RNG = np.random.default_rng(0)
NOISE_HWC = RNG.integers(0, 256, (50, 83, 3), np.uint8)


def official_center_crop(image_HWC, size):
    """What the official trainer does to a validation image, by the rules of torchvision."""
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
def test_the_middle_is_what_the_official_trainer_takes(shape, size):
    image_HWC = RNG.integers(0, 256, (*shape, 3), np.uint8)
    expected = official_center_crop(image_HWC, size)
    np.testing.assert_array_equal(transforms.center_crop(image_HWC, (size, size)), expected)


def test_an_image_is_resized_until_it_just_covers_the_size():
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
def test_random_crops_reach_every_place_and_no_further(size):
    image_HWC = NOISE_HWC[:20, :28]
    resized = transforms.resize_to_cover(image_HWC, *(round(1.125 * side) for side in size))
    views = np.lib.stride_tricks.sliding_window_view(resized, (*size, 3))[:, :, 0]
    places = {view.tobytes(): place for place, view in _places(views)}
    rng, seen = np.random.default_rng(1), []
    for _ in range(12 * len(places)):
        seen.append(places[transforms.random_crop(image_HWC, rng, size).tobytes()])
    assert set(seen) == set(places.values())


def test_flips_mirror_every_second_view_and_change_nothing_else():
    plain, flipping = np.random.default_rng(2), np.random.default_rng(2)
    flipped = 0
    for _ in range(200):
        crop = transforms.random_crop(NOISE_HWC, plain, (32, 32))
        view = transforms.random_crop(NOISE_HWC, flipping, (32, 32), flip=True)
        flipped += np.array_equal(view, crop[:, ::-1])
        assert np.array_equal(view, crop) or np.array_equal(view, crop[:, ::-1])
    assert 70 < flipped < 130


def test_the_numbers_drawn_do_not_depend_on_the_image():
    states = []
    for image_HWC in (NOISE_HWC, NOISE_HWC[:20, :20], NOISE_HWC[..., :1]):
        for flip in (False, True):
            rng = np.random.default_rng(3)
            transforms.random_crop(image_HWC, rng, (16, 16), flip)
            states.append(rng.bit_generator.state)
    assert all(state == states[0] for state in states)


def test_settings_of_a_view_are_checked():
    assert transforms.height_width(5) == (5, 5) and transforms.height_width((4, 6)) == (4, 6)
    for size, channels in ((0, 3), ((4, -1), 3), (8, 2)):
        with pytest.raises(ValueError, match="size is|channels is 2"):
            transforms.check_image_size(size, channels)


def _places(views):
    return [((y, x), views[y, x]) for y in range(views.shape[0]) for x in range(views.shape[1])]
