"""Outputs that survive a kill: a folder of PNGs, and an .npz as FID evaluators read it.

Both hold the request they were made for: the same one goes on where it was killed or finds
everything done, another one is refused.
"""

import json
import os
import pathlib
import shutil
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from varjax.core import files, image_io
from varjax.core.errors import InputError

REQUEST = "request.json"


class Folder:
    """One PNG per image, named by its number and label; each appears whole or not at all."""

    def __init__(self, path: pathlib.Path, label_N: np.ndarray, request: Mapping[str, Any]):
        self._path, self._label_N, self._request = path, label_N, request
        self._present: set[str] = set()

    def begin(self, write: bool) -> None:
        self._present = {p.name for p in self._path.iterdir() if not p.name.startswith(".")}
        if REQUEST in self._present:
            _refuse_another(self._path, files.read_json(self._path / REQUEST), self._request)
        elif self._present:
            raise InputError(
                f"{self._path} holds files and no {REQUEST}; empty it or choose another out"
            )
        elif write:
            files.write_json(self._path / REQUEST, self._request)

    def has(self, part: range) -> bool:
        return all(self._name(i) in self._present for i in part)

    def add(self, part: range, images_NHWC: np.ndarray) -> None:
        for i, image_HWC in zip(part, images_NHWC, strict=True):
            image_io.write_png(self._path / self._name(i), image_HWC)

    def finish(self) -> str:
        for left_by_a_kill in self._path.glob(".*.tmp"):
            left_by_a_kill.unlink()
        return f"{self._path}/: {len(self._label_N)} images"

    def _name(self, i):
        return f"{i:06d}_label{self._label_N[i]:04d}.png"


class Npz:
    """`arr_0`, uint8 (N, H, W, 3), and `labels`, int64 (N,), shuffled; gray images become RGB.

    Evaluators take the Inception Score over consecutive splits of a file. Were it ordered by class,
    a split would hold few of them and the score fall from some 298 to 62; so a permutation, fixed
    by the seed, is laid over the images.

    Until all are there, parts lie in `.NAME.npz.parts` beside the file. Then they are streamed into
    it, one image in memory at a time, which needs the disk space twice.
    """

    def __init__(
        self, path: pathlib.Path, label_N: np.ndarray, seed: int, request: Mapping[str, Any]
    ):
        self._path, self._label_N, self._seed, self._request = path, label_N, seed, request
        self._parts = path.with_name(f".{path.name}.parts")

    def begin(self, write: bool) -> None:
        if self._path.exists():
            _refuse_another(self._path, _request_in(self._path), self._request)
        elif (self._parts / REQUEST).exists():
            _refuse_another(self._parts, files.read_json(self._parts / REQUEST), self._request)
        elif write:
            files.write_json(self._parts / REQUEST, self._request)

    def has(self, part: range) -> bool:
        return self._path.exists() or self._file(part.start).exists()

    def add(self, part: range, images_NHWC: np.ndarray) -> None:
        with files.atomic_path(self._file(part.start)) as temporary, open(temporary, "wb") as file:
            np.save(file, images_NHWC)

    def finish(self) -> str:
        if not self._path.exists():
            whole = self._parts / "whole.npz"
            with open(whole, "wb") as file:
                self._assemble(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(whole, self._path)
        if self._parts.exists():
            shutil.rmtree(self._parts)
        return f"{self._path}: {len(self._label_N)} images, shuffled (arr_0), and their labels"

    def _assemble(self, file):
        order_N = np.random.default_rng(self._seed).permutation(len(self._label_N))
        size, H, W, _ = np.load(self._file(0), mmap_mode="r").shape
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(order_N), H, W, 3)}
        with zipfile.ZipFile(file, "w") as archive:
            with _member(archive, "arr_0.npy") as member:
                np.lib.format.write_array_header_1_0(member, header)
                for i in tqdm(order_N, "writing", unit="image"):
                    image_HWC = np.load(self._file(i - i % size), mmap_mode="r")[i % size]
                    member.write(np.broadcast_to(image_HWC, (H, W, 3)).tobytes())
            with _member(archive, "labels.npy") as member:
                np.lib.format.write_array(member, self._label_N[order_N])
            with _member(archive, REQUEST) as member:
                member.write(json.dumps(self._request).encode())

    def _file(self, start):
        return self._parts / f"{start:09d}.npy"


def _member(archive, name):
    """Opens a new member of a zip file; it bears no date, so equal content is equal bytes."""
    return archive.open(zipfile.ZipInfo(name), "w", force_zip64=True)


def _request_in(path):
    """The request that a finished .npz was made for."""
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read(REQUEST))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} exists and is no file of this command; delete it or choose another out"
        ) from error


def _refuse_another(path, there, here):
    names = dict.fromkeys((*there, *here))
    differing = [n for n in names if there.get(n) != here.get(n)]
    if lines := [f"{n}: {there.get(n)} there, {here.get(n)} asked for" for n in differing]:
        raise InputError(
            f"{path} holds other images:\n  "
            + "\n  ".join(lines)
            + "\nask for the same to go on, delete it, or choose another out"
        )
