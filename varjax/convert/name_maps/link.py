"""One row of a name map: an official PyTorch tensor, and where its numbers are here."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

# Orders of axes: (out, in) and OIHW of PyTorch <-> (in, out) and HWIO here.
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
        """Returns the official tensor's numbers for its part of the parameter at `path`: a view."""
        part = np.split(tensor, len(self.ours))[self.ours.index(path)]
        return part if self.layout == "plain" else part.transpose(TO_OURS[self.layout])

    def to_official(self, leaves: list[np.ndarray]) -> np.ndarray:
        """Joins the numbers of all of `ours` into the official tensor, but for axes of length 1."""
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
