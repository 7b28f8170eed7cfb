import numpy as np

from varjax.data.sources import Digits
from varjax.data.transforms import affine

RNG = np.random.default_rng(0)
IMAGE_HWC = RNG.integers(0, 256, (8, 8, 1), np.uint8)


def test_the_splits_are_complete_and_balanced():
    train, held_out = Digits().source("train"), Digits().source("held_out")
    images = [{x.tobytes() for x in split.images_NHWC} for split in (train, held_out)]
    assert not images[0] & images[1]
    assert len(train) + len(held_out) == 1797
    for label in range(10):
        share = np.mean(np.concatenate([train.labels_N, held_out.labels_N]) == label)
        assert abs(np.mean(held_out.labels_N == label) - share) < 0.01
    assert 0.19 < len(held_out) / 1797 <= 0.2
    example = train[0]
    assert example["image"].shape == (8, 8, 1) and example["image"].dtype == np.uint8
    assert train.images_NHWC.max() == 255
    assert [train[i]["label"] for i in range(10)] == list(range(10))


def test_affine_shifts_rotates_and_scales():
    np.testing.assert_array_equal(affine(IMAGE_HWC, (0, 0), 0, 1), IMAGE_HWC)
    moved = affine(IMAGE_HWC, (2, -1), 0, 1)
    np.testing.assert_array_equal(moved[2:, :-1], IMAGE_HWC[:-2, 1:])
    assert not moved[:2].any() and not moved[:, -1:].any()
    np.testing.assert_array_equal(affine(IMAGE_HWC, (0, 0), 90, 1), np.rot90(IMAGE_HWC))
    ramp = np.tile(np.arange(20, 200, 10, dtype=np.uint8)[None, :, None], (9, 1, 1))
    half = affine(ramp, (0, 0.5), 0, 1)[3:-3, 6:-6]  # without the border, where interpolation rings
    np.testing.assert_allclose(half, ramp[3:-3, 6:-6] - 5.0, atol=1)
    dot = np.zeros((9, 9, 1), np.uint8)
    dot[4, 6] = 200
    assert affine(dot, (0, 0), 0, 1.5)[4, 7] == 200  # 2 pixels off the center become 3
