"""Writes samples: one grid, a folder of PNGs, or an .npz in the format of FID evaluators.

A folder or an .npz survives a kill. It holds the request it was made for: the same request
continues where it was killed or finds everything done; a different one is refused.
"""

import bisect
import json
import math
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from varjax.errors import InputError, StorageError
from varjax.sampling.films import MOST_SIDE
from varjax.sampling.grid_output import NO_WORDS, FilmOutput, GridOutput, PictureWords
from varjax.storage import files, folders, image_io
from varjax.storage.buckets import as_path, in_bucket
from varjax.storage.captioned_grid import MOST_PIXELS
from varjax.storage.folders import check_writable, remove_work_folder
from varjax.storage.image_io import grid_size
from varjax.storage.npz import read_zip_text
from varjax.storage.picture_text import image_text
from varjax.storage.safetensors_io import read_safetensors
from varjax.storage.untrusted import parse_json

REQUEST, PART_SUFFIX = "request.json", ".safetensors"
FILM_SUFFIXES = (".gif", ".webp")
FILE_SUFFIXES = (".png", ".npz", *FILM_SUFFIXES)  # a grid, images, animations
REFUSED_SUFFIXES = (".jpg", ".jpeg", ".npy", ".json")
MOST_LABEL_BYTES = 200  # in the name of a file, which may have 255


def check_finite_images(
    images_BHWC: np.ndarray,
    index_B: Any,
    label_B: Any,
    seed: int,
    advice: Callable[[], str],
) -> None:
    """Checks images that are about to be written; NaN would be written as black.

    Args:
        images_BHWC: float images to check.
        index_B: numbers of the images.
        label_B: classes of the images.
        seed: random seed of all images.
        advice: function that returns what to try, usually `Sampler.advise_on_nan`.

    Raises:
        InputError: an image holds NaN or infinite numbers; names the first one.
    """
    bad = np.flatnonzero(~np.isfinite(images_BHWC).reshape(len(images_BHWC), -1).all(axis=1))
    if bad.size:
        i = bad[0]
        raise InputError(
            f"image {int(index_B[i])} (label {label_B[i]}, seed {seed}) holds NaN or infinite "
            f"numbers, as do {bad.size} of the {len(images_BHWC)} images of its batch, and "
            f"is not written. {advice()}"
        )


class Output(Protocol):
    """Takes parts (consecutively numbered uint8 images) in any order.

    With several processes, all of them use it on a shared file system; one of them calls `begin`
    with `write=True`, and `finish`.
    """

    def begin(self, write: bool) -> None:
        """Raises InputError if the output holds anything but part of the same request."""
        ...

    def has(self, part: range) -> bool: ...

    def add(self, part: range, images_NHWC: np.ndarray) -> None: ...

    def finish(self) -> str:
        """Completes the output; returns a line that says what was written where."""
        ...


def file_suffix(location: str | pathlib.Path) -> str:
    """Returns ".png", ".npz", ".gif" or ".webp" if the output is such a file; "" for a folder.

    Any other suffix is part of a folder's name: "d16_guidance1.5".
    """
    suffix = as_path(location).suffix.lower()
    return suffix if suffix in FILE_SUFFIXES else ""


def check_out(location: str) -> None:
    """Raises InputError if `location` cannot be written."""
    if not location.strip():
        raise InputError("out is empty; give FILE.png (a grid), FILE.npz, or a folder")
    path = as_path(location)
    if path.name.lower() in (*FILE_SUFFIXES, *REFUSED_SUFFIXES):
        raise InputError(f"out={location} has no name before {path.name}; give one")
    if suffix := file_suffix(path):
        try:
            taken = path.is_dir()
        except OSError as error:  # such as a name that is too long
            raise InputError(f"cannot write to {path} ({error.strerror})") from error
        if taken:
            raise InputError(
                f"out={location} is a folder; give a file name, or a folder without {suffix}"
            )
        return check_writable(path.parent)
    if path.suffix.lower() in REFUSED_SUFFIXES:
        raise InputError(
            f"out={location}: cannot write {path.suffix}; .png, .npz, .gif, .webp or a folder"
        )
    check_writable(path)


def check_out_holds(
    location: str,
    images: int,
    image_shape: Sequence[int],
    steps: int | None = None,
    columns: int | None = None,
) -> None:
    """Checks, before sampling, that an output can hold the images.

    Args:
        location: path of the output, as for `check_out`.
        images: number of images.
        image_shape: (H, W, channels) of an image.
        steps: number of steps in an animation or strip; None for finished images.
        columns: images in a row of a grid or animation; None for a grid that is as square as
            possible.

    Raises:
        InputError: too many images for a grid, a number of channels that the format lacks, or a
            format that holds no steps.
    """
    (H, W, channels), suffix = image_shape, file_suffix(location)
    if steps is not None and suffix in ("", ".npz"):
        raise InputError(
            f"out={location} holds finished images; for every step, give FILE.gif or FILE.webp (an "
            "animation) or FILE.png (a row per image)"
        )
    allowed = (1, 3, 4) if suffix in ("", ".png") else (1, 3)
    if channels not in allowed:
        kind, other = suffix or ".png", "; give FILE.png or a folder" if channels == 4 else ""
        raise InputError(
            f"out={location}: the model's images have {channels} channels; {kind} files hold "
            f"{', '.join(map(str, allowed))}{other}"
        )
    if suffix in ("", ".npz"):
        return
    strip = steps if suffix == ".png" else None
    most_side = MOST_SIDE.get(suffix[1:], MOST_PIXELS)

    def too_large(images: int) -> bool:
        size = grid_size(images * (strip or 1), (H, W), strip or columns)
        in_memory = images * (steps or 1) * H * W
        return max(in_memory, math.prod(size)) > MOST_PIXELS or max(size) > most_side

    if too_large(images):
        most = bisect.bisect_left(range(1, images + 1), True, key=too_large)
        each = f" after each of {steps} steps" if steps else ""
        raise InputError(
            f"out={location}: a picture of {images:,} images of {H}x{W}{each} is too large; draw "
            f"at most {most:,}, or use varjax sample with FILE.npz or a folder"
        )


def open_output(
    location: str,
    label_N: np.ndarray,
    columns: int | None,
    seed: int,
    request: Mapping[str, Any],
    every_step: bool = False,
    words: PictureWords = NO_WORDS,
) -> Output:
    """Returns the output for "x.png" (a grid with `columns`), "x.npz", or a folder's name.

    With `every_step`, the output for an animation ("x.gif", "x.webp") or a strip ("x.png"). All
    pictures show `words`.
    """
    path, suffix = as_path(location), file_suffix(location)
    if every_step:
        return FilmOutput(path, columns, words)
    if suffix == ".png":
        return GridOutput(path, columns, words)
    if suffix == ".npz":
        return NpzOutput(path, label_N, seed, request)
    return FolderOutput(path, label_N, request)


def parts_folder(path: pathlib.Path) -> pathlib.Path:
    """Returns the folder next to a file that keeps its parts until all exist."""
    return path.with_name(f".{path.name}.parts")


def work_folder(location: str | pathlib.Path) -> pathlib.Path | None:
    """Returns the folder that a job fills part by part; None for a picture or a finished file."""
    path = as_path(location)
    if not (suffix := file_suffix(path)):
        return path
    return None if suffix != ".npz" or path.exists() else parts_folder(path)


def begun_batch_size(location: str | pathlib.Path) -> int | None:
    """Returns the batch size with which an output was started; None if there is none."""
    path = as_path(location)
    try:
        if file_suffix(path) == ".npz" and path.exists():
            return read_npz_request(path).get("batch_size")
        folder = parts_folder(path) if file_suffix(path) else path
        return files.read_json(folder / REQUEST).get("batch_size")
    except (InputError, OSError, AttributeError):
        return None  # no output, or another one, which `begin` refuses


class FolderOutput:
    """Writes one PNG per image, named by its number and label; each appears whole or not at all.

    A PNG's text holds the request, but not the command line: a folder has the same bytes however
    often it was interrupted, and by however many processes it was drawn.
    """

    def __init__(self, path: pathlib.Path, label_N: np.ndarray, request: Mapping[str, Any]):
        self._path, self._label_N, self._request = path, label_N, request
        self._present: set[str] = set()

    def begin(self, write: bool) -> None:
        folders.claim_folder(self._path, REQUEST, self._request, write)
        self._present = folders.names_in(self._path)

    def has(self, part: range) -> bool:
        return all(self._name(i) in self._present for i in part)

    def add(self, part: range, images_NHWC: np.ndarray) -> None:
        for i, image_HWC in zip(part, images_NHWC, strict=True):
            text = image_text(self._request, i, self._label_N[i])
            image_io.write_png(self._path / self._name(i), image_HWC, text)

    def finish(self) -> str:
        return f"{self._path}/: {len(self._label_N)} images"

    def _name(self, i):
        return image_file_name(i, self._label_N[i])


def image_file_name(number: int, label: Any) -> str:
    """Returns the name of an image's file in a folder: "000012_label0207.png".

    label: class by number, or a class name or mix of classes as text.
    """
    text = label.replace(":", "x") if isinstance(label, str) else f"{label:04d}"
    text = text.replace("/", "_").replace("\0", "_")  # which no file name holds
    # The number of the image keeps the name unique.
    text = text.encode("utf-8", "replace")[:MOST_LABEL_BYTES].decode("utf-8", "ignore")
    return f"{number:06d}_label{text}.png"


class NpzOutput:
    """Writes `arr_0`, uint8 (N, H, W, 3), and `labels`, int64 (N,), shuffled; gray becomes RGB.

    If there are mixes of classes, `mixes` (N,) takes the place of `labels`: text such as "3:1+8:2",
    which evaluators do not read as classes.

    Evaluators compute the Inception Score over consecutive splits of a file. In a file ordered by
    class, each split would hold few classes and the score would drop from about 298 to 62, so the
    images are permuted, as determined by the seed.

    Until all images exist, parts are kept in `.NAME.npz.parts` next to the file. Then they are
    streamed into it, one image in memory at a time, which needs twice the disk space.
    """

    def __init__(
        self, path: pathlib.Path, label_N: np.ndarray, seed: int, request: Mapping[str, Any]
    ):
        self._path, self._label_N, self._seed, self._request = path, label_N, seed, request
        self._parts = parts_folder(path)

    def begin(self, write: bool) -> None:
        if self._path.exists():
            folders.check_same_request(self._path, read_npz_request(self._path), self._request)
        else:
            folders.claim_folder(self._parts, REQUEST, self._request, write)

    def has(self, part: range) -> bool:
        if self._path.exists():
            return True
        file = self._file(part.start)
        # Parts in a bucket are not read back until all of them exist.
        return file.exists() if in_bucket(file) else folders.read_or_remove(file) is not None

    def add(self, part: range, images_NHWC: np.ndarray) -> None:
        files.write_tensors(self._file(part.start), {"image_NHWC": images_NHWC}, {})

    def finish(self) -> str:
        if not self._path.exists():
            with files.atomic_path(self._path) as temporary, open(temporary, "wb") as file:
                self._assemble(file)
        remove_work_folder(self._parts)
        return f"{self._path}: {len(self._label_N)} images, shuffled, and their labels"

    def _assemble(self, file):
        order_N = np.random.default_rng(self._seed).permutation(len(self._label_N))

        parts = files.local_copy(self._parts)
        self._check_parts(parts)

        def part_NHWC(start: int) -> np.ndarray:
            return read_safetensors(parts / self._file(start).name)[0]["image_NHWC"]

        size, H, W, _ = part_NHWC(0).shape
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(order_N), H, W, 3)}
        with zipfile.ZipFile(file, "w") as archive:
            with _member(archive, "arr_0.npy") as member:
                np.lib.format.write_array_header_1_0(member, header)
                for i in tqdm(order_N, "writing", unit="image"):
                    image_HWC = part_NHWC(i - i % size)[i % size]
                    member.write(np.broadcast_to(image_HWC, (H, W, 3)).tobytes())
            name = "labels.npy" if self._label_N.dtype.kind in "iu" else "mixes.npy"
            with _member(archive, name) as member:
                np.lib.format.write_array(member, self._label_N[order_N])
            with _member(archive, REQUEST) as member:
                member.write(json.dumps(self._request).encode())

    def _check_parts(self, parts: pathlib.Path) -> None:
        """Removes damaged parts, and raises InputError if there were any."""
        damaged = 0
        for path in sorted(parts.glob(f"*{PART_SUFFIX}")):
            if folders.read_or_remove(path) is None:
                files.remove(self._parts / path.name)  # which may be in a bucket
                damaged += 1
        if damaged:
            raise InputError(
                f"{damaged} parts of {self._path} were damaged and are deleted; run the same "
                "command again to make them again"
            )

    def _file(self, start):
        return self._parts / f"{start:09d}{PART_SUFFIX}"


def _member(archive, name):
    """Opens a new member of a zip file, without a date so that equal content gives equal bytes."""
    return archive.open(zipfile.ZipInfo(name), "w", force_zip64=True)


def read_npz_request(path: pathlib.Path) -> dict[str, Any]:
    """Reads the request for which a finished .npz was made; InputError for any other file."""
    try:
        with path.open("rb") as file:
            request = parse_json(read_zip_text(file, REQUEST))
        if isinstance(request, dict):
            return request
    except StorageError:
        raise
    except (InputError, OSError, ValueError):
        pass
    raise InputError(
        f"{path} exists and was not written by this command; delete it or choose another out"
    )
