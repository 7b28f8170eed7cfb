import pathlib

import numpy as np
import pytest
from PIL import Image

from varjax.data.loader import make_loader
from varjax.data.photos import write_photos
from varjax.data.sources import Photos, parse_dataset, photos
from varjax.metrics.image_sets import DatasetImages


def test_training_and_held_out_crops_share_no_pixels():
    sides, held_out = Photos(32).source("train"), Photos(32).source("held_out")
    columns = {label: 0 for label in range(2)}
    for side_HWC, label in sides.parts:
        columns[label] += side_HWC.shape[1]
    strip = photos.HELD_OUT_WIDTH
    assert columns == {0: 640 - strip, 1: 640 - strip}
    for label, photo_HWC in enumerate(photos.photographs()):
        left, right = (side for side, whose in sides.parts if whose == label)
        rest = np.concatenate([left, photo_HWC[:, photos.HELD_OUT_COLUMNS], right], axis=1)
        np.testing.assert_array_equal(rest, photo_HWC)
        first = held_out.images_NHWC[held_out.labels_N == label][0]
        np.testing.assert_array_equal(first, photo_HWC[:32, 240:272])


def test_training_crops_come_from_all_parts_and_are_reproducible():
    data = Photos((24, 40), images=64, flip=True)
    assert (
        data.image_shape
        == (24, 40, 3)
        == Photos((24, 40)).make(2, 0).train_batch(0)["image_BHWC"].shape[1:]
    )
    a, b = (make_loader(data, 32, seed=3).train_batch(5) for _ in range(2))
    np.testing.assert_array_equal(a["image_BHWC"], b["image_BHWC"])
    again = make_loader(data, 32, seed=3).train_batch(7)["image_BHWC"]  # a later epoch
    assert (a["image_BHWC"] != again).any(axis=(1, 2, 3)).all()
    assert len(np.unique(data.source("train").part_N)) == 4 and set(a["label_B"]) == {0, 1}


def test_crops_larger_than_the_held_out_strip_are_refused():
    assert parse_dataset("photos", 64) == Photos(64)
    with pytest.raises(ValueError, match="size is 129, but crops have at most 128"):
        Photos(129)
    with pytest.raises(ValueError, match="images=0: must be at least 1"):
        Photos(images=0)


def test_write_photos_holds_out_the_same_columns(monkeypatch):
    bright_HWC = np.zeros((427, 640, 3), np.uint8)
    bright_HWC[:, photos.HELD_OUT_COLUMNS] = 255
    monkeypatch.setattr(photos, "photographs", lambda: (bright_HWC, bright_HWC))
    assert "6 + 4 images in each" in write_photos("x", size=16, train=6, val=4)
    for folder, count, brightness in (("train", 6, 0), ("val", 4, 255)):
        for name in photos.PHOTO_NAMES:
            paths = list(pathlib.Path("x", folder, name).iterdir())
            crops = [np.asarray(Image.open(path)) for path in paths]
            assert len(crops) == count and all((crop == brightness).all() for crop in crops)
            assert all(16 <= side <= 32 for crop in crops for side in crop.shape[:2])
    with pytest.raises(ValueError, match="x exists and contains train, val, which would be lost"):
        write_photos("x")


def test_evaluation_gets_crops_of_one_size_from_both_splits():
    """As a reference for evaluation, training photographs are cropped too."""
    data = Photos((24, 40))
    for split in ("train", "held_out"):
        ((_, images_NHWC),) = DatasetImages(data, split).parts([range(3)])
        assert images_NHWC.shape == (3, 24, 40, 3)
