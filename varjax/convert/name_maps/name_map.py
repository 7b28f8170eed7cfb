"""Defines the records that describe a kind of official model: tensors and sizes."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from varjax.convert.name_maps.release import Release
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


def batch_norm_links(official: str, ours: str) -> Iterator[Link]:
    """Yields the links of a batch normalization with its stored statistics."""
    yield from norm_links(official, ours)
    yield Link(f"{official}.running_mean", (f"{ours}/mean",))
    yield Link(f"{official}.running_var", (f"{ours}/variance",))


def fields_of(*names: str) -> Callable[[Any], dict[str, Any]]:
    """Returns a function from a config to its fields of these names, for `option_values`."""
    return lambda config: {name: getattr(config, name) for name in names}


def field_differences(config: Any, official: Mapping[str, Any]) -> list[str]:
    """Lists the fields of a config that differ from the official code, as phrases."""
    return [
        f"{name} {getattr(config, name)} instead of {value}"
        for name, value in official.items()
        if getattr(config, name) != value
    ]


def scale_differences(scales: Iterable[Any]) -> list[str]:
    """Lists token maps that are not square, which the official code cannot have, as a phrase."""
    sides = [side for side in scales if not isinstance(side, int) and side[0] != side[1]]
    return [f"maps that are not square ({', '.join(f'{h}x{w}' for h, w in sides)})"] * bool(sides)


# A small file can claim any size, and describing a model takes time and memory in proportion to it.
MAX_MODEL_SIZE, MAX_LAYERS = 2**20, 2**8
Tensors = Mapping[str, np.ndarray]  # official tensors by name


def option(
    default: Any, help: str, parse: Callable[[str], Any] | None = None, form: str = ""
) -> Any:
    """Makes a field of a kind's options, which is also a flag of `varjax convert`.

    Kinds may share an option if it means the same in all of them. `--help` prints the first help.

    Args:
        default: value if neither the user nor a file gives one.
        help: help text of the flag.
        parse: text -> value, raising ValueError; None for a flag without a value.
        form: form of the text, for messages; None if `parse` is int or float.
    """
    metadata = {"help": help, "parse": parse, "form": form}
    return dataclasses.field(default=default, metadata=metadata)


def parse_side(text: str) -> int | tuple[int, int]:
    """Parses "256" and "256x256" into 256, and "256x384" into (256, 384); raises ValueError."""
    if "x" not in text:
        return int(text)
    h, w = map(int, text.split("x"))
    return h if h == w else (h, w)


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Describes one kind of official model: how to recognize it, its sizes and its tensors.

    Attributes:
        part: name of the part and of its file in a directory of weights: "tokenizer", "classifier",
            or the name of the family.
        flag: flag that takes the official file.
        description: name for messages, with article: "a transformer (VAR)".
        known_by: tensor that identifies it; the first match in NAME_MAPS wins.
        config: class of the config, which has `init(key)`.
        options: class of the settings that tensors do not determine; `option` makes its fields.
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
        official_differences: config -> settings that differ from the official code's, as
            phrases: "groups 4 instead of 32".
        option_values: config -> values of those options, by name, that the config determines.
        file_options: (source, location, options) -> options by name that only the file or the files
            next to it determine.
        tokenizer_options: (config, options) -> options by name for the tokenizer, which its file
            does not determine.
        latent_options: official tensors of a tokenizer -> options by name for the model of its
            latents, which is inferred first.
        sampling: config -> the sampling options of published samples; None for a tokenizer.
        reads: class of the configs of tokenizers whose latents it reads; None for a tokenizer.
        check_fit: (tokenizer config, config) -> None; raises InputError if the model cannot read
            that tokenizer's latents. None for a tokenizer.
        releases: published models, by the names that `varjax.load` takes.
        size_fields: fields of the config that identify a published size.
    """

    part: str
    flag: str
    description: str
    known_by: str
    config: type
    options: type
    infer: Callable[[Tensors, Any], Any]
    table: Callable[[Any], list[Link]]
    buffers: Callable[[Any], dict[str, Tensor]] = lambda config: {}
    buffer_names: tuple[str, ...] = ()
    constants: Callable[[Any], dict[str, np.ndarray]] = lambda options: {}
    official_constants: Callable[[Any], dict[str, np.ndarray]] = lambda config: {}
    official_differences: Callable[[Any], list[str]] = lambda config: []
    option_values: Callable[[Any], dict[str, Any]] = lambda config: {}
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    trainer_key: str | None = None
    file_options: Callable[[Any, pathlib.Path, Any], dict[str, Any]] = lambda *arguments: {}
    tokenizer_options: Callable[[Any, Any], dict[str, Any]] = lambda config, options: {}
    latent_options: Callable[[Tensors], dict[str, Any]] = lambda tensors: {}
    sampling: Callable[[Any], Any] | None = None
    reads: type | None = None
    check_fit: Callable[[Any, Any], None] | None = None
    releases: Mapping[str, Release] = dataclasses.field(default_factory=dict)
    size_fields: tuple[str, ...] = ()

    def same_sizes(self, first: Any, second: Any) -> bool:
        """Returns whether two configs have equal `size_fields`."""
        return type(first) is type(second) and all(
            getattr(first, field) == getattr(second, field) for field in self.size_fields
        )

    def own_options(self, options: Mapping[str, Any]) -> Any:
        """Makes the options of this kind from all options of a conversion, by name."""
        names = {field.name for field in dataclasses.fields(self.options)}
        return self.options(**{name: x for name, x in options.items() if name in names})


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds what was read for one part of a directory of weights.

    Attributes:
        path: path of the file, or of the index of its parts.
        kind: kind of model that the file holds.
        tensors: official tensors, all from that model.
        held: all tensors of the file, by the names used in it.
        files: `path` and the paths of its parts.
    """

    path: pathlib.Path
    kind: NameMap
    tensors: Tensors
    held: Tensors = dataclasses.field(default_factory=dict)
    files: tuple[pathlib.Path, ...] = ()


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
        raise InputError(f"it has {count} layers {pattern}; at most {MAX_LAYERS} are allowed")
    return count
