"""Writes images to array_record files that TensorFlow Datasets reads, without TensorFlow."""

import contextlib
import dataclasses
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from PIL import Image

from varjax.data import transforms
from varjax.errors import StorageError, check_setting, needs_extra
from varjax.storage import files
from varjax.storage.image_files import BrokenImage, decode_file, printable_path, read_file

DATASET_NAME, DATASET_VERSION = "images", "1.0.0"  # of every packed dataset
INFO_FILE = "dataset_info.json"  # exists if and only if a dataset is complete


def load_tfds() -> ModuleType:
    """Imports TensorFlow Datasets, which takes half a second, also without TensorFlow.

    Raises InputError if it is not installed.
    """
    with needs_extra("tfds", "tensorflow-datasets", "a dataset of TFDS, or of varjax prepare,"):
        import tensorflow_datasets
    return tensorflow_datasets


@dataclasses.dataclass(frozen=True)
class ImageEncoding:
    """Chooses how images are stored: unchanged, or resized.

    Attributes:
        size: pixels of the shorter side; larger images are resized to it and stored as RGB JPEGs
            without chroma subsampling. 0 stores all files unchanged.
        quality: quality of these JPEGs, 1 to 100.
    """

    size: int = 0
    quality: int = 95

    def __post_init__(self):
        check_setting("size", self.size, self.size >= 0, "at least 1 pixel, or 0 to keep the files")
        check_setting("quality", self.quality, 1 <= self.quality <= 100, "from 1 to 100")

    def encode_file(self, path: str) -> bytes:
        """Encodes the image in a file.

        Raises:
            BrokenImage: there is no such file, or it cannot be decoded.
            StorageError: the machine or the bucket cannot read it now.
        """
        data = read_file(path)
        image_HWC = decode_file(data, name=path)
        if not 0 < self.size < min(image_HWC.shape[:2]):
            return data
        buffer = io.BytesIO()
        picture = Image.fromarray(transforms.resize_to_cover(image_HWC, self.size, self.size))
        picture.save(buffer, "jpeg", quality=self.quality, subsampling="4:4:4")
        return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class RecordShard:
    """A file to write, with some images of a split.

    Attributes:
        out: the folder of the dataset.
        split: name of the split, "train" or "validation".
        index: number of the shard, from 0.
        count: number of shards in the split.
        root: the folder of the images.
        items: (path below `root`, label) of each image.
        class_names: names of the classes, in the order of their numbers.
    """

    out: pathlib.Path
    split: str
    index: int
    count: int
    root: str
    items: tuple[tuple[str, int], ...]
    class_names: tuple[str, ...]

    @property
    def path(self) -> pathlib.Path:
        name = f"{DATASET_NAME}-{self.split}.array_record-{self.index:05d}-of-{self.count:05d}"
        return self.out / name

    @property
    def report_path(self) -> pathlib.Path:
        """The file that describes the shard; it exists if and only if the shard is finished."""
        return self.out / "unfinished" / f"{self.split}-{self.index:05d}.json"


def write_record_shard(encoding: ImageEncoding, shard: RecordShard) -> Iterator[BrokenImage | None]:
    """Writes a shard and its report.

    The report counts "images" and "bytes", and lists "broken" images as [path, reason].

    Args:
        encoding: how images are stored.
        shard: shard to write, with its images.

    Yields:
        None after each image, or the error if it was left out.

    Raises:
        StorageError: the file could not be written, or an image cannot be read now.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    load_tfds()
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    report: dict[str, Any] = {"images": 0, "bytes": 0, "broken": []}
    fields = record_features(shard.class_names)
    serializer = ExampleSerializer(fields.get_serialized_info())
    with files.atomic_path(shard.path) as temporary, _storage_errors(shard.path):
        # One record per read; images are compressed already.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for path, label in shard.items:
            name, broken = printable_path(path), None
            try:
                image = encoding.encode_file(os.path.join(shard.root, path))
            except BrokenImage as error:
                broken = BrokenImage(name, error.reason)  # by its path in the folder
                report["broken"].append([name, error.reason])
            else:
                example = {"image": image, "label": label, "file_name": name}
                record = serializer.get_tf_example(fields.encode_example(example))
                record = record.SerializeToString(deterministic=True)  # equal bytes in all runs
                writer.write(record)
                report["images"] += 1
                report["bytes"] += len(record)
            yield broken
        writer.close()
    files.write_json(shard.report_path, report)


@contextlib.contextmanager
def _storage_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns the RuntimeError that ArrayRecordWriter raises on a full disk into a StorageError."""
    try:
        yield
    except RuntimeError as error:
        raise StorageError(f"{path} could not be written: {error}") from error


def record_features(class_names: Sequence[str]) -> Any:
    """Returns the TFDS features of a record; `file_name` is the path in the folder."""
    tfds = load_tfds()
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=list(class_names)),
            "file_name": tfds.features.Text(),
        }
    )


def write_dataset_info(
    out: pathlib.Path,
    class_names: Sequence[str],
    reports: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Writes the files that turn finished shards into a TFDS dataset.

    Args:
        out: the folder of the shards.
        class_names: names of the classes, in the order of their numbers.
        reports: by split, the reports of `write_record_shard` in the order of the shards.
    """
    tfds = load_tfds()
    from etils import epath
    from tensorflow_datasets.core.splits import SplitDict

    with tempfile.TemporaryDirectory() as temporary:
        identity = tfds.core.DatasetIdentity(
            name=DATASET_NAME,
            version=tfds.core.Version(DATASET_VERSION),
            data_dir=temporary,
            module_name="",
        )
        info = tfds.core.DatasetInfo(builder=identity, features=record_features(class_names))
        info.set_file_format("array_record")
        splits = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[report["images"] for report in shard_reports],
                num_bytes=sum(report["bytes"] for report in shard_reports),
                filename_template=tfds.core.ShardedFileTemplate(
                    dataset_name=DATASET_NAME,
                    data_dir=epath.Path(temporary),
                    split=split,
                    filetype_suffix="array_record",
                ),
            )
            for split, shard_reports in reports.items()
        ]
        info.set_splits(SplitDict(splits))
        info.write_to_directory(temporary)
        for file in sorted(
            pathlib.Path(temporary).iterdir(), key=lambda file: file.name == INFO_FILE
        ):
            with files.atomic_path(out / file.name) as whole:
                whole.write_bytes(file.read_bytes())
