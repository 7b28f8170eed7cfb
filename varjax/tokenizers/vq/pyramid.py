"""The pyramid of scales of one image: sizes, slices, levels. Static NumPy only."""

import dataclasses
import functools

import numpy as np

from varjax.errors import InputError

Scale = int | tuple[int, int]

# Side lengths of the official models: one tokenizer serves 256 and 512 pixels.
SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
SCALES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
# A file can claim any sizes, and describing a model takes time and memory that grow with them.
MAX_SCALES, MAX_LENGTH = 64, 2**16


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """Describes K token maps, coarse to fine, whose tokens make one sequence of L, row by row.

        Pyramid((1, 2, (3, 4))).slices  # (slice(0, 1), slice(1, 5), slice(5, 17))

    Hashable, so that it can be closed over or passed as a static argument. Raises InputError if
    there is no scale, a side is below 1, a map is smaller than the one before it, or there are more
    scales or tokens than any model has.

    Attributes:
        scales: side length of each map if it is square, or (h, w).
    """

    scales: tuple[Scale, ...]

    def __post_init__(self):
        if not self.scales:
            raise InputError("scales is empty: give at least one side length, such as (1, 2, 4)")
        if len(self.scales) > MAX_SCALES:
            raise InputError(f"there are {len(self.scales)} scales; allowed are {MAX_SCALES}")
        for side in (side for shape in self.shapes for side in shape):
            if side < 1:
                raise InputError(f"scales={self.scales}: a side of {side}; sides are 1 or more")
        for (h, w), (next_h, next_w) in zip(self.shapes, self.shapes[1:], strict=False):
            if next_h < h or next_w < w:
                raise InputError(
                    f"scales={self.scales}: {next_h}x{next_w} comes after {h}x{w}; "
                    "list the scales from coarse to fine"
                )
        if self.length > MAX_LENGTH:
            raise InputError(
                f"scales={self.scales}: {self.length} tokens together; allowed are {MAX_LENGTH}"
            )

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(h, w) of every scale."""
        return tuple((s, s) if isinstance(s, int) else (s[0], s[1]) for s in self.scales)

    @property
    def finest(self) -> tuple[int, int]:
        """(h, w) of the last scale, which is the tokenizer's feature map."""
        return self.shapes[-1]

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens l of every scale, row by row."""
        return tuple(h * w for h, w in self.shapes)

    @property
    def length(self) -> int:
        """Number of tokens L of all scales together."""
        return sum(self.lengths)

    def __len__(self) -> int:
        """Number of scales K."""
        return len(self.scales)

    @functools.cached_property
    def slices(self) -> tuple[slice, ...]:
        """Positions of each scale in the sequence of L tokens."""
        ends = np.cumsum(self.lengths).tolist()
        return tuple(slice(end - n, end) for end, n in zip(ends, self.lengths, strict=True))

    @functools.cached_property
    def level_L(self) -> np.ndarray:
        """The scale (0 … K-1) that each token belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def progress(self, k: int) -> float:
        """Returns how far scale k is from the first (0) to the last (1); 0 for a single scale."""
        return k / max(len(self) - 1, 1)

    def phi_index(self, num_phi: int) -> tuple[int, ...]:
        """Returns which of `num_phi` shared φ convolutions each scale uses; 0 means one per scale.

        The nearest of the evenly spread ticks wins. With K = 10 and four φ, two scales lie exactly
        between ticks and the rounding of float64 decides, so this stays in NumPy's float64.
        """
        if num_phi == 0:
            return tuple(range(len(self)))
        inset = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
        ticks = np.linspace(inset, 1 - inset, num_phi)
        return tuple(int(np.argmin(np.abs(ticks - self.progress(k)))) for k in range(len(self)))
