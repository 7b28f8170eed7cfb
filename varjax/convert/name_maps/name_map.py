"""Defines the records that describe a kind of official model: tensors, sizes, published weights."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from varjax.errors import InputError
from varjax.storage.safetensors_io import Tensor
from varjax.storage.untrusted import shown

# Orders of axes: PyTorch's (out, in) and OIHW <-> our (in, out) and HWIO.
TO_OURS = {"linear": (1, 0), "conv": (2, 3, 1, 0)}
TO_OFFICIAL = {"linear": (1, 0), "conv": (3, 2, 0, 1)}


@dataclasses.dataclass(frozen=True)
class Link:
    """Connects one official tensor with the parameters that hold its numbers.

        Link("head.weight", ("head/kernel",), "linear")
        Link("blocks.3.attn.mat_qkv.weight", ("q/kernel", "k/kernel", "v/kernel"), "linear", 3)
        Link("attn.k.weight", ("qkv/kernel",), "conv", part=(1, 3))

    Attributes:
        official: name of the official tensor.
        ours: paths of our parameters; if there are several, they divide the tensor's first axis
            equally.
        layout: "linear" (out, in) <-> (in, out); "conv" OIHW <-> HWIO; "plain" equal except for
            axes of length 1.
        index: position along the leading (stacked) axis of our parameter, or None.
        ones: for "plain", the official shape's axes of length 1.
        part: (i, n) if the tensor is number i of n that divide the last axis of our parameter
            equally; None if the parameter is not divided.
    """

    official: str
    ours: tuple[str, ...]
    layout: Literal["plain", "linear", "conv"] = "plain"
    index: int | None = None
    ones: tuple[int, ...] = ()
    part: tuple[int, int] | None = None

    def to_ours(self, tensor: np.ndarray, path: str) -> np.ndarray:
        """Returns a view of the official tensor's numbers for its part of the parameter `path`."""
        part = np.split(tensor, len(self.ours))[self.ours.index(path)]
        return part if self.layout == "plain" else part.transpose(TO_OURS[self.layout])

    def to_official(self, leaves: list[np.ndarray]) -> np.ndarray:
        """Joins the numbers of all of `ours` into the official tensor, without axes of length 1."""
        if self.part is not None:
            i, n = self.part
            leaves = [np.split(leaf, n, axis=-1)[i] for leaf in leaves]
        if self.layout != "plain":
            leaves = [leaf.transpose(TO_OFFICIAL[self.layout]) for leaf in leaves]
        return np.concatenate(leaves)

    def official_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the official shape for the shape of one of `ours`, stacked axis included."""
        if self.index is not None:
            shape = shape[1:]
        if self.part is not None:
            shape = (*shape[:-1], shape[-1] // self.part[1])
        if self.layout == "plain":
            for axis in self.ones:
                shape = (*shape[:axis], 1, *shape[axis:])
        else:
            shape = tuple(shape[axis] for axis in TO_OFFICIAL[self.layout])
        return (shape[0] * len(self.ours), *shape[1:])


def linear_links(official: str, ours: str, index: int | None = None) -> Iterator[Link]:
    """Yields the links of a dense layer, optionally at `index` of stacked layers."""
    yield Link(f"{official}.weight", (f"{ours}/kernel",), "linear", index)
    yield Link(f"{official}.bias", (f"{ours}/bias",), index=index)


def conv_links(official: str, ours: str, part: tuple[int, int] | None = None) -> Iterator[Link]:
    """Yields the links of a convolution, optionally as a `part` of ours."""
    yield Link(f"{official}.weight", (f"{ours}/kernel",), "conv", part=part)
    yield Link(f"{official}.bias", (f"{ours}/bias",), part=part)


def norm_links(official: str, ours: str, index: int | None = None) -> Iterator[Link]:
    """Yields the links of a normalization with scale and bias, optionally at `index`."""
    yield Link(f"{official}.weight", (f"{ours}/scale",), index=index)
    yield Link(f"{official}.bias", (f"{ours}/bias",), index=index)


# Describing a model takes time and memory in proportion to its sizes, and a small file can claim
# any size.
MAX_MODEL_SIZE, MAX_LAYERS = 2**20, 2**8
Tensors = Mapping[str, np.ndarray]  # official tensors by name


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Holds settings that tensors do not contain; None takes the tensors' or the official value.

    Attributes:
        scales: side length or (h, w) of each token map, coarse to fine.
        heads: attention heads of a transformer without cosine attention.
        groups: number of groups in each group norm of a tokenizer.
        phi_ratio: weight in [0, 1] of the φ convolutions against the identity.
        cosine_codes: whether a tokenizer looks up codes by angle instead of by distance.
        latent_channels: channels of the KL tokenizer that a MAR transformer uses; the other factor
            of a token's size is its patch. None for those of the tokenizer's file if it is given,
            else 16.
        downsampling: pixels per latent of that tokenizer along one side; None for those of its
            file.
        image_size: pixels of both sides, or (height, width), of a KL tokenizer's images. None for
            the size of the MAR transformer's square map if there is one, else 256.
        latent_scale: factor on a KL tokenizer's latents, 1 / standard deviation. None for the value
            in its file, or the known value for that file; see `varjax.convert.kl_files`.
        latent_shift: number subtracted from the latents before scaling. None as for the scale, else
            0.
        mar_heads: attention heads of a MAR transformer's encoder and decoder. None for those of the
            official model of that width, else one for each 64 channels.
        ema: True reads a checkpoint's averaged weights, False the others; None reads the averaged
            weights if there are any.
    """

    scales: tuple[int | tuple[int, int], ...] | None = None
    heads: int | None = None
    groups: int = 32
    phi_ratio: float = 0.5
    cosine_codes: bool = False
    latent_channels: int | None = None
    downsampling: int = 16
    image_size: int | tuple[int, int] | None = None
    latent_scale: float | None = None
    latent_shift: float | None = None
    mar_heads: tuple[int, int] | None = None
    ema: bool | None = None


# ADM's statistics of ImageNet's training set, and MAR's copy of them. Their digests have not been
# published, so the file is recognized by its name.
REFERENCE_256 = ("VIRTUAL_imagenet256_labeled.npz", "adm_in256_stats.npz")
REFERENCE_512 = ("VIRTUAL_imagenet512.npz",)


@dataclasses.dataclass(frozen=True)
class PublishedResult:
    """Holds metrics that authors report, and the settings that they were measured with.

    Attributes:
        metrics: published values by key, as in `varjax.metrics.report.ROWS`.
        options: values of all sampling options.
        references: names of files with the reference's statistics.
    """

    metrics: Mapping[str, float]
    options: Any
    references: tuple[str, ...] = REFERENCE_256


@dataclasses.dataclass(frozen=True)
class Release:
    """Names published checkpoints that together make one directory of weights.

    Attributes:
        repo: repository on the Hugging Face Hub; None if no hub has the files.
        files: name of each file in the repository, by the flag that takes it: {"tokenizer":
            "vae.pth", "var": "d16.pth"}.
        commit: commit of the repository, since branches move.
        sha256: known SHA-256 of each file at that commit, by file name.
        page: page from which a person downloads the files, if they are not in the repository.
        config: config of the transformer; None for a tokenizer.
        results: metrics that the authors report.
        evaluation_options: sampling options of all these results that are not the defaults.
    """

    repo: str | None
    files: Mapping[str, str]
    commit: str
    sha256: Mapping[str, str]
    page: str = ""
    config: Any = None
    results: tuple[PublishedResult, ...] = ()
    evaluation_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def address(self) -> str:
        """The page to download the files from by hand."""
        return self.page or f"https://huggingface.co/{self.repo}"


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Describes one kind of official model: how to recognize it, its sizes and its tensors.

    Attributes:
        part: name of the part and of its file in a directory of weights: "tokenizer", or the name
            of the family.
        flag: flag that takes the official file.
        description: name for messages, with article: "a transformer (VAR)".
        known_by: tensor that identifies it; the first match in NAME_MAPS wins.
        config: class of the config, which has `init(key)`.
        infer: (official tensors, options) -> config; raises InputError if tensors are missing or
            contradict each other.
        table: config -> one link for every official tensor except buffers.
        buffers: config -> the buffers: tensors that official modules derive from their sizes.
        buffer_names: last parts of the buffers' names, which are skipped when a file is read.
        constants: options -> the parameters that no official tensor holds, by path.
        prefix: prefix of the names in checkpoints of a larger model, whose other tensors are
            ignored.
        ignored: prefixes of other tensors that the files may hold.
        trainer_key: key of the model in the official trainer's checkpoints, or None.
        official_constants: config -> the constants in the official code of such a model.
        tokenizer_options: (config, options) -> options for the tokenizer, completed by what the
            model knows about it.
        model_options: (official tensors, options) -> the reverse, for a tokenizer: options for the
            model of its latents, which is inferred first.
        sampling: config -> the sampling options of published samples; None for a tokenizer.
        reads: class of the configs of tokenizers whose latents it reads; None for a tokenizer.
        check_fit: (tokenizer config, config) -> None; raises InputError if the model cannot read
            that tokenizer's latents. None for a tokenizer.
        releases: published models, by the names that `varjax.load` takes.
        size_fields: fields of the config by which a model of a published size is recognized.
    """

    part: str
    flag: str
    description: str
    known_by: str
    config: type
    infer: Callable[[Tensors, ConvertOptions], Any]
    table: Callable[[Any], list[Link]]
    buffers: Callable[[Any], dict[str, Tensor]] = lambda config: {}
    buffer_names: tuple[str, ...] = ()
    constants: Callable[[ConvertOptions], dict[str, np.ndarray]] = lambda options: {}
    official_constants: Callable[[Any], dict[str, np.ndarray]] = lambda config: {}
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    trainer_key: str | None = None
    tokenizer_options: Callable[[Any, ConvertOptions], ConvertOptions] = lambda config, o: o
    model_options: Callable[[Tensors, ConvertOptions], ConvertOptions] = lambda tensors, o: o
    sampling: Callable[[Any], Any] | None = None
    reads: type | None = None
    check_fit: Callable[[Any, Any], None] | None = None
    releases: Mapping[str, Release] = dataclasses.field(default_factory=dict)
    size_fields: tuple[str, ...] = ()


def tensor_shape(tensors: Tensors, name: str, ndim: int) -> tuple[int, ...]:
    """Returns the shape of a tensor that determines sizes of a model.

    Raises InputError if it is missing, does not have `ndim` axes, or is implausibly large.
    """
    if name not in tensors:
        raise InputError(f"{name} is missing, so the model's sizes are unknown")
    shape = tuple(tensors[name].shape)
    if len(shape) != ndim:
        raise InputError(f"{name} has shape {shown(shape)}, but must have {ndim} dimensions")
    if not all(1 <= n <= MAX_MODEL_SIZE for n in shape):
        raise InputError(f"{name} has shape {shape}; sizes are from 1 to {MAX_MODEL_SIZE}")
    return shape


def count_numbers(names: Iterable[str], pattern: str) -> int:
    """Counts the distinct numbers that the group of `pattern` matches at the start of names.

    Raises InputError for more than MAX_LAYERS.
    """
    count = len({match[1] for name in names if (match := re.match(pattern, name))})
    if count > MAX_LAYERS:
        raise InputError(f"it has {count} layers called {pattern}; allowed are {MAX_LAYERS}")
    return count
