"""Reads a folder that `varjax export` wrote as a `Sampler`, like the model it was exported from."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax.checkpoints.class_names import ClassNames
from varjax.config.numbers import finite_number, seed_number, whole_number
from varjax.errors import InputError
from varjax.export.exported_model import ExportedModel
from varjax.sampling.pipeline import (
    Array,
    Index,
    Labels,
    checked_index,
    checked_labels,
    checked_mask,
)
from varjax.sampling.sampler import StepListener, replace_options
from varjax.storage import files
from varjax.storage.buckets import as_path
from varjax.tokenizers.contract import checked_images


def load_exported(folder: str | os.PathLike) -> "ExportedSampler":
    """Loads a folder that `varjax export` wrote, ready to sample.

        model = varjax.load_exported("exported/digits")
        images_BHWC = model.sample([3, 1, 4], seed=0)

    Args:
        folder: exported folder; its run.py samples without varjax.

    Raises:
        InputError: there is no exported folder, or this version of JAX cannot read its programs.
    """
    path = as_path(folder)
    if not files.exists(path / "model.json"):
        raise InputError(f"{folder} has no model.json; give a folder that varjax export wrote")
    try:
        return ExportedSampler(ExportedModel(files.local_copy(path)))
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from error


class ExportedSampler:
    """Samples, edits, encodes and decodes with exported programs; a `Sampler`.

        model = varjax.load_exported("exported/digits")
        images_BHWC = model.sample([3, 1, 4], seed=0, guidance=2.0)

    Programs run on one device. `Sampler` describes the other attributes.

    Attributes:
        about: content of the folder's model.json.
    """

    def __init__(self, model: ExportedModel):
        self._model, self.about = model, model.about
        about = model.about
        self.labels = ClassNames(tuple(about["class_names"]), tuple(about["synsets"]))
        self.classes: int = about["classes"]
        H, W, channels = about["image_shape"]
        h, w = about["edit_shape"]
        self.image_shape, self.edit_shape = (H, W, channels), (h, w)
        self.devices: tuple[Any, ...] = (jax.local_devices()[0],)
        defaults = {name: option["value"] for name, option in about["options"].items()}
        del defaults["seed"]
        fields = [(name, type(value), value) for name, value in defaults.items()]
        self._options = dataclasses.make_dataclass("ExportedOptions", fields, frozen=True)()

    def __repr__(self) -> str:
        H, W, channels = self.image_shape
        names = ", ".join(f"{name}={value}" for name, value in vars(self._options).items())
        lines = {
            "folder": self._model.folder,
            "images": f"{H}x{W} pixels, {channels} {'channel' if channels == 1 else 'channels'}",
            "classes": f"{self.classes:,}: {self.labels!r}",
            "options": names,
            "programs": f"by varjax {self.about['varjax']} and JAX {self.about['jax']}",
        }
        return "\n".join(["ExportedSampler", *(f"  {k:9}{v}" for k, v in lines.items())])

    def options(self, **options: Any) -> Any:
        """Returns the options that may change, a frozen dataclass, with `options` replaced.

        Raises InputError for an option that was fixed by the export, and for a value out of range.
        """
        chosen = replace_options(self._options, options)
        for name in options.keys() & dataclasses.asdict(chosen).keys():
            limits, value = self.about["options"][name], getattr(chosen, name)
            check = whole_number if limits["whole"] else finite_number
            allowed = f"{limits['least']} … {limits['most']:g} in this export"
            checked = check(name, value, limits["least"], limits["most"], allowed=allowed)
            chosen = dataclasses.replace(chosen, **{name: checked})
        return chosen

    def identity(self) -> dict[str, Any]:
        """Returns what images depend on in addition to labels, seed and options."""
        names = "weights_digest", "fixed_options", "varjax", "jax"
        # Folders of older versions lack "identity".
        model = self.about.get("identity", {}).get(self._model.platform)
        return {"exported": {name: self.about[name] for name in names} | {"identity": model}}

    def sampling_bytes(self, batch_size: int, options: Any) -> int:
        """Returns the estimate that was made at the export."""
        needed = self.about["memory_bytes"][self._model.platform]
        return needed["weights"] + batch_size * needed["image"]

    def advise_on_nan(self, options: Any) -> str:
        """Says what to try if a sampled image contains NaN or infinite numbers."""
        return "Try weaker guidance; or export again with --dtype=float32"

    def steps(self, options: Any) -> int:
        """Raises InputError: exported programs return finished images only."""
        raise InputError("an exported model shows no steps; use the model that it was made of")

    def sample(
        self,
        labels: Labels,
        seed: int = 0,
        *,
        index: Index | None = None,
        every_step: bool | StepListener = False,
        **options: Any,
    ) -> jax.Array:
        """Samples one image for each label: (B, H, W, channels) float32 in [0, 1].

        Args:
            labels: (B,) classes, by number or name; mixes of classes are refused.
            seed: random seed; each seed gives different images.
            index: (B,) numbers of the images; None for 0 … B-1.
            every_step: must be False; see `steps`.
            options: sampling options of `options()`.

        Raises:
            InputError: labels or options out of range, or no program that samples.
        """
        if every_step:
            self.steps(None)
        label_B = self._checked_labels(labels)
        index_B = np.arange(len(label_B)) if index is None else checked_index(index)
        if len(index_B) != len(label_B):
            raise InputError(f"index has {len(index_B)} numbers; expected {len(label_B)}")
        numbers = dataclasses.asdict(self.options(**options))
        return self._run("sample", label_B, seed_number("seed", seed), index_B, **numbers)

    def edit(
        self,
        images_BHWC: Array,
        keep: np.ndarray,
        labels: Labels | None = None,
        seed: int = 0,
        *,
        index: Index | None = None,
        every_step: bool | StepListener = False,
        **options: Any,
    ) -> jax.Array:
        """Redraws everything outside of `keep`; otherwise like `sample`.

        Args:
            images_BHWC: uint8, or float in [0, 1]; one image, or one for each of `index`.
            keep: (h, w) or (B, h, w) bool of `edit_shape`; True keeps that part of the image.
            labels: (B,) classes; None for no class.
            seed: random seed; each seed gives different images.
            index: (B,) numbers of the results; None for one result per image.
            every_step: must be False; see `steps`.
            options: sampling options of `options()`.

        Raises:
            InputError: a wrong shape, labels or options out of range, or no program that edits.
        """
        if every_step:
            self.steps(None)
        images = np.asarray(checked_images(images_BHWC, self.image_shape))
        index_B = np.arange(len(images)) if index is None else checked_index(index)
        B = len(index_B)
        if len(images) not in (1, B):
            raise InputError(f"{len(images)} images and {B} of index; give one, or one per index")
        label_B = self._checked_labels(np.full(B, self.classes) if labels is None else labels, B)
        keep_Bhw = checked_mask(keep, B, self.edit_shape)
        numbers = dataclasses.asdict(self.options(**options))
        seed = seed_number("seed", seed)
        return self._run("edit", images, keep_Bhw, label_B, seed, index_B, **numbers)

    def encode(self, images_BHWC: Array) -> jax.Array:
        """Encodes images into tokens: (B, L) int32, or (B, L, Z) float32.

        Raises InputError for a wrong shape, or if there is no program that encodes.
        """
        return self._run("encode", np.asarray(checked_images(images_BHWC, self.image_shape)))

    def decode(self, tokens: Array) -> jax.Array:
        """Decodes tokens that `encode` returned into images (B, H, W, channels).

        Raises InputError for a wrong shape, or if there is no program that decodes.
        """
        return self._run("decode", np.asarray(tokens))

    def _checked_labels(self, labels: Labels, batch: int | None = None) -> np.ndarray:
        label_B = checked_labels(self.labels.numbers(labels), self.classes, batch)
        if label_B.ndim != 1:
            raise InputError("an exported model takes single classes, no mixes of classes")
        return np.asarray(label_B)

    def _run(self, name: str, *arguments: Any, **options: Any) -> jax.Array:
        try:
            return jnp.asarray(getattr(self._model, name)(*arguments, **options))
        except ValueError as error:
            raise InputError(f"{self._model.folder}: {error}") from error
