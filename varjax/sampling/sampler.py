"""Defines what a model family offers to everything that samples from it.

A family's sampling options are a frozen dataclass; this file turns its fields into keyword
arguments and command-line flags.
"""

import argparse
import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import flax.struct
import jax
import numpy as np

from varjax import trees
from varjax.checkpoints.class_names import ClassNames
from varjax.config.renamed import Renamed, former_names, renamed_message
from varjax.errors import InputError
from varjax.trees import PyTree

T = TypeVar("T")
# A user's function: (step number from 0, images (B, H, W, channels) float32 in [0, 1]) -> ignored
StepListener = Callable[[int, np.ndarray], Any]
# (images (B, H, W, channels) to send, array) -> the array, once they are sent
SendImages = Callable[[jax.Array, jax.Array], jax.Array]


class Sampler(Protocol):
    """Samples images from labels; outputs, resuming and many devices are built on top of it.

    Attributes:
        classes: number of classes; the label `classes` itself means "no class".
        labels: names of the classes, in the order of their numbers.
        image_shape: (H, W, channels) of an image.
        edit_shape: (h, w) of the map on which an edit marks what to keep.
        devices: devices that share each batch.
    """

    @property
    def classes(self) -> int: ...

    @property
    def labels(self) -> ClassNames: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def edit_shape(self) -> tuple[int, int]: ...

    @property
    def devices(self) -> tuple[Any, ...]: ...

    def options(self, **options: Any) -> Any:
        """Returns the model's own sampling options, a frozen dataclass, with `options` replaced.

        Raises InputError for a value out of range.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """Returns what images depend on in addition to labels, seed and options, as JSON data."""
        ...

    def sampling_bytes(self, batch_size: int, options: Any) -> int:
        """Estimates the bytes of memory a device needs to sample a number of images at a time.

        options: as `options()` returns them.
        """
        ...

    def advise_on_nan(self, options: Any) -> str:
        """Says what to try if a sampled image holds NaN or infinite numbers.

        options: as `options()` returns them.
        """
        ...

    def steps(self, options: Any) -> int:
        """Returns how many steps draw an image, which `sample` can show with `every_step`.

        options: as `options()` returns them.
        """
        ...

    def sample(
        self,
        labels: Any,
        seed: int = 0,
        *,
        index: Sequence[int] | np.ndarray | None = None,
        every_step: bool | StepListener = False,
        **options: Any,
    ) -> jax.Array:
        """Samples one image for each label: (B, H, W, channels) float32 in [0, 1].

        Args:
            labels: (B,) classes to draw, by number or name.
            seed: random seed; image i depends only on seed, index[i], labels[i] and options.
            index: (B,) numbers of the images; None for 0 … B-1.
            every_step: whether to return (S, B, H, W, channels), the images after each step; or a
                function that gets them while the later ones are drawn.
            options: fields of `options()` to replace.
        """
        ...

    def edit(
        self,
        images_BHWC: Any,
        keep: np.ndarray,
        labels: Any = None,
        seed: int = 0,
        *,
        index: Sequence[int] | np.ndarray | None = None,
        every_step: bool | StepListener = False,
        **options: Any,
    ) -> jax.Array:
        """Redraws everything outside of `keep`; otherwise like `sample`.

        Args:
            images_BHWC: uint8, or float in [0, 1]; one image, or one for each of `index`.
            keep: (h, w) or (B, h, w) bool of `edit_shape`; True keeps that part of the image.
            labels: (B,) classes; None for no class.
        """
        ...


@flax.struct.dataclass
class KnownTokens:
    """Holds tokens that sampling must keep, for editing.

    Attributes:
        token_BL: tokens of the images, (B, L) codes or (B, L, Z) vectors.
        keep_BL: True where tokens are kept, False where new ones are drawn.
    """

    token_BL: jax.Array
    keep_BL: jax.Array


def image_keys(seed: int | jax.Array, index_B: jax.typing.ArrayLike) -> jax.Array:
    """Derives a key (B,) per image from the seed and the image's number, not its batch position.

        key_B = varjax.image_keys(0, jnp.arange(4))  # those of model.sample(labels, seed=0)

    Args:
        seed: random seed of all images.
        index_B: numbers of the images, integers below 2³².
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index_B)


def nan_advice(params: PyTree, dtype: Any, *others: str) -> str:
    """Says what may help if a model's images are NaN.

    Args:
        params: the model's weights, on the host.
        dtype: dtype of the matmuls.
        others: further advice, "" for none.
    """
    if bad := trees.nonfinite(params):
        return (
            f"The weights themselves hold NaN or infinite numbers ({', '.join(bad[:3])}): use an "
            "earlier checkpoint, or train or convert them again"
        )
    lower = np.dtype(dtype) != np.float32
    tries = ["--dtype=float32"] * lower + [other for other in others if other]
    tries.append("weaker guidance (--guidance), or weights that were trained longer")
    return f"Try {'; or '.join(tries)}"


def option_field(
    default: Any,
    help: str,
    static: bool = False,
    renamed: Renamed | None = None,
    limits: tuple[float, float] | None = None,
    slider: tuple[float, float, float] | None = None,
) -> Any:
    """Makes a field of an options dataclass (flax.struct), which becomes a keyword and a flag.

    Args:
        default: default value of the option.
        help: help text of the flag.
        static: whether a new value requires a new compilation.
        renamed: former name of the option, which old configs have.
        limits: least and largest number that is allowed; None for an option that is no number.
        slider: lowest value, highest value and step of a slider for the option; None for no slider.
    """
    metadata = {"help": help, "renamed": renamed, "limits": limits}
    metadata |= {"static": static, "slider": slider}
    return flax.struct.field(not static, default=default, metadata=metadata)


def replace_options(options: T, changes: Mapping[str, Any]) -> T:
    """Returns `options`, a dataclass, with the fields in `changes` replaced, except by None.

    Raises InputError for a name that is not a field.
    """
    for name, value in changes.items():
        if value is not None and (message := renamed_message(type(options), name, value)):
            raise InputError(message)
    names = [field.name for field in dataclasses.fields(typing.cast(Any, options))]
    chosen = {name: value for name, value in changes.items() if value is not None}
    if unknown := sorted(chosen.keys() - names):
        known = ", ".join(names)
        raise InputError(f"{', '.join(unknown)}: not an option of this model; it has {known}")
    return dataclasses.replace(typing.cast(Any, options), **chosen)


def add_option_flags(parser: argparse._ActionsContainer, kinds: Iterable[type]) -> None:
    """Adds a flag for each field of these option classes; without it, the value is None.

    The flag's help is the "help" in the field's metadata, with the name of the family. Fields of
    the same name must have the same type in all classes, or a number in some and `OneOrEach` of
    such numbers in others.
    """
    types: dict[str, Any] = {}
    helps: dict[str, list[str]] = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            hint = hints[field.name]
            other = types.setdefault(field.name, hint)
            if other in typing.get_args(hint):
                types[field.name] = hint
            assert hint in (types[field.name], *typing.get_args(types[field.name])), (kind, field)
            family = kind.__name__.removesuffix("Options")
            helps.setdefault(field.name, []).append(f"{family}: {field.metadata['help']}")
    for name in former_names(kinds):  # parsed, so that the model can refuse them
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name, hint in types.items():
        about = "; ".join(helps[name])
        if hint is bool:
            switch = argparse.BooleanOptionalAction
            parser.add_argument(f"--{name}", action=switch, help=about)
        else:
            parse = functools.partial(parse_option, name, hint)
            parser.add_argument(f"--{name}", type=parse, help=about)


def parse_option(name: str, hint: Any, text: str, separator: str = ",") -> Any:
    """Converts the text of an option's value to the option's type.

    Args:
        name: name of the option, for the message.
        hint: type of the option. `float | tuple[float, ...]` takes one number or several.
        text: value as it was typed.
        separator: separator of several numbers.

    Raises:
        argparse.ArgumentTypeError: the text is not of this type.
    """
    several = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kind = typing.get_args(hint)[0] if several else hint
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if not several:
            return kind(text)
        first, *others = map(kind, text.split(separator))
    except (ValueError, KeyError):
        allowed = f"give a {kind.__name__}"
        allowed += f", or one for each scale or step, joined by {separator!r}" if several else ""
        raise argparse.ArgumentTypeError(f"{name}={text}: {allowed}") from None
    return (first, *others) if others else first


def given_options(flags: argparse.Namespace, kinds: Iterable[type]) -> dict[str, Any]:
    """Returns the options set on the command line, under the fields' current or former names."""
    names = dict.fromkeys(field.name for kind in kinds for field in dataclasses.fields(kind))
    names |= dict.fromkeys(former_names(kinds))
    return {name: value for name in names if (value := getattr(flags, name)) is not None}
