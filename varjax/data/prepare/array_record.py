"""Images -> array_record files that TensorFlow Datasets reads; TensorFlow takes no part."""

import dataclasses
import io
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from varjax.core import files
from varjax.core.errors import InputError
from varjax.data import decoding, transforms
from varjax.data.prepare import process_pool

NAME, VERSION = "images", "1.0.0"  # of every dataset packed here
INFO = "dataset_info.json"  # is there if and only if a dataset is complete


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How images are stored.

    size 0: as the bytes of their files. Otherwise those whose shorter side is longer than `size`
    are resized to that and become RGB in JPEG, colors not subsampled.
    """

    size: int = 0
    quality: int = 95

    def __post_init__(self):
        if self.size < 0 or not 1 <= self.quality <= 100:
            raise InputError(
                f"size is {self.size} and quality {self.quality}; size counts pixels, 0 to keep "
                "the files as they are, and quality goes from 1 to 100"
            )

    def read(self, path: str) -> bytes:
        """The image in a file, to be stored; BrokenImage where it cannot be decoded."""
        data = decoding.read(path)
        image_HWC = decoding.decode(data, name=decoding.printable(path))
        if not 0 < self.size < min(image_HWC.shape[:2]):
            return data
        buffer = io.BytesIO()
        picture = Image.fromarray(transforms.cover(image_HWC, self.size, self.size))
        picture.save(buffer, "jpeg", quality=self.quality, subsampling="4:4:4")
        return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to be written: the `index`-th of `count` of a split, with (path, label) of images."""

    out: pathlib.Path
    split: str
    index: int
    count: int
    root: str
    items: tuple[tuple[str, int], ...]
    class_names: tuple[str, ...]
    encoding: Encoding

    @property
    def path(self) -> pathlib.Path:
        name = f"{NAME}-{self.split}.array_record-{self.index:05d}-of-{self.count:05d}"
        return self.out / name

    @property
    def report_path(self) -> pathlib.Path:
        """Where is noted what was written; there if and only if the shard is finished."""
        return self.out / "unfinished" / f"{self.split}-{self.index:05d}.json"


def write_shard(shard: Shard) -> dict[str, Any]:
    """Writes a shard and its report: images, bytes, and what was broken, as [path, reason].

    To be run by `process_pool.run`; one step per image.
    """
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    report: dict[str, Any] = {"images": 0, "bytes": 0, "broken": []}
    fields = features(shard.class_names)
    serializer = ExampleSerializer(fields.get_serialized_info())
    with files.atomic_path(shard.path) as temporary:
        # One record per read; images are compressed already.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for path, label in shard.items:
            name = decoding.printable(path)
            try:
                image = shard.encoding.read(os.path.join(shard.root, path))
            except decoding.BrokenImage as error:
                report["broken"].append([name, error.reason])
            else:
                example = {"image": image, "label": label, "file_name": name}
                record = serializer.get_tf_example(fields.encode_example(example))
                record = record.SerializeToString(deterministic=True)  # equal bytes in all runs
                writer.write(record)
                report["images"] += 1
                report["bytes"] += len(record)
            process_pool.step()
        writer.close()
    files.write_json(shard.report_path, report)
    return report


def features(class_names: Sequence[str]) -> Any:
    """What a record holds; `file_name` is the path in the folder."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=list(class_names)),
            "file_name": tfds.features.Text(),
        }
    )


def write_info(
    out: pathlib.Path,
    class_names: Sequence[str],
    reports: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Makes a dataset of finished shards, whose reports are given in order for each split."""
    import tensorflow_datasets as tfds
    from etils import epath
    from tensorflow_datasets.core.splits import SplitDict

    with tempfile.TemporaryDirectory(dir=out, prefix=".info", suffix=".tmp") as temporary:
        identity = tfds.core.DatasetIdentity(
            name=NAME, version=tfds.core.Version(VERSION), data_dir=temporary, module_name=""
        )
        info = tfds.core.DatasetInfo(builder=identity, features=features(class_names))
        info.set_file_format("array_record")
        splits = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[report["images"] for report in of_shards],
                num_bytes=sum(report["bytes"] for report in of_shards),
                filename_template=tfds.core.ShardedFileTemplate(
                    dataset_name=NAME,
                    data_dir=epath.Path(temporary),
                    split=split,
                    filetype_suffix="array_record",
                ),
            )
            for split, of_shards in reports.items()
        ]
        info.set_splits(SplitDict(splits))
        info.write_to_directory(temporary)
        for file in sorted(pathlib.Path(temporary).iterdir(), key=lambda file: file.name == INFO):
            with files.atomic_path(out / file.name) as whole:
                whole.write_bytes(file.read_bytes())
