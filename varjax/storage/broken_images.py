"""Images that cannot be read: named once, tolerated up to 1 % of a split."""

import itertools
import sys
from collections.abc import Sequence

from tqdm import tqdm

from varjax.errors import InputError

MAX_BROKEN_SHARE = 0.01
TOLERATED_BROKEN = 10  # do not stop a run, however early they come


class BrokenImage(InputError):
    """Reports an image that cannot be decoded.

    Attributes:
        name: name of the file or record.
        reason: reason, in the words of Pillow or the operating system.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that it survives pickling
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} cannot be read as an image: {self.reason}"


class BrokenImageCounter:
    """Counts the images of a split that were read and those that are broken, and names these.

    counter = BrokenImageCounter(len(source))
    counter.add(read=64, broken=[])
    """

    def __init__(self, size: int):
        self._size, self._read = size, 0
        self._names: dict[str, None] = {}  # in the order in which they came

    def add(self, read: int, broken: Sequence[BrokenImage]) -> None:
        """Names new broken images on stderr.

        The first few never stop a run, because a broken image may be among the first ones read.

        Args:
            read: number of images read since the last call.
            broken: images among them that are broken.

        Raises:
            InputError: more than 1 % of the images read so far are broken.
        """
        self._read += read
        for error in broken:
            if error.name not in self._names:
                self._names[error.name] = None
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        read, count = min(self._read, self._size), len(self._names)
        tolerated = min(TOLERATED_BROKEN, MAX_BROKEN_SHARE * self._size)
        if count > max(MAX_BROKEN_SHARE * read, tolerated):
            some = "\n  ".join(itertools.islice(self._names, TOLERATED_BROKEN))
            raise InputError(
                f"{count} of the {read} images read so far are broken, more than "
                f"{MAX_BROKEN_SHARE:.0%}; repair or remove them, the first ones are\n  {some}"
            )
