import itertools

import numpy as np
import pytest

from varjax.data.loader import Loader
from varjax.data.sources import Digits
from varjax.data.transforms import affine

DATA = Digits(shift=1.0, rotate=10.0, zoom=0.1)
RNG = np.random.default_rng(0)
IMAGE_HWC = RNG.integers(0, 256, (8, 8, 1), np.uint8)


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_the_splits_are_disjoint_complete_and_balanced():
    train, held_out = Digits().source("train"), Digits().source("held_out")
    assert len(train) + len(held_out) == 1797
    for label in range(10):
        share = np.mean(np.concatenate([train.labels_N, held_out.labels_N]) == label)
        assert abs(np.mean(held_out.labels_N == label) - share) < 0.01
    assert 0.19 < len(held_out) / 1797 <= 0.2
    example = train[0]
    assert example["image"].shape == (8, 8, 1) and example["image"].dtype == np.uint8
    assert train.images_NHWC.max() == 255
    assert [train[i]["label"] for i in range(10)] == list(range(10))


def test_affine_moves_turns_and_scales():
    np.testing.assert_array_equal(affine(IMAGE_HWC, (0, 0), 0, 1), IMAGE_HWC)
    moved = affine(IMAGE_HWC, (2, -1), 0, 1)
    np.testing.assert_array_equal(moved[2:, :-1], IMAGE_HWC[:-2, 1:])
    assert not moved[:2].any() and not moved[:, -1:].any()
    np.testing.assert_array_equal(affine(IMAGE_HWC, (0, 0), 90, 1), np.rot90(IMAGE_HWC))
    ramp = np.tile(np.arange(20, 200, 10, dtype=np.uint8)[None, :, None], (9, 1, 1))
    half = affine(ramp, (0, 0.5), 0, 1)[3:-3, 6:-6]  # far from the border, which rings
    np.testing.assert_allclose(half, ramp[3:-3, 6:-6] - 5.0, atol=1)
    dot = np.zeros((9, 9, 1), np.uint8)
    dot[4, 6] = 200
    assert affine(dot, (0, 0), 0, 1.5)[4, 7] == 200  # 2 pixels off the center become 3


def test_a_batch_depends_on_seed_and_number_alone():
    loader = Loader(DATA, 16, seed=3)
    batches = list(itertools.islice(loader.train(), 7))
    resumed = list(itertools.islice(loader.train(5), 2))
    equal(batches[5], resumed[0])
    equal(batches[6], resumed[1])
    assert np.any(batches[5]["label_B"] != Loader(DATA, 16, seed=4).train_batch(5)["label_B"])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_out_the_same_batches(processes):
    whole = Loader(DATA, 16)
    share = 16 // processes
    parts = [Loader(DATA, 16, rows=range(i, i + share)) for i in range(0, 16, share)]
    batches = [part.train_batch(9) for part in parts]
    equal(whole.train_batch(9), {k: np.concatenate([b[k] for b in batches]) for k in batches[0]})
    batches = [part.held_out_batch(22) for part in parts]
    equal(
        whole.held_out_batch(22), {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
    )


def test_every_epoch_holds_every_image_once_in_a_new_order():
    loader = Loader(Digits(), 6)  # does not divide the 1,442 images
    images = np.concatenate([loader.train_batch(i)["image_BHWC"] for i in range(2 * 1442 // 6 + 1)])
    first, second = images[:1442], images[1442:2884]
    whole = loader.train_source.images_NHWC  # type: ignore[attr-defined]
    ordered = [np.sort([image.tobytes() for image in part]) for part in (whole, first, second)]
    assert all(np.array_equal(ordered[0], part) for part in ordered[1:])
    assert np.any(first != second)


def test_augmentation_varies_from_epoch_to_epoch():
    loader = Loader(DATA, 1442)
    by_label = [loader.train_batch(i) for i in (0, 1)]
    seen = [{image.tobytes() for image in batch["image_BHWC"]} for batch in by_label]
    assert len(seen[0] & seen[1]) < 10


def test_the_held_out_split_is_seen_once_and_padding_is_marked():
    loader = Loader(DATA, 100)
    batches = list(loader.held_out())
    assert [batch["valid_B"].sum() for batch in batches] == [100, 100, 100, 55]
    assert all(batch["image_BHWC"].shape == (100, 8, 8, 1) for batch in batches)
    images = np.concatenate([batch["image_BHWC"][batch["valid_B"]] for batch in batches])
    np.testing.assert_array_equal(images, Digits().source("held_out").images_NHWC)


@pytest.mark.parametrize("rows", [range(0), range(4, 7), range(-1, 3), range(0, 6, 2)])
def test_rows_outside_of_the_batch_are_refused(rows):
    with pytest.raises(ValueError, match=r"rows is range.* some of range\(0, 6\)"):
        Loader(DATA, 6, rows=rows)
