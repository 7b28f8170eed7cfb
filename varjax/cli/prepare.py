"""Packs a folder of images into a few large array_record files, which are fast on any disk.

varjax prepare --folder=DIR --out=DIR [--size=288] [--workers=16] [--shards=256]

The folder may have train/ and val/, classes only, or images only, as `varjax.data.sources.Folder`
describes. The output is a TensorFlow Datasets directory with the splits "train" and "validation";
`data=tfds:OUT` trains on it. If the command is interrupted, run it again to continue; when
everything is done, it does nothing. See docs/data.md.
"""

import contextlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from varjax.data import array_record
from varjax.data.sources.folder import Folder, ImageListing
from varjax.data.workers import WorkerProcesses, available_cpus
from varjax.errors import InputError, check_setting
from varjax.runtime.commands import command_parser, run_command
from varjax.storage import files, folders
from varjax.storage.buckets import as_path, real_path
from varjax.storage.image_files import printable_path

IMAGES_PER_SHARD, MAX_SHARDS = 1000, 256  # readers keep all shards open
MAX_NAMED = 20  # broken images that are printed; REPORT_FILE lists all
REQUEST_FILE, REPORT_FILE = "request.json", "report.json"
INTERRUPTED = "stopped; run the same command again to continue"


def prepare(
    folder: str,
    out: str,
    held_out: str | float | None = None,
    unconditional: bool = False,
    size: int = 0,
    quality: int = 95,
    workers: int = 0,
    shards: int = 0,
) -> str:
    """Packs a folder of images, or continues an interrupted call.

    Broken images are left out and listed in report.json.

    Args:
        folder: folder of images, for `Folder`.
        out: folder of the dataset, for `TFDS`.
        held_out: subfolder or fraction of the held-out images; see `Folder`.
        unconditional: whether all images belong to one class; see `Folder`.
        size: pixels of the shorter side; see `array_record.ImageEncoding`.
        quality: quality of JPEGs, 1 to 100; see `array_record.ImageEncoding`.
        workers: number of processes; 0 for one per CPU that this process may use.
        shards: number of files of the training split; 0 for one per 1,000 images, up to 256.

    Returns:
        A summary in one line.

    Raises:
        InputError: the folder has no usable layout or a class name that a dataset cannot have, or
            `out` was made with other settings.
    """
    for name, value in ("workers", workers), ("shards", shards):
        check_setting(name, value, value >= 0, "1 or more, or 0 to choose")
    array_record.load_tfds()  # before a large folder is listed
    path, encoding = as_path(out), array_record.ImageEncoding(size, quality)
    data = Folder(folder, held_out=held_out, unconditional=unconditional)
    data.check_outside("out", path)
    _check_class_names(data.class_names)
    listings = {"train": data.listings["train"], "validation": data.listings["held_out"]}
    images = len(listings["train"].paths)
    shards = min(images, shards or min(MAX_SHARDS, -(-images // IMAGES_PER_SHARD)))
    request = (
        {split: listing.describe() for split, listing in listings.items()}
        | {"folder": real_path(folder)}
        | {"unconditional": unconditional}
        | {"size": size, "quality": quality, "shards": shards}
    )
    folders.claim_folder(path, REQUEST_FILE, request)
    finished = path / array_record.INFO_FILE
    if not finished.exists():
        with folders.lock_folder(path):
            if not finished.exists():  # another process may just have finished
                parts = []
                for split, listing in listings.items():
                    count = -(-len(listing.paths) * shards // images)
                    parts += _split_into_shards(path, split, listing, count, data.class_names)
                _pack(parts, encoding, workers or available_cpus())
                _finish(path, data.class_names, parts)
    report = files.read_json(path / REPORT_FILE)
    counts = " + ".join(f"{report[split]['images']} {split}" for split in listings)
    broken = sum(len(report[split]["broken"]) for split in listings)
    note = f"; {broken} broken ones left out, see {path / REPORT_FILE}" if broken else ""
    return f"{path} is complete: {counts} images in {len(data.class_names)} classes{note}"


def _check_class_names(names: Sequence[str]) -> None:
    """Raises InputError for names that TFDS, which writes one a line, would not read back."""
    for name in names:
        if name != printable_path(name) or name.strip().splitlines() != [name]:
            raise InputError(
                f"the class folder {name!r} cannot be the name of a class in a dataset, which is "
                "one line of UTF-8 without spaces at its ends; rename the folder"
            )


def _split_into_shards(
    out: pathlib.Path,
    split: str,
    listing: ImageListing,
    count: int,
    class_names: tuple[str, ...],
) -> list[array_record.RecordShard]:
    """Divides a split into `count` shards of consecutive images, as equal as possible."""
    items = list(zip(listing.paths, listing.labels_N.tolist(), strict=True))
    bounds = [len(items) * i // count for i in range(count + 1)]
    return [
        array_record.RecordShard(
            out, split, i, count, listing.root, tuple(items[start:stop]), class_names
        )
        for i, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]


def _pack(
    parts: Sequence[array_record.RecordShard], encoding: array_record.ImageEncoding, workers: int
) -> None:
    """Writes the unfinished shards, with a progress bar."""
    unfinished = [part for part in parts if not part.report_path.exists()]
    images = sum(len(part.items) for part in parts)
    done = images - sum(len(part.items) for part in unfinished)
    broken_images = 0
    with (
        tqdm(total=images, initial=done, unit="image", smoothing=0.05) as bar,
        contextlib.closing(WorkerProcesses(encoding, min(workers, len(unfinished)))) as processes,
    ):
        for broken in processes.stream(array_record.write_record_shard, unfinished):
            bar.update()
            if broken is not None:
                broken_images += 1
                if broken_images <= MAX_NAMED:
                    bar.write(f"left out: {broken.name}: {broken.reason}", file=sys.stderr)
                elif broken_images == MAX_NAMED + 1:
                    bar.write(f"left out: more; {REPORT_FILE} lists all", file=sys.stderr)


def _finish(
    path: pathlib.Path, class_names: tuple[str, ...], parts: Sequence[array_record.RecordShard]
) -> None:
    """Turns finished shards into a dataset, and removes temporary files."""
    read = [(part, files.read_json(part.report_path)) for part in parts]
    reports: dict[str, list[dict[str, Any]]] = {}
    for part, report in read:
        reports.setdefault(part.split, []).append(report)
    for split, shard_reports in reports.items():
        if not any(report["images"] for report in shard_reports):
            name, reason = shard_reports[0]["broken"][0]
            for part, report in read:  # the next call reads the files again, perhaps repaired
                if not report["images"]:
                    files.remove(part.report_path)
            raise InputError(f"no {split} image can be read; the first is {name}: {reason}")
    summary = {
        split: {
            "images": sum(report["images"] for report in shard_reports),
            "broken": [pair for report in shard_reports for pair in report["broken"]],
        }
        for split, shard_reports in reports.items()
    }
    files.write_json(path / REPORT_FILE, summary)
    array_record.write_dataset_info(path, class_names, reports)
    files.remove(parts[0].report_path.parent)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = command_parser("varjax prepare", __doc__)
    add = parser.add_argument
    add("--folder", required=True, metavar="DIR", help="folder of the images")
    add("--out", required=True, metavar="DIR", help="new folder for the result")
    add(
        "--held_out", type=_number_or_text, help="folder next to train/ (val), or a fraction (0.05)"
    )
    add(
        "--unconditional",
        action="store_true",
        help="use a single class and ignore subfolders",
    )
    add(
        "--size",
        type=int,
        default=0,
        help="resize larger images to this shorter side, in pixels (never)",
    )
    add("--quality", type=int, default=95, help="JPEG quality of resized images (95)")
    add("--workers", type=int, default=0, help="number of processes (one per CPU)")
    add("--shards", type=int, default=0, help="number of training files (one per 1,000 images)")
    flags = parser.parse_args(arguments)
    return run_command(
        "varjax prepare", lambda: print(prepare(**vars(flags))), interrupted=INTERRUPTED
    )


def _number_or_text(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
