"""Tests the reader of IDX files, the format of MNIST."""

import gzip
import hashlib
import pathlib
import pickle
import re
import struct

import numpy as np
import pytest

from varjax.data.sources import Idx, idx, parse_dataset
from varjax.data.sources.folder import Folder
from varjax.errors import DamagedFileError, InputError

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
TRAIN_LABELS, HELD_OUT_LABELS = [2, 0, 1, 1, 0, 2, 0], [1, 2, 0, 1]


def idx_bytes(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def images(labels, height=6, width=5):
    """Returns images whose first pixel is the position and whose second pixel is the label."""
    image_NHW = np.zeros((len(labels), height, width), np.uint8)
    image_NHW[:, 0, 0], image_NHW[:, 0, 1] = np.arange(len(labels)), labels
    return image_NHW


def write(folder, prefix="", test="t10k", packed=True, first_label=0, transposed=False, **sizes):
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    for split, labels in (("train", TRAIN_LABELS), (test, HELD_OUT_LABELS)):
        image_NHW = images(labels, **sizes)
        image_NHW = image_NHW.swapaxes(1, 2) if transposed else image_NHW
        for kind, array in (
            ("images-idx3", image_NHW),
            ("labels-idx1", np.array(labels) + first_label),
        ):
            path = folder / f"{prefix}{split}-{kind}-ubyte{'.gz' * packed}"
            path.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))


def test_training_images_are_in_file_order_and_held_out_ones_sorted_by_class():
    write("x")
    data = Idx("x")
    assert data.image_shape == (6, 5, 1) and data.class_names == ("0", "1", "2")
    train, held_out = data.source("train"), data.source("held_out")
    np.testing.assert_array_equal(train.images_NHWC[..., 0], images(TRAIN_LABELS))
    np.testing.assert_array_equal(train.labels_N, TRAIN_LABELS)
    # Sorted by class, and in the file's order within a class.
    np.testing.assert_array_equal(held_out.labels_N, [0, 1, 1, 2])
    np.testing.assert_array_equal(held_out.images_NHWC[:, 0, 0, 0], [2, 0, 3, 1])
    np.testing.assert_array_equal(held_out.images_NHWC[:, 0, 1, 0], held_out.labels_N)
    batch = data.make(4, seed=0).train_batch(0)
    np.testing.assert_array_equal(batch["image_BHWC"][:, 0, 1, 0], batch["label_B"])
    copy = pickle.loads(pickle.dumps(data)).source("train")
    np.testing.assert_array_equal(copy.images_NHWC, train.images_NHWC)


def test_compression_and_file_names_do_not_change_the_data():
    write("packed")
    write("plain", packed=False)
    assert Idx("packed").describe() == Idx("plain").describe()
    for path in pathlib.Path("plain").iterdir():  # names that some unpacking programs give
        path.rename(path.with_name(path.name.replace("-idx", ".idx") + ".gz"))
    assert Idx("packed").describe() == Idx("plain").describe()
    write("other")
    images_file = pathlib.Path("other/t10k-images-idx3-ubyte.gz")
    images_file.write_bytes(gzip.compress(idx_bytes(images(HELD_OUT_LABELS) + 1)))
    packed, other = Idx("packed").describe(), Idx("other").describe()
    assert packed["train"] == other["train"] and packed["held_out"] != other["held_out"]


@pytest.mark.parametrize("packed", [True, False])
def test_a_known_dataset_has_class_names(monkeypatch, packed):
    write("x")
    labels = pathlib.Path("x/train-labels-idx1-ubyte.gz").read_bytes()
    known = labels if packed else bytes(TRAIN_LABELS)
    digest = hashlib.sha256(known).hexdigest()
    monkeypatch.setattr(idx, "KNOWN_CLASSES", {digest: ("ant", "bee", "cow")})
    assert Idx("x").class_names == ("ant", "bee", "cow")
    write("unpacked", packed=False)  # only a digest of labels without header fits any packing
    assert Idx("unpacked").class_names == (("0", "1", "2") if packed else ("ant", "bee", "cow"))


def test_emnist_letters_are_numbered_from_zero_and_turned_upright():
    letters = [*range(26)]
    image_NHW = images(letters, 4, 4)
    pathlib.Path("x").mkdir()
    for split in ("train", "test"):
        for kind, array in (
            ("images-idx3", image_NHW.swapaxes(1, 2)),
            ("labels-idx1", np.array(letters) + 1),
        ):
            path = pathlib.Path(f"x/emnist-letters-{split}-{kind}-ubyte")
            path.write_bytes(idx_bytes(array))
    data = Idx("x")
    assert data.class_names[:2] == ("A", "B") and data.classes == 26
    np.testing.assert_array_equal(data.source("train").images_NHWC[..., 0], image_NHW)
    np.testing.assert_array_equal(data.source("held_out").labels_N, letters)


def test_the_path_names_one_of_several_datasets_in_a_folder():
    for name in ("emnist-digits-", "emnist-mnist-"):
        write("x", name, test="test", transposed=True)
    with pytest.raises(InputError, match="holds 2 data sets: emnist-digits, emnist-mnist; name"):
        Idx("x").classes  # noqa: B018
    data = Idx("x/emnist-mnist")
    assert data.class_names == ("0", "1", "2") and data.image_shape == (6, 5, 1)
    with pytest.raises(
        InputError, match="no idx files such as .*; x has those of emnist-digits, emnist-m"
    ):
        Idx("x/emnist-letters").classes  # noqa: B018


def test_a_size_other_than_that_of_the_files_is_refused():
    write("x", height=8, width=8)
    assert parse_dataset("idx:x", 8) == Idx("x")
    with pytest.raises(InputError, match="images in x are 8 by 8 pixels, not 256; choose"):
        parse_dataset("idx:x", 256)


def test_images_are_augmented_on_request():
    write("x", height=8, width=8)
    image_HWC = Idx("x").source("train")[3]["image"]
    rng = np.random.default_rng(0)
    assert Idx("x").augment(image_HWC, 0, rng) is image_HWC
    moved_HWC = Idx("x", shift=2.0).augment(image_HWC, 0, rng)
    assert moved_HWC.shape == image_HWC.shape and (moved_HWC != image_HWC).any()


def swap(a, b):
    a, b = (pathlib.Path("x") / f"{name}-ubyte.gz" for name in (a, b))
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def damage(name, change, packed=True):
    path = pathlib.Path("x") / f"{name}-ubyte.gz"
    content = path.read_bytes()
    content = change(gzip.decompress(content)) if packed else change(content)
    path.write_bytes(gzip.compress(content) if packed else content)


TRAIN_IMAGES = "train-images-idx3"


def swap_splits():
    swap(TRAIN_IMAGES, "t10k-images-idx3")
    swap("train-labels-idx1", "t10k-labels-idx1")


def remove_labels():
    pathlib.Path("x/t10k-labels-idx1-ubyte.gz").unlink()


def other_sizes(content):
    return content[:11] + b"\5" + content[12:15] + b"\6" + content[16:]


def no_ones(content):
    return content[:8] + content[8:].replace(b"\1", b"\0")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda: swap(TRAIN_IMAGES, "train-labels-idx1"), "should .*; were the files swapped"),
        (lambda: swap("train-labels-idx1", "t10k-labels-idx1"), "has 4 labels for the 7 images in"),
        (swap_splits, "has 4 images, fewer than .* with 7; were they swapped"),
        (
            lambda: damage("t10k-labels-idx1", lambda x: x[:-1] + b"\7"),
            "labels from 0 to 7, outside",
        ),
        (lambda: damage("train-labels-idx1", no_ones), "no training images of 1 of 3 classes"),
        (lambda: damage(TRAIN_IMAGES, lambda x: b"\x89PNG" + x[4:]), "begins with 89504e47; give"),
        (remove_labels, "lacks 1 of 4 files, among them t10k-labels"),
        (lambda: damage("t10k-images-idx3", other_sizes), "has images of other sizes"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(spoil, message):
    write("x")
    spoil()
    with pytest.raises(InputError, match=message):
        Idx("x").describe()


@pytest.mark.parametrize(
    ("change", "packed", "message"),
    [
        (lambda x: x[:-1], True, "210 bytes should follow its header, but 209 do"),
        (lambda x: x + b"\0", True, "210 bytes should follow its header, but more do"),
        (lambda x: x[:9], True, "it ends in its header"),
        (lambda x: x[:5] + b"\xff" + x[6:], True, "more than the file can hold"),
        (lambda x: x[:12] + bytes(4), True, r"its images have \(6, 0\) pixels"),
        (lambda x: x[:-9], False, "Compressed file ended|210 bytes should follow"),
        (lambda x: x[:30] + bytes([x[30] ^ 8]) + x[31:], False, "is damaged: "),
        (lambda x: x[:-5] + bytes([x[-5] ^ 1]) + x[-4:], False, "is damaged: CRC check failed"),
    ],
)
def test_damaged_files_are_refused(change, packed, message):
    write("x")
    damage(TRAIN_IMAGES, change, packed)
    with pytest.raises(DamagedFileError, match=f"{TRAIN_IMAGES}-ubyte.gz is damaged: .*") as error:
        Idx("x").describe()
    assert re.search(message, str(error.value))


@pytest.mark.parametrize("root", ["", "nowhere", "empty"])
def test_a_folder_without_idx_files_is_refused(root):
    pathlib.Path("empty").mkdir()
    with pytest.raises(InputError, match="root is empty|holds no idx files such as train-images"):
        Idx(root).classes  # noqa: B018


def test_folder_points_to_idx_where_a_folder_has_idx_files():
    write("x")
    with pytest.raises(InputError, match="x has no images; .*idx files.*data=idx:x"):
        Folder("x").class_names  # noqa: B018
        Folder("x").source("train")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs apt-get install dataset-fashion-mnist")
def test_fashion_mnist_from_debian_is_read():
    data = Idx(str(DEBIAN))
    assert data.class_names[0] == "T-shirt/top" and data.class_names[-1] == "Ankle boot"
    assert data.image_shape == (28, 28, 1)
    described = data.describe()
    assert (described["train"]["images"], described["held_out"]["images"]) == (60_000, 10_000)
    np.testing.assert_array_equal(np.bincount(data.source("train").labels_N), 6000)
    assert data.source("train").images_NHWC.mean() == pytest.approx(72.94, abs=0.01)
