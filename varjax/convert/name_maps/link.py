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

    Attributes:
        official: name of the tensor.
        ours: paths of our parameters; several share the tensor in equal parts of its first axis.
        layout: "linear" (out, in) <-> (in, out); "conv" OIHW <-> HWIO; "plain" the same but for
            axes of length 1.
        index: position along the leading (stacked) axis of our parameter, or None.
        ones: for "plain", where the official shape has axes of length 1.
    """

    official: str
    ours: tuple[str, ...]
    layout: Literal["plain", "linear", "conv"] = "plain"
    index: int | None = None
    ones: tuple[int, ...] = ()

    def to_ours(self, tensor: np.ndarray, path: str) -> np.ndarray:
        """Returns the official tensor's numbers for the parameter at `path`: a view."""
        part = np.split(tensor, len(self.ours))[self.ours.index(path)]
        return part if self.layout == "plain" else part.transpose(TO_OURS[self.layout])

    def to_official(self, leaves: list[np.ndarray]) -> np.ndarray:
        """Joins the numbers of all of `ours` into the official tensor, but for axes of length 1."""
        if self.layout != "plain":
            leaves = [leaf.transpose(TO_OFFICIAL[self.layout]) for leaf in leaves]
        return np.concatenate(leaves)

    def official_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the official shape for the shape of one of `ours`, stacked axis included."""
        if self.index is not None:
            shape = shape[1:]
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


def conv_links(official: str, ours: str) -> Iterator[Link]:
    """Yields the links of a convolution."""
    yield Link(f"{official}.weight", (f"{ours}/kernel",), "conv")
    yield Link(f"{official}.bias", (f"{ours}/bias",))


def norm_links(official: str, ours: str) -> Iterator[Link]:
    """Yields the links of a normalization with scale and bias."""
    yield Link(f"{official}.weight", (f"{ours}/scale",))
    yield Link(f"{official}.bias", (f"{ours}/bias",))
