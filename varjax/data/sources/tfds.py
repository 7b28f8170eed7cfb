"""Reads datasets that TensorFlow Datasets prepared as array_record, without TensorFlow."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import resource
from collections.abc import Iterator
from typing import Any

from varjax.data import transforms
from varjax.data.array_record import load_tfds
from varjax.data.loader import make_loader
from varjax.data.sources.folder import ONE_CLASS_NAMES
from varjax.data.stream import Split
from varjax.data.workers import ReadOptions
from varjax.errors import InputError
from varjax.runtime.reproducibility import pixels_digest
from varjax.storage import files
from varjax.storage.buckets import in_bucket
from varjax.storage.image_files import BrokenImage, decode_file
from varjax.storage.read_errors import machine_errno, retry_read
from varjax.storage.untrusted import reason, shown

# Prepares a dataset once, on a machine with TensorFlow.
PREPARE_HINT = (
    'tfds.builder("{}", file_format="array_record").download_and_prepare(), see docs/data.md'
)
CORRUPTED = "Corrupted Riegeli/records file"  # a wrong checksum of a record
# A dataset names the classes that TFDS imports to read it; only those of TFDS are allowed.
FEATURES_FILE, FEATURE_MODULES = "features.json", "tensorflow_datasets.core.features."
CLASS_KEYS = "pythonClassName", "python_class_name", "type"  # the last one in older files


@dataclasses.dataclass(frozen=True)
class TFDS:
    """A TFDS dataset, by its name in `data_dir` or by its directory.

    Nothing is downloaded; the InputError for a missing dataset explains how to prepare it.

        data = TFDS("cifar10", held_out="test", size=32)

    Attributes:
        name: name of the dataset, such as "imagenet2012", "cifar10:3.0.2" or "lsun/church"; or a
            directory with dataset_info.json, as `varjax prepare` writes it.
        data_dir: folder of the datasets; "" for the default of TFDS.
        train: split of the training images, or a part of one, "train[:95%]".
        held_out: split of the held-out images, or a part of one.
        size: pixels of both sides, or (height, width).
        channels: number of channels: 1 (gray), 3 (RGB) or 4 (with alpha).
        crop: kind of crop: "random" resizes and crops as VAR does, at a random position in
            training; "center" resizes and crops the middle, as ADM and MAR do.
        flip: whether to mirror half of the training images: random crops at random, center crops in
            every second epoch.
        image_key: name of the feature with the image.
        label_key: name of the feature with the class; "" to treat all images as one class.
        reading: numbers of threads and worker processes that read.
    """

    name: str
    data_dir: str = ""
    train: str = "train"
    held_out: str = "validation"
    size: int | tuple[int, int] = 256
    channels: int = 3
    crop: transforms.Crop = "random"
    flip: bool = False
    image_key: str = "image"
    label_key: str = "label"
    reading: ReadOptions = ReadOptions()

    make = make_loader
    augment = transforms.augment_photograph
    preprocess = transforms.crop_photograph

    def __post_init__(self):
        transforms.check_photographs(self)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        if not self.label_key:
            return ONE_CLASS_NAMES
        return tuple(self.builder().info.features[self.label_key].names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return *transforms.height_width(self.size), self.channels

    @property
    def alternating_views(self) -> int:
        return transforms.photograph_views(self)

    def source(self, split: Split) -> "TFDSSource":
        """Opens a split, in the dataset's order."""
        return TFDSSource(self, self.train if split == "train" else self.held_out)

    def describe(self) -> dict[str, Any]:
        """Returns class names, and data that reveal whether the images have changed."""
        info, splits = self.builder().info, (self.train, self.held_out)
        train, held_out = (
            {"images": len(TFDSSource(self, split)), "split": split, "dataset": info.full_name}
            | {"bytes": int(info.dataset_size)}
            for split in splits
        )
        names, pixels = list(self.class_names), pixels_digest()
        return {"class_names": names, "pixels": pixels, "train": train, "held_out": held_out}

    def builder(self) -> Any:
        """Opens the dataset as a tfds.core.DatasetBuilder with images and labels."""
        tfds = load_tfds()
        builder = _open(self.name, self.data_dir)
        features = builder.info.features
        wanted: dict[str, type] = {self.image_key: tfds.features.Image}
        if self.label_key:
            wanted[self.label_key] = tfds.features.ClassLabel
        for key, kind in wanted.items():
            if key not in features or not isinstance(features[key], kind):
                kinds = {key: type(feature).__name__ for key, feature in features.items()}
                raise InputError(
                    f"{self.name} has no feature {key!r} of kind {kind.__name__}, but {kinds}; set "
                    'image_key and label_key (label_key="" for images without classes)'
                )
        return builder


@dataclasses.dataclass(frozen=True)
class TFDSSource:
    """Decodes a record on access; raises the errors of `decode_file`.

    Files are opened at the first access, and again after unpickling; threads may share them.
    """

    data: TFDS
    split: str

    @functools.cached_property
    def records(self) -> Any:
        """Undecoded examples by index."""
        tfds = load_tfds()
        builder, name = self.data.builder(), self.data.name
        decoders = {self.data.image_key: tfds.decode.SkipDecoding()}
        try:
            if builder.info.splits[self.split].num_examples:
                _allow_open_files(sum(split.num_shards for split in builder.info.splits.values()))
                return builder.as_data_source(self.split, decoders=decoders)
        except NotImplementedError as error:
            raise InputError(
                f"{name} is stored as {builder.info.file_format.value}, which has no random "
                f"access; prepare it again by {PREPARE_HINT.format(name)}"
            ) from error
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{name} has no split {self.split!r}, but {sorted(builder.info.splits)}; set train "
                'and held_out to these, or to parts of them like "train[95%:]"'
            ) from error
        raise InputError(f"the split {self.split!r} of {name} holds no images")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        data, example = self.data, self._record(index)
        file = example.get("file_name", b"")  # where datasets usually store it
        file = f" ({file.decode('utf-8', 'replace')})" if isinstance(file, bytes) and file else ""
        name = f"{data.name} {self.split}[{index}]{file}"
        label = example[data.label_key] if data.label_key else 0
        if label < 0:  # as in test splits
            raise InputError(f"{name} has no label; choose a split other than {self.split!r}")
        return {
            "image": decode_file(example[data.image_key], data.channels, name),
            "label": label,
        }

    def _record(self, index: int) -> dict:
        name = f"{self.data.name} {self.split}[{index}]"
        try:
            return retry_read(lambda: self._read(index), name)
        except InputError:
            raise
        except RuntimeError as error:
            if CORRUPTED in str(error):
                raise BrokenImage(name, str(error)) from error
            raise InputError(
                f"{name} cannot be read: {error}; copy or prepare the dataset again"
            ) from error

    def _read(self, index: int) -> dict:
        try:
            return self.records[index]
        except Exception as error:
            if machine_errno(error) is not None:  # the reader would fail at every later access, too
                self.__dict__.pop("records", None)
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "split": self.split}


def _allow_open_files(shards: int) -> None:
    """Raises the limit on open files, often 1,024, because every shard stays open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * shards + 1024  # with room for a second dataset and everything else
    if soft != resource.RLIM_INFINITY and soft < wanted:
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _open(name: str, data_dir: str) -> Any:
    from tensorflow_datasets.core import read_only_builder
    from tensorflow_datasets.core.utils import error_utils

    directory = os.path.expanduser(name)
    if in_bucket(name):  # array_record files are memory-mapped
        directory = str(files.local_copy(name))
    # Unlike os.path, pathlib raises errors of the machine.
    path = pathlib.Path(directory)
    if retry_read((path / "dataset_info.json").is_file, path):
        return _open_directory(directory)
    if retry_read(path.is_dir, path) or in_bucket(name) or name.startswith(("/", ".", "~")):
        raise InputError(
            f"{name} holds no prepared dataset: there is no dataset_info.json in it. Pack a folder "
            "of images with varjax prepare, or read it as it is (folder:PATH)"
        )
    options = {"data_dir": os.path.expanduser(data_dir)} if data_dir else {}
    # builder_from_files finds the directory in the same way, but opens it immediately.
    with error_utils.record_error_context():
        found = read_only_builder._find_builder_dir(name, **options)
    if found is None:
        raise InputError(
            f"{name} is not prepared in {data_dir or '~/tensorflow_datasets'}: set data_dir, or "
            f"prepare it once, where TensorFlow is installed, by {PREPARE_HINT.format(name)}"
        )
    return _open_directory(str(files.local_copy(found) if in_bucket(data_dir) else found))


def _open_directory(directory: str) -> Any:
    tfds = load_tfds()
    path = os.path.join(directory, FEATURES_FILE)
    if os.path.lexists(path):
        try:
            names = list(_class_names(retry_read(lambda: files.read_json(path), path)))
        except RecursionError as error:
            raise InputError(f"{path} is nested too deeply; copy or prepare it again") from error
        if strange := [name for name in names if not name.startswith(FEATURE_MODULES)]:
            raise InputError(
                f"{path} names the class {shown(strange[0])}, which TFDS would import; allowed are "
                f"those of {FEATURE_MODULES.rstrip('.')}. Prepare the dataset without features of "
                "other classes"
            )
    try:
        return retry_read(lambda: tfds.builder_from_directory(directory), directory)
    except InputError:  # which includes StorageError
        raise
    except Exception as error:  # of all kinds, for a foreign or damaged description
        raise InputError(
            f"TFDS cannot open {directory} ({type(error).__name__}: {reason(error)}); copy or "
            "prepare it again"
        ) from error


def _class_names(data: Any) -> Iterator[str]:
    """Yields the names of classes in features.json, also in JSON text within it."""
    if isinstance(data, dict):
        for key, value in data.items():
            if key in CLASS_KEYS and isinstance(value, str):
                yield value
            yield from _class_names(value)
    elif isinstance(data, list):
        for value in data:
            yield from _class_names(value)
    elif isinstance(data, str):
        inner = None
        with contextlib.suppress(ValueError):
            inner = json.loads(data)
        yield from _class_names(inner)
