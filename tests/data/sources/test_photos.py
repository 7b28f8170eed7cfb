import numpy as np
import pytest

from varjax.data.loader import Loader
from varjax.data.sources import Photos, parse, photos


def test_no_pixel_is_both_trained_on_and_held_out():
    sides, held_out = Photos(32).source("train"), Photos(32).source("held_out")
    columns = {label: 0 for label in range(2)}
    for side_HWC, label in sides.sides:
        columns[label] += side_HWC.shape[1]
    strip = photos.HELD_OUT.stop - photos.HELD_OUT.start
    assert columns == {0: 640 - strip, 1: 640 - strip}
    for label, photo_HWC in enumerate(photos._photographs()):
        left, right = (side for side, whose in sides.sides if whose == label)
        rest = np.concatenate([left, photo_HWC[:, photos.HELD_OUT], right], axis=1)
        np.testing.assert_array_equal(rest, photo_HWC)
        first = held_out.images_NHWC[held_out.labels_N == label][0]
        np.testing.assert_array_equal(first, photo_HWC[:32, 240:272])


def test_training_crops_come_from_everywhere_and_are_the_same_for_the_same_seed():
    data = Photos((24, 40), images=64, flip=True)
    assert (
        data.image_shape
        == (24, 40, 3)
        == Photos((24, 40)).make(2, 0).train_batch(0)["image_BHWC"].shape[1:]
    )
    a, b = (Loader(data, 32, seed=3).train_batch(5) for _ in range(2))
    np.testing.assert_array_equal(a["image_BHWC"], b["image_BHWC"])
    again = Loader(data, 32, seed=3).train_batch(7)["image_BHWC"]  # a later epoch
    assert (a["image_BHWC"] != again).any(axis=(1, 2, 3)).all()
    assert len(np.unique(data.source("train").side_N)) == 4 and set(a["label_B"]) == {0, 1}


def test_photos_are_refused_where_the_strip_is_narrower():
    assert parse("photos", 64) == Photos(64)
    with pytest.raises(ValueError, match="size is 129, but crops have at most 128"):
        Photos(129)
    with pytest.raises(ValueError, match="images is 0"):
        Photos(images=0)
