import concurrent.futures
import errno
import io
import json
import os
import pickle
import resource
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from varjax.data.sources.tfds import TFDS
from varjax.errors import InputError, StorageError
from varjax.storage.image_files import BrokenImage


class Stripes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset in which image i has shade i, and a label that says whether i is odd."""

    VERSION = tfds.core.Version("1.2.3")
    url_infos = {}  # nothing to download; without it, TFDS needs another package

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
            "file_name": tfds.features.Text(),
            "weight": np.float32,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(20),
            "test": self._generate_examples(4, broken=2),
            "unlabeled": self._generate_examples(1, label=-1),
        }

    def _generate_examples(self, count, broken=-1, label=None):
        for i in range(count):
            file = io.BytesIO(b"no image")
            if i != broken:
                Image.new("L", (12, 10), i).save(file, "png")
                file.seek(0)
            yield (
                i,
                {
                    "image": file,
                    "label": i % 2 if label is None else label,
                    "file_name": f"{i}.png",
                    "weight": 0.0,
                },
            )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Stripes(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def data(data_dir):
    return TFDS("stripes", str(data_dir), held_out="test", size=8)


def shades(source):
    return sorted(int(source[i]["image"].max()) for i in range(len(source)))


def test_a_dataset_is_found_by_name_and_by_directory(data_dir, data):
    for found in (
        data,
        TFDS("stripes:1.2.3", str(data_dir), held_out="test"),
        TFDS(str(data_dir / "stripes/1.2.3"), held_out="test"),
    ):
        source = found.source("train")
        assert found.class_names == ("even", "odd") and found.classes == 2 and len(source) == 20
        for i in range(20):
            image_HWC, label = source[i]["image"], source[i]["label"]
            assert image_HWC.shape == (10, 12, 3) and image_HWC.dtype == np.uint8
            assert np.all(image_HWC == image_HWC[0, 0]) and label == image_HWC[0, 0, 0] % 2
        assert shades(source) == list(range(20))
    batch = data.make(4, seed=0).train_batch(0)
    assert batch["image_BHWC"].shape == (4, 8, 8, 3)
    np.testing.assert_array_equal(batch["image_BHWC"][:, 3, 3, 0] % 2, batch["label_B"])


def test_splits_may_be_slices(data_dir):
    parts = TFDS("stripes", str(data_dir), train="train[:60%]", held_out="train[60%:]")
    train, held_out = shades(parts.source("train")), shades(parts.source("held_out"))
    assert len(train) == 12 and sorted(train + held_out) == list(range(20))
    description = parts.describe()
    assert description["train"]["images"] == 12 and description["held_out"]["images"] == 8
    assert description == json.loads(json.dumps(description))


def test_an_empty_label_key_gives_one_class(data_dir):
    data = TFDS("stripes", str(data_dir), held_out="test", label_key="")
    assert data.classes == 1 and {data.source("train")[i]["label"] for i in range(20)} == {0}


def test_threads_share_a_source_and_a_pickled_copy_reopens_its_files(data):
    source = data.source("train")
    expected = [source[i]["image"][0, 0, 0] for i in range(20)]
    copy = pickle.loads(pickle.dumps(source))
    assert "records" in vars(source) and "records" not in vars(copy)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda i: copy[i % 20]["image"][0, 0, 0], range(400)))
    assert read == expected * 20


def test_images_without_a_label_are_refused_unless_label_key_is_empty(data_dir):
    data = TFDS("stripes", str(data_dir), held_out="unlabeled")
    with pytest.raises(ValueError, match=r"unlabeled\[0\] \(0.png\) has no label; choose a split"):
        data.source("held_out")[0]
    data = TFDS("stripes", str(data_dir), held_out="unlabeled", label_key="")
    assert data.source("held_out")[0]["label"] == 0


def test_a_broken_record_is_reported_by_index_and_file_name(data):
    source, broken = data.source("held_out"), []
    for i in range(4):
        try:
            source[i]
        except BrokenImage as error:
            broken.append((i, error))
    ((i, error),) = broken
    assert f"stripes test[{i}] (2.png) cannot be read" in str(error)


def test_missing_datasets_splits_and_features_are_refused_with_advice(data_dir, tmp_path):
    def refused(message, name="stripes", **options):
        options = {"held_out": "test"} | options
        with pytest.raises(ValueError, match=message):
            TFDS(name, str(data_dir), **options).describe()

    refused("cifar10 is not prepared in .*builder..cifar10., file_format=", "cifar10")
    refused("holds no prepared dataset: .* varjax prepare", str(tmp_path))
    refused("no split 'validation', but .'test', 'train', 'unlabeled'.", held_out="validation")
    refused("no split 'train.:5', but", train="train[:5")
    refused("split 'train.:0.' of stripes holds no images", train="train[:0]")
    refused("no feature 'picture' of kind Image.*'image': 'Image'", image_key="picture")
    refused("no feature 'weight' of kind ClassLabel", label_key="weight")
    shutil.copytree(data_dir / "stripes/1.2.3", tmp_path / "old")
    info = tmp_path / "old/dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    refused(
        "stored as tfrecord, which has no random access; prepare it again",
        str(tmp_path / "old"),
    )


@pytest.mark.parametrize(
    "file, content",
    [
        ("features.json", {"pythonClassName": "tensorflow_datasets.core.features.none.Such"}),
        ("features.json", {}),
        ("dataset_info.json", {"splits": 5}),
        ("dataset_info.json", []),
    ],
)
def test_metadata_that_tfds_refuses_is_reported_in_one_message(data_dir, tmp_path, file, content):
    shutil.copytree(data_dir / "stripes/1.2.3", folder := tmp_path / "bad")
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match="TFDS cannot open .*bad .*copy or prepare it again"):
        TFDS(str(folder), held_out="test").describe()


def test_metadata_cannot_import_classes_from_outside_tfds(data_dir, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    whole, folder = data_dir / "stripes/1.2.3", tmp_path / "bad"
    shutil.copytree(whole, folder)
    features = json.loads((whole / "features.json").read_text())
    text = {"pythonClassName": "evil.Text", "text": {}}
    nested = {"feature": {"type": "evil.Text", "content": {}}, "length": None}
    hidden = {"jsonFeature": {"json": json.dumps(nested)}}
    hidden["pythonClassName"] = "tensorflow_datasets.core.features.dataset_feature.Dataset"
    legacy = {"type": "tensorflow_datasets.core.features.features_dict.FeaturesDict"}
    legacy["content"] = {"image": {"type": "evil.Image", "content": {}}}
    for name, bad in {
        "other": features | {"pythonClassName": "evil.Features"},
        "inner": {**features, "featuresDict": {"features": {"image": text}}},
        "snake case": {
            **features,
            "featuresDict": {"features": {"x": {"python_class_name": "evil.X"}}},
        },
        "text": {**features, "featuresDict": {"features": {"x": hidden}}},
        "legacy": legacy,
        "other module of TFDS": features | {"pythonClassName": "tensorflow_datasets.scripts.x.Y"},
    }.items():
        (folder / "features.json").write_text(json.dumps(bad).replace("pythonC", "\\u0070ythonC"))
        with pytest.raises(InputError, match="names the class .*which TFDS would import; allowed"):
            TFDS(str(folder), held_out="test").describe()
        assert "evil" not in sys.modules, name
        shutil.copytree(folder, tmp_path / "root/stripes/1.2.3", dirs_exist_ok=True)
        with pytest.raises(InputError, match="which TFDS would import"):
            TFDS("stripes", str(tmp_path / "root"), held_out="test").describe()
    (folder / "features.json").write_text("[" * 10**5)
    with pytest.raises(InputError, match="not valid JSON|nested too deeply"):
        TFDS(str(folder), held_out="test").describe()


def test_errors_of_the_machine_are_not_taken_for_damaged_records(data_dir, tmp_path, monkeypatch):
    folder = tmp_path / "root/stripes/1.2.3"
    shutil.copytree(data_dir / "stripes/1.2.3", folder)
    data = TFDS("stripes", str(tmp_path / "root"), held_out="test", size=8)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    whole = os.stat
    with monkeypatch.context() as patched:

        def stale(path, *arguments, **options):
            if str(path).endswith("dataset_info.json"):
                raise OSError(errno.ESTALE, "made to fail", path)
            return whole(path, *arguments, **options)

        patched.setattr(os, "stat", stale)
        with pytest.raises(StorageError, match="1.2.3 cannot be read now: Stale file handle"):
            TFDS(str(folder)).builder()
    source, train = data.source("held_out"), data.source("train")
    assert len(source) == 4 and len(train) == 20  # files of records are opened by the first read
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        with pytest.raises(
            StorageError, match=r"test\[0\] cannot be read now: Too many open files"
        ):
            source[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert source[0]["image"].shape == (10, 12, 3)  # readable once files can be opened
    (file,) = folder.glob("*train*record*")
    content = bytearray(file.read_bytes())
    content[content.index(b"PNG") + 40] ^= 0xFF
    file.write_bytes(content)
    found = []
    for i in range(20):
        try:
            train[i]
        except BrokenImage as error:
            found.append(error)
    (error,) = found
    assert "stripes train[" in error.name and "hash mismatch" in error.reason
    file.unlink()
    with pytest.raises(InputError, match="No such file.*; copy or prepare the dataset again"):
        data.source("train")[0]


def test_the_limit_on_open_files_is_raised(data):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1100:
        pytest.skip("this machine allows no more open files")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
        assert len(data.source("train")) == 20
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
