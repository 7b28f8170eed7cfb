"""Packs a folder of images into array_record files, once: few large files, read fast anywhere.

python -m varjax.data.prepare --folder=DIR --out=DIR [--size=288] [--workers=16] [--shards=256]

The folder is read as varjax/data/folder.py describes: with train/ and val/, with classes only, or
flat. What comes out is a TensorFlow Datasets directory with the splits "train" and "validation";
`data=tfds:OUT` trains on it. The same command goes on after a kill, and does nothing when all is
done. More in docs/data.md.
"""

import argparse
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from varjax.core import files
from varjax.core.errors import InputError
from varjax.data.prepare import array_record, process_pool
from varjax.data.sources.folder import Folder
from varjax.data.sources.folder_layout import Listing

IN_SHARD, MOST_SHARDS = 1000, 256  # readers keep all shards open, so there are not too many
NAMED = 20  # broken images on the screen; all of them are in REPORT
REQUEST, REPORT = "request.json", "report.json"


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
    """Packs `folder` into `out`, or what is left to do of it; returns a line that sums it up.

    held_out, unconditional: as in `Folder`. size, quality: as in `array_record.Encoding`. workers:
    processes, 0 for one per core. shards: files of the training split, 0 for one per 1,000 images
    up to 256. Broken images are left out, and named in report.json. Raises InputError for a folder
    that makes no sense, and for an `out` that holds anything else.
    """
    if min(workers, shards) < 0:
        raise InputError(f"workers is {workers}, shards {shards}; give 1 or more, or 0 to choose")
    path, encoding = pathlib.Path(out), array_record.Encoding(size, quality)
    data = Folder(folder, held_out=held_out, unconditional=unconditional)
    listings = {"train": data.listings["train"], "validation": data.listings["held_out"]}
    images = len(listings["train"].paths)
    shards = min(images, shards or min(MOST_SHARDS, -(-images // IN_SHARD)))
    _begin(
        path,
        {split: listing.describe() for split, listing in listings.items()}
        | {"folder": os.path.realpath(folder), "unconditional": unconditional}
        | {"size": size, "quality": quality, "shards": shards},
    )
    with files.alone_in(path):
        if not (path / array_record.INFO).exists():
            parts = []
            for split, listing in listings.items():
                count = -(-len(listing.paths) * shards // images)
                parts += _share_out(path, split, listing, count, data.class_names, encoding)
            _pack(parts, workers or os.cpu_count() or 1)
            _finish(path, data.class_names, parts)
    report = files.read_json(path / REPORT)
    counts = " + ".join(f"{report[split]['images']} {split}" for split in listings)
    broken = sum(len(report[split]["broken"]) for split in listings)
    named = f"; {broken} broken ones left out, see {path / REPORT}" if broken else ""
    return f"{path} is complete: {counts} images in {len(data.class_names)} classes{named}"


def _begin(path: pathlib.Path, request: Mapping[str, Any]) -> None:
    """Writes the request, or makes sure that the one there is the same."""
    if (path / REQUEST).exists():
        there = files.read_json(path / REQUEST)
        if lines := [
            f"{name}: {there.get(name)} there, {value} asked for"
            for name, value in request.items()
            if there.get(name) != value
        ]:
            raise InputError(
                f"{path} holds something else, or files have come or gone in the folder:\n  "
                + "\n  ".join(lines)
                + "\nask for the same to go on, delete it, or choose another out"
            )
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is not an empty folder; choose another out")
    else:
        files.write_json(path / REQUEST, request)


def _share_out(
    out: pathlib.Path,
    split: str,
    listing: Listing,
    count: int,
    class_names: tuple[str, ...],
    encoding: array_record.Encoding,
) -> list[array_record.Shard]:
    """A split as `count` shards of consecutive images, as equal as it goes."""
    items = list(zip(listing.paths, listing.labels_N.tolist(), strict=True))
    bounds = [len(items) * i // count for i in range(count + 1)]
    return [
        array_record.Shard(
            out, split, i, count, listing.root, tuple(items[start:stop]), class_names, encoding
        )
        for i, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]


def _pack(parts: Sequence[array_record.Shard], workers: int) -> None:
    """Writes the shards that are not there yet, with a progress bar."""
    left = [part for part in parts if not part.report_path.exists()]
    images, to_do = (sum(len(part.items) for part in some) for some in (parts, left))
    named = 0
    with tqdm(total=images, initial=images - to_do, unit="image", smoothing=0.05) as bar:

        def show(done: int) -> None:
            bar.update(images - to_do + done - bar.n)

        for report in process_pool.run(
            array_record.write_shard, left, min(workers, len(left)), show
        ):
            for name, reason in report["broken"]:
                named += 1
                if named <= NAMED:
                    bar.write(f"left out: {name}: {reason}", file=sys.stderr)
                elif named == NAMED + 1:
                    bar.write(f"left out: more, all of them in {REPORT}", file=sys.stderr)


def _finish(
    path: pathlib.Path, class_names: tuple[str, ...], parts: Sequence[array_record.Shard]
) -> None:
    """Turns finished shards into a dataset, and removes what was only needed for that."""
    reports: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        reports.setdefault(part.split, []).append(files.read_json(part.report_path))
    for split, of_shards in reports.items():
        if not any(report["images"] for report in of_shards):
            name, reason = of_shards[0]["broken"][0]
            raise InputError(f"no {split} image can be read; {name}, for one: {reason}")
    whole = {
        split: {
            "images": sum(report["images"] for report in of_shards),
            "broken": [pair for report in of_shards for pair in report["broken"]],
        }
        for split, of_shards in reports.items()
    }
    files.write_json(path / REPORT, whole)
    array_record.write_info(path, class_names, reports)
    shutil.rmtree(parts[0].report_path.parent)
    for left_by_a_kill in path.glob(".*.tmp"):
        left_by_a_kill.unlink()


def main(arguments: list[str]) -> int:
    """Exit code 0 when all is done, 1 when it failed."""
    parser = argparse.ArgumentParser(
        "python -m varjax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--folder", required=True, help="the images")
    add("--out", required=True, help="a new folder for the result")
    add("--held_out", type=_share, help="the folder beside train/ (val), or a share (0.05)")
    add("--unconditional", action="store_true", help="one class, whatever the subfolders")
    add("--size", type=int, default=0, help="shrink shorter sides to so many pixels")
    add("--quality", type=int, default=95, help="of the JPEGs that shrunk images become")
    add("--workers", type=int, default=0, help="processes; one per core if not given")
    add("--shards", type=int, default=0, help="files of the training split")
    try:
        print(prepare(**vars(parser.parse_args(arguments))))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:  # array_record's writer raises the last
        print(f"varjax.data.prepare: {error}", file=sys.stderr)
        return 1
    return 0


def _share(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
