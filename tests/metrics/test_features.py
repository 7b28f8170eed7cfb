"""Tests feature extraction, the reading of image sets, and cached reference statistics."""

import dataclasses
import hashlib
import os
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers import forked
from tests.helpers.fake_data import FakeImages, FakeSource
from tests.helpers.paths import ROOT
from varjax.data.sources import Digits, Folder
from varjax.errors import InputError
from varjax.metrics import image_sets, references
from varjax.metrics.features import (
    FeatureExtractor,
    FeatureNetwork,
    feature_network,
    feature_sizes,
    pixel_network,
)
from varjax.metrics.fid import Moments
from varjax.metrics.image_sets import DatasetImages, open_image_set
from varjax.storage import files
from varjax.storage.npz import NpzArchive

IMAGES_NHWC = np.random.default_rng(0).integers(0, 256, (23, 12, 12, 3), np.uint8)
DEVICES = """
import jax, numpy as np, sys
jax.config.update("jax_num_cpu_devices", 8)
from tests.metrics.test_features import IMAGES_NHWC, convolution
from varjax.metrics.features import FeatureExtractor
for devices in (jax.devices(), jax.devices()[:1]):
    print(FeatureExtractor(convolution(), devices)(IMAGES_NHWC)["pool_ND"].tobytes().hex())
"""


def convolution() -> FeatureNetwork:
    """Returns a small network whose order of summation may depend on the batch size."""
    kernel = np.random.default_rng(1).normal(size=(5, 5, 3, 16)).astype(np.float32)

    def apply(params, image_BHWC):
        x_BHWC = image_BHWC.astype(np.float32) / 255
        layout = ("NHWC", "HWIO", "NHWC")
        y_BHWC = jax.lax.conv_general_dilated(
            x_BHWC, params, (1, 1), "SAME", dimension_numbers=layout
        )
        return {"pool_BD": jax.numpy.tanh(y_BHWC).mean(axis=(1, 2))}

    return FeatureNetwork({"features": "convolution"}, kernel, apply)


def test_features_are_bit_identical_for_every_batch_size():
    extract = FeatureExtractor(convolution(), jax.devices()[:1])
    whole = extract(IMAGES_NHWC)["pool_ND"]
    for size in (1, 7, 64):
        parts = [extract(IMAGES_NHWC[i : i + size])["pool_ND"] for i in range(0, 23, size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.slow
def test_features_are_bit_identical_on_eight_devices_and_one():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DEVICES]
    done = forked.run(command, env=environment, capture_output=True, text=True)
    eight, one = done.stdout.split()
    assert eight == one and len(one) == 23 * 16 * 8, done.stderr


def test_gray_images_have_equal_features_with_one_or_three_channels():
    extract = FeatureExtractor(pixel_network())
    gray = IMAGES_NHWC[..., :1]
    one = extract(gray)["pool_ND"]
    np.testing.assert_array_equal(one, extract(np.repeat(gray, 3, axis=-1))["pool_ND"])
    flat = gray.reshape(23, -1) / 255
    distance = np.sum(np.square(one[0] - one[1]))
    assert distance == pytest.approx(np.sum(np.square(flat[0] - flat[1])), rel=1e-5)
    assert feature_sizes(extract.network, (12, 12, 1)) == {"pool_ND": 432}


def test_unknown_networks_and_invalid_images_are_refused():
    for arguments, message in (
        (("vgg", ""), "features=vgg: allowed are inception, pixels"),
        (("pixels", "somewhere"), "features=pixels needs no weights"),
        (("inception", ""), "inception is missing: .*--inception=FILE"),
    ):
        with pytest.raises(InputError, match=message):
            feature_network(*arguments)
    extract = FeatureExtractor(pixel_network())
    for images in (IMAGES_NHWC / 255, IMAGES_NHWC[0], IMAGES_NHWC[..., :2]):
        with pytest.raises(InputError, match="must be uint8"):
            extract(images)


def write_folder(folder, images_NHWC, names):
    for image_HWC, name in zip(images_NHWC, names, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_HWC).save(path)


def read_all(images, size=10):
    N = images.shape[0]
    parts = [range(i, min(i + size, N)) for i in range(0, N, size)]
    return np.concatenate([x for _, x in images.parts(parts)])


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_is_read_part_by_part(tmp_path, compressed):
    label_N = np.arange(23) % 5
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "x.npz", arr_0=IMAGES_NHWC, labels=label_N)
    images = open_image_set(tmp_path / "x.npz")
    assert images.shape == (23, 12, 12, 3)
    np.testing.assert_array_equal(images.label_N, label_N)
    np.testing.assert_array_equal(read_all(images), IMAGES_NHWC)
    later = dict(images.parts([range(5, 6), range(20, 23)]))  # only missing parts, as after a kill
    np.testing.assert_array_equal(later[range(20, 23)], IMAGES_NHWC[20:])
    np.savez(tmp_path / "y.npz", arr_0=IMAGES_NHWC[::-1])
    assert open_image_set(tmp_path / "y.npz").digest != images.digest


def test_a_folder_is_read_in_order_with_its_classes(tmp_path):
    write_folder(
        tmp_path / "a", IMAGES_NHWC[:3], [f"{i:06d}_label{7 - i:04d}.png" for i in range(3)]
    )
    images = open_image_set(tmp_path / "a")
    assert images.label_N.tolist() == [7, 6, 5]
    np.testing.assert_array_equal(read_all(images), IMAGES_NHWC[:3])
    write_folder(tmp_path / "b", IMAGES_NHWC[:3], ["cat/1.png", "dog/1.png", "cat/0.png"])
    images = open_image_set(tmp_path / "b")
    assert images.label_N is None  # the folder names do not say how a classifier numbers them
    np.testing.assert_array_equal(read_all(images), IMAGES_NHWC[[2, 0, 1]])
    write_folder(tmp_path / "c", IMAGES_NHWC[:2, ..., 0], ["0.png", "1.png"])
    images = open_image_set(tmp_path / "c")
    assert images.shape == (2, 12, 12, 3) and images.label_N is None
    np.testing.assert_array_equal(read_all(images)[..., 1], IMAGES_NHWC[:2, ..., 0])


def test_alpha_is_dropped_from_transparent_images_as_in_a_dataset(tmp_path):
    alpha_NHW1 = IMAGES_NHWC[:3, ..., :1]
    rgba_NHWC = np.concatenate([IMAGES_NHWC[:3], alpha_NHW1], axis=-1)
    names = ["train/cat/0.png", "train/cat/1.png", "val/cat/0.png"]
    write_folder(tmp_path / "x", rgba_NHWC, names)
    np.testing.assert_array_equal(read_all(open_image_set(tmp_path / "x")), IMAGES_NHWC[:3])
    dataset = DatasetImages(Folder(str(tmp_path / "x"), size=12, crop="center"), "train")
    np.testing.assert_array_equal(read_all(dataset), IMAGES_NHWC[:2])
    # Older versions put transparent images on white, so the digests of these must have changed.
    write_folder(tmp_path / "opaque", IMAGES_NHWC[:1], ["0.png"])
    for folder, same in (("opaque", True), ("x", False)):
        lines = hashlib.sha256()
        for file in sorted((tmp_path / folder).rglob("*.png")):
            name = file.relative_to(tmp_path / folder)
            lines.update(f"{name} {image_sets.file_digest(file)}\n".encode())
        assert (open_image_set(tmp_path / folder).digest == lines.hexdigest()) == same


def test_files_and_folders_without_valid_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "fortran.npz", arr_0=np.asfortranarray(IMAGES_NHWC))
    np.savez(tmp_path / "other.npz", images=IMAGES_NHWC)
    (tmp_path / "text.npz").write_text("no zip")
    np.savez(tmp_path / "short.npz", arr_0=IMAGES_NHWC)
    short = (tmp_path / "short.npz").read_bytes()[:-5000]
    (tmp_path / "short.npz").write_bytes(short)
    (tmp_path / "text.txt").write_text("x")
    write_folder(tmp_path / "mixed", IMAGES_NHWC[:1], ["0.png"])
    write_folder(tmp_path / "mixed", IMAGES_NHWC[:1, :6], ["1.png"])
    for name, message in (
        ("absent", "does not exist"),
        ("empty", "contains no images"),
        ("floats.npz", "float64 of shape"),
        ("fortran.npz", "arr_0 is in Fortran order"),
        ("other.npz", "arr_0 is missing; it has images"),
        ("text.npz", "cannot be read as an .npz"),
        ("short.npz", "cannot be read as an .npz"),
        ("text.txt", "use an .npz with images under arr_0, or a folder"),
        ("mixed", r"several sizes: 12x12 \(0.png\), 12x6 \(1.png\)"),
    ):
        with pytest.raises(InputError, match=message):
            open_image_set(tmp_path / name)


def test_image_statistics_are_cached_and_resumed_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "IMAGES_PER_PART", 10)
    np.savez(tmp_path / "x.npz", arr_0=IMAGES_NHWC)
    images, cache = open_image_set(tmp_path / "x.npz"), tmp_path / "cache"
    extract = FeatureExtractor(pixel_network())
    calls = []

    def failing(images_NHWC, progress):
        calls.append(len(images_NHWC))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return extract(images_NHWC, progress)

    failing.network = extract.network
    with pytest.raises(KeyboardInterrupt):
        references.reference_of_images(images, images.digest, failing, cache)
    reference = references.reference_of_images(images, images.digest, failing, cache)
    assert calls == [10, 10, 10, 3]
    expected = Moments.of(extract(IMAGES_NHWC)["pool_ND"])
    found = reference.moments["pool_ND"]
    np.testing.assert_allclose(found.mean_D, expected.mean_D, rtol=1e-12)
    np.testing.assert_allclose(found.covariance_DD, expected.covariance_DD, atol=1e-15)
    np.testing.assert_array_equal(reference.pool_MD, extract(IMAGES_NHWC)["pool_ND"])
    again = references.reference_of_images(images, images.digest, failing, cache)
    assert len(calls) == 4 and again.images == 23
    (path,) = cache.iterdir()
    assert path.suffix == ".safetensors"
    files.write_tensors(path, files.read_tensors(path)[0], {})  # as another program may
    with pytest.raises(InputError, match="lacks the number of its images; remove it"):
        references.reference_of_images(images, images.digest, failing, cache)


def test_damaged_features_and_statistics_are_recomputed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_sets, "IMAGES_PER_PART", 10)
    np.savez(tmp_path / "x.npz", arr_0=IMAGES_NHWC)
    images, cache = open_image_set(tmp_path / "x.npz"), tmp_path / "cache"
    compute, calls = FeatureExtractor(pixel_network()), []

    def extract(images_NHWC, progress):
        calls.append(len(images_NHWC))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(images_NHWC, progress)

    def flip(path):
        content = bytearray(path.read_bytes())
        content[-8] ^= 1
        path.write_bytes(content)

    extract.network = compute.network
    with pytest.raises(KeyboardInterrupt):
        references.reference_of_images(images, images.digest, extract, cache)
    (first, _) = sorted(cache.rglob("*.safetensors"))
    flip(first)
    reference = references.reference_of_images(images, images.digest, extract, cache)
    assert calls == [10, 10, 3, 10, 3]
    assert f"{first} is deleted and will be made again" in capsys.readouterr().err
    (statistics,) = cache.iterdir()
    content, pool_MD = statistics.read_bytes(), np.array(reference.pool_MD)  # copies the mmap
    flip(statistics)
    again = references.reference_of_images(images, images.digest, extract, cache)
    assert calls[5:] == [10, 10, 3] and statistics.read_bytes() == content
    assert "is damaged: the checksums of 1 of " in capsys.readouterr().err
    np.testing.assert_array_equal(again.pool_MD, pool_MD)


def test_statistics_in_a_file_are_used_as_they_are(tmp_path):
    extract = FeatureExtractor(pixel_network())
    moments = Moments.of(extract(IMAGES_NHWC[..., :1])["pool_ND"])
    arrays = {"mu": moments.mean_D, "sigma": moments.covariance_DD}
    sizes = {"pool_ND": moments.mean_D.size}
    np.savez(tmp_path / "statistics.npz", **arrays)
    found = references.read_reference(tmp_path / "statistics.npz", extract, tmp_path, sizes)
    np.testing.assert_array_equal(found.moments["pool_ND"].mean_D, moments.mean_D)
    assert found.pool_MD is None and found.images is None
    np.savez(tmp_path / "with_images.npz", arr_0=IMAGES_NHWC[:5], **arrays)
    found = references.read_reference(tmp_path / "with_images.npz", extract, tmp_path, sizes)
    np.testing.assert_array_equal(found.moments["pool_ND"].mean_D, moments.mean_D)
    np.testing.assert_array_equal(found.pool_MD, extract(IMAGES_NHWC[:5])["pool_ND"])
    with pytest.raises(InputError, match="432 numbers per image, but these features have 7"):
        references.read_reference(tmp_path / "statistics.npz", extract, tmp_path, {"pool_ND": 7})
    classifier = dataclasses.replace(pixel_network(), classes=10)
    with pytest.raises(InputError, match="statistics, which are taken to be Inception's"):
        references.read_reference(
            tmp_path / "with_images.npz", FeatureExtractor(classifier), tmp_path, sizes
        )
    np.savez(tmp_path / "half.npz", mu=moments.mean_D)
    with pytest.raises(InputError, match="has mu but no sigma"):
        references.read_reference(tmp_path / "half.npz", extract, tmp_path, sizes)
    np.savez(tmp_path / "small.npz", arr_0=IMAGES_NHWC[:, :6])
    np.savez(tmp_path / "small_with_statistics.npz", arr_0=IMAGES_NHWC[:, :6], **arrays)
    for name in ("small.npz", "small_with_statistics.npz"):
        with pytest.raises(InputError, match="use images of the samples' size"):
            references.read_reference(tmp_path / name, extract, tmp_path, sizes)


@pytest.mark.parametrize("name", ["mu", "sigma"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_refused(tmp_path, name, value):
    arrays = {"mu": np.zeros(3), "sigma": np.eye(3)}
    arrays[name].flat[-1] = value
    path, sizes = tmp_path / "x.npz", {"pool_ND": 3}
    np.savez(path, **arrays)
    extract = FeatureExtractor(pixel_network())
    with pytest.raises(InputError, match=f"x.npz: 1 of . numbers in {name} are NaN or infinite"):
        references.read_reference(path, extract, tmp_path, sizes)


def test_npz_members_that_do_not_fit_are_never_read(tmp_path, monkeypatch):
    """The headers show that statistics are of other features, or labels of other images."""
    reads = []
    read = NpzArchive.read
    monkeypatch.setattr(NpzArchive, "read", lambda self, n: reads.append(n) or read(self, n))
    path, extract = tmp_path / "x.npz", FeatureExtractor(pixel_network())
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(InputError, match="has statistics of 4 numbers per image"):
        references.read_reference(path, extract, tmp_path, {"pool_ND": 3})
    np.savez(path, arr_0=IMAGES_NHWC, labels=np.zeros(10**5, int), arr_1=np.zeros(len(IMAGES_NHWC)))
    assert open_image_set(path).label_N is None
    assert not reads


@pytest.mark.parametrize("kind", ["npz", "folder", "dataset"])
def test_the_next_part_is_read_while_one_is_used(tmp_path, monkeypatch, kind):
    second_part_read = threading.Event()

    def watch(owner, name, is_second_part):
        function = getattr(owner, name)

        def watched(*arguments):
            if is_second_part(*arguments):
                second_part_read.set()
            return function(*arguments)

        monkeypatch.setattr(owner, name, watched)

    np.savez(tmp_path / "x.npz", arr_0=IMAGES_NHWC)
    write_folder(tmp_path / "x", IMAGES_NHWC, [f"{i:02d}.png" for i in range(23)])
    if kind == "npz":
        images = open_image_set(tmp_path / "x.npz")
        watch(np, "frombuffer", lambda data, dtype: len(data) == 3 * IMAGES_NHWC[0].nbytes)
    elif kind == "folder":
        images = open_image_set(tmp_path / "x")
        watch(image_sets, "decode_file", lambda path: path.name == "20.png")
    else:
        images = DatasetImages(FakeImages(size=23), "held_out")
        watch(FakeSource, "__getitem__", lambda source, i: i == 20)
    parts = images.parts([range(20), range(20, 23)])
    next(parts)
    assert second_part_read.wait(60)
    assert [len(images_NHWC) for _, images_NHWC in parts] == [3]


def test_a_dataset_is_read_as_in_evaluation():
    images = DatasetImages(Digits(), "held_out")
    source = Digits().source("held_out")
    np.testing.assert_array_equal(read_all(images, 100), source.images_NHWC)
    assert images.digest != DatasetImages(Digits(), "train").digest


def test_broken_images_of_a_dataset_are_skipped_as_in_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_sets, "IMAGES_PER_PART", 50)
    shape = 4, 4, 3
    data = FakeImages(size=201, broken=(7, 200), image_shape=shape)  # the last part has one image
    images, extract = DatasetImages(data, "held_out"), FeatureExtractor(pixel_network())
    reference = references.reference_of_images(images, "x", extract, tmp_path)
    good = [i for i in range(201) if i not in data.broken]
    good_NHWC = np.stack([data.source("train")[i]["image"] for i in good])
    expected = Moments.of(extract(good_NHWC)["pool_ND"])
    found = reference.moments["pool_ND"]
    np.testing.assert_allclose(found.mean_D, expected.mean_D, rtol=1e-12)
    np.testing.assert_allclose(found.covariance_DD, expected.covariance_DD, atol=1e-15)
    assert reference.images == 199
    assert len(images.digest) == 64
    again = references.reference_of_images(DatasetImages(data, "held_out"), "x", extract, tmp_path)
    assert again.images == 199
    said = capsys.readouterr().err
    assert said.count("skipped: image_7.jpg") == said.count("skipped: image_200.jpg") == 1
    bad = DatasetImages(FakeImages(size=201, broken=(1, 2, 3), image_shape=shape), "held_out")
    with pytest.raises(InputError, match="3 of the 50 images read so far are broken"):
        read_all(bad, 50)


def test_hidden_folders_are_skipped_and_reported(tmp_path, capsys):
    for name in ("a.png", "b/c.png", ".ipynb_checkpoints/a.png", "b/.old/x/d.png", "b/.e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES_NHWC[0]).save(tmp_path / name)
    assert open_image_set(tmp_path).shape[0] == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/.ipynb_checkpoints is hidden and skipped (images: 1)" in said
    assert f"{tmp_path}/b/.old is hidden" in said and said.count("is hidden") == 2
    assert open_image_set(tmp_path / ".ipynb_checkpoints").shape[0] == 1  # given by name


def test_features_that_are_not_finite_are_refused():
    def broken(params, image_BHWC):
        dark_B1 = jnp.sum(image_BHWC.astype(jnp.float32), axis=(1, 2, 3))[:, None] == 0
        return {"pool_BD": jnp.where(dark_B1, jnp.nan, jnp.ones((len(image_BHWC), 2)))}

    images_NHWC = IMAGES_NHWC.copy()
    images_NHWC[[3, 11]] = 0
    with pytest.raises(
        InputError, match="pool_ND of 2 of 23 images contain NaN .* convert them again"
    ):
        FeatureExtractor(FeatureNetwork({}, {}, broken))(images_NHWC)
    with pytest.raises(InputError, match="images have 4 channels; gray .1. and RGB .3."):
        feature_sizes(pixel_network(), (8, 8, 4))
