"""Runs the exported programs next to this file. It needs jax, numpy and safetensors.

    from exported_model import ExportedModel
    images_BHWC = ExportedModel().sample([207, 980], seed=0)

model.json has the options, classes, shapes and license. A folder that `varjax export` writes has a
copy of this file, so it imports nothing of varjax.
"""

import collections
import hashlib
import json
import pathlib
import re

import jax
import numpy as np
from jax import export
from safetensors import safe_open

WEIGHTS_FILE = "weights.safetensors"
ABOUT_KEYS = {"jax", "calling_convention", "programs", "sha256"}  # of every model.json
PROGRAM_PLATFORMS = {
    "gpu": "cuda"
}  # names of programs' platforms, where JAX's backend has another name


class ExportedModel:
    """Samples, edits, encodes and decodes with exported programs, on NumPy's arrays.

        model = ExportedModel("exported/digits")
        images_BHWC = model.sample([3, 1, 4], seed=0)

    Raises ValueError for a version of JAX that cannot read the programs, for damaged files, and for
    bad arguments.

    Attributes:
        folder: folder that `varjax export` wrote.
        about: content of model.json.
        platform: platform whose programs are run, "cpu", "cuda" or "tpu".
    """

    def __init__(self, folder=pathlib.Path(__file__).parent):
        self.folder = pathlib.Path(folder).absolute()
        self.about = json.loads((self.folder / "model.json").read_text("utf-8"))
        complete = isinstance(self.about, dict) and ABOUT_KEYS <= self.about.keys()
        check(complete, "model.json is damaged, or not one that varjax export wrote")
        self.platform = PROGRAM_PLATFORMS.get(jax.default_backend(), jax.default_backend())
        self._read_programs, self._weights = {}, {}
        oldest = export.minimum_supported_calling_convention_version
        newest = export.maximum_supported_calling_convention_version
        recent = version(jax.__version__) >= version(self.about["jax"])
        readable = recent and oldest <= self.about["calling_convention"] <= newest
        check(readable, f"{self.about['readable_by']}; this is jax {jax.__version__}")

    def sample(self, labels, seed=0, index=None, **options):
        """Draws an image per label, a number or name: (B, H, W, channels) float32 in [0, 1]."""
        label_B = self._numbers(labels)
        index_B = self._index(len(label_B), index)
        return self._run(self._programs("sample"), [label_B, index_B], seed, options)

    def edit(self, images_BHWC, keep, labels=None, seed=0, index=None, **options):
        """Redraws images where `keep`, (h, w) or (B, h, w), is False; labels: None is no class."""
        programs, B = self._programs("edit"), len(images_BHWC if index is None else index)
        index_B = self._index(B, index)
        label_B = self._numbers([self.about["classes"]] * B if labels is None else labels)
        check(len(label_B) == B, f"{len(label_B)} labels; needed are {B}, one for each result")
        count, shape = len(images_BHWC), (*self.about["edit_shape"],)
        check(count in (1, B), f"{count} images and {B} of index; give one, or one per index")
        fits = np.shape(keep) in (shape, (B, *shape))
        check(fits, f"keep has shape {np.shape(keep)}; allowed are {shape}, {(B, *shape)}")
        keep_Bhw = np.broadcast_to(keep, (B, *shape)).astype(bool)
        tokens = self.encode(images_BHWC)
        tokens = np.broadcast_to(tokens, (B, *tokens.shape[1:]))
        batch = [label_B, index_B, tokens, keep_Bhw]
        return self._run(programs, batch, seed, options, keep_Bhw.sum(axis=(1, 2)))

    def encode(self, images_BHWC):
        """Encodes images, uint8 or floats in [0, 1], into tokens."""
        images_BHWC = np.asarray(images_BHWC)
        kind = "_uint8" if images_BHWC.dtype == np.uint8 else ""
        if not kind:  # a resized image may exceed [0, 1] a little
            low, high = images_BHWC.min(initial=0), images_BHWC.max(initial=0)
            fits = images_BHWC.dtype.kind not in "biu" and low >= -0.5 and high <= 1.5
            check(fits, f"images are {images_BHWC.dtype}, {low} … {high}; give uint8, or 0 … 1")
        return self._run(self._programs(f"encode{kind}"), [images_BHWC])

    def decode(self, tokens):
        """Decodes tokens into images (B, H, W, channels) float32 in [0, 1]."""
        tokens = np.asarray(tokens)
        check(tokens.ndim > 1, f"tokens have shape {tokens.shape}; give those that encode returns")
        if vocab := self.about.get("vocab"):  # else the tokens are latents
            check(tokens.dtype.kind in "iu", f"tokens are {tokens.dtype}; give integers")
            fits = np.all((tokens >= 0) & (tokens < vocab))
            check(fits, f"tokens are outside of 0 … {vocab - 1}")
        return self._run(self._programs("decode"), [tokens])

    def _numbers(self, labels):
        names, classes = self.about["class_names"], self.about["classes"]
        exact = unique(self.about.get("synsets", ())) | unique(names)
        folded = unique([name.casefold() for name in names])
        labels = [labels] if np.isscalar(labels) else labels
        texts = [str(label).strip() for label in labels]
        texts = [str(exact.get(x, folded.get(x.casefold(), x))) for x in texts]
        known = texts and all(x.isdecimal() and int(x) <= classes for x in texts)
        allowed = f"0 … {classes}, and names and synsets in model.json that one class has"
        check(known, f"labels {texts}: allowed are {allowed}")
        return np.array([int(x) for x in texts])

    def _index(self, B, index):
        index_B = np.arange(B) if index is None else np.asarray(index)
        whole = index_B.shape == (B,) and index_B.dtype.kind in "iu"
        fits = whole and (index_B >= 0).all() and (index_B < 2**32).all()
        check(fits, f"index {index}: needed are {B} whole numbers, 0 … {2**32 - 1}")
        return index_B

    def _options(self, given):
        for name, value in given.items():
            check(name in self.about["options"], f"{name}: not one of {[*self.about['options']]}")
            least, most, whole = (
                self.about["options"][name][x] for x in ("least", "most", "whole")
            )
            number = np.shape(value) == () and np.asarray(value).dtype.kind in "iuf"
            fits = number and least <= value <= most and (not whole or value == int(value))
            check(fits, f"{name}={value}: allowed are {'whole numbers ' * whole}{least} … {most}")
        return {**self.about["numbers"], **given}

    def _programs(self, name):
        wanted = name, self.platform
        found = [p for p in self.about["programs"] if (p["name"], p["platform"]) == wanted]
        check(found, f"this folder has no program {name} for {self.platform}")
        return found

    def _run(self, programs, batch, seed=0, options=None, kept_B=None):
        """Runs a program, whose variants are for batch sizes and for numbers of kept tokens."""
        numbers, B, results = self._options({"seed": seed, **(options or {})}), len(batch[0]), {}
        kept_B = np.zeros(B) if kept_B is None else kept_B
        limits = np.unique([p["most_kept"] for p in programs])
        limit_B = limits[np.searchsorted(limits, kept_B)]
        for limit in np.unique(limit_B):
            row_N = np.flatnonzero(limit_B == limit)
            found = [p for p in programs if p["most_kept"] == limit]
            files = {p["batch_size"] or len(row_N): p["file"] for p in found}
            size = min((size for size in files if size >= len(row_N)), default=max(files))
            for part in np.split(row_N, range(size, len(row_N), size)):
                padded = np.pad(part, (0, size - len(part)), mode="edge")
                rows = self._call(files[size], numbers, [x[padded] for x in batch])
                results |= zip(part, rows, strict=False)
        return np.stack([results[row] for row in range(B)])

    def _call(self, file, numbers, batch):
        if file not in self._read_programs:
            self._read_programs[file] = self._read(file)
        program, weights, kinds, batch_kinds = self._read_programs[file]
        numbers = {path: np.asarray(numbers[path], kind.dtype) for path, kind in kinds.items()}
        arrays = [x.astype(kind.dtype) for x, kind in zip(batch, batch_kinds, strict=True)]
        return np.asarray(program(weights, numbers, arrays))

    def _read(self, file):
        if not self._read_programs:
            self._check_intact(WEIGHTS_FILE)
        self._check_intact(file)
        exported = export.deserialize(bytearray((self.folder / file).read_bytes()))
        (weights, *others), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        with safe_open(self.folder / WEIGHTS_FILE, "np") as tensors:
            for name, kind in weights.items():
                if (name, kind.dtype) not in self._weights:  # programs share them
                    x = tensors.get_tensor(name).astype(kind.dtype)
                    self._weights[name, kind.dtype] = jax.device_put(x)
        held = {name: self._weights[name, kind.dtype] for name, kind in weights.items()}
        return jax.jit(exported.call), held, *others

    def _check_intact(self, file):
        path = self.folder / file
        check(path.is_file(), f"{path} is missing; export again")
        with open(path, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        check(digest == self.about["sha256"].get(file), f"{path} is damaged; export again")


def version(text):
    """Returns the numbers of a version: (0, 10, 2) for "0.10.2", "0.10.2rc1" and "0.10.2.dev1"."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def unique(names):
    """Returns the number of each name that one class has; digits are a label, never a name."""
    counts = collections.Counter(names)
    return {x: i for i, x in enumerate(names) if counts[x] == 1 and not x.isdecimal()}


def check(valid, message):
    if not valid:
        raise ValueError(message)
