"""Checks files of unknown origin, and formats short messages about their content.

The sizes that a file states are checked before memory is allocated for them. So reading a file
takes memory and time in proportion to its actual size.
"""

import contextlib
import json
import math
import os
import pathlib
import stat
from collections.abc import Mapping, Sequence
from typing import Any

from varjax.errors import InputError

MAX_RANK = 64  # NumPy's
MAX_SIDE, MAX_BYTES = 2**48, 2**63  # limits of addresses and of NumPy's sizes
MAX_NAME_LENGTH = 512  # names of real tensors have less than 100 characters
# Compressed, shared or expanded tensors may be larger than the file, but real weights shrink by at
# most a tenth, and are shared once or twice.
MAX_RATIO, SMALL_BYTES = 8, 2**20
MAX_SETTING, MAX_SETTINGS_LENGTH = 2**20, 256  # real configs stay below 10,000 and 20
MAX_DEPTH, MAX_INTEGER = 64, 2**64  # of JSON data; deeper data would overflow the stack
# Decoding takes up to 8 bytes a pixel, for any bit depth, in each of up to 16 threads.
MAX_PIXELS, MAX_ASPECT_RATIO = 2**26, 100
SHOWN_LENGTH, SHOWN_ITEMS, SHOWN_LINES, REASON_LENGTH = 80, 6, 50, 200
COMPARED_LENGTH = 150  # characters of a value in `differences`


def plausible_bytes(file_bytes: int) -> int:
    """Returns the largest plausible size of a file's unpacked content or of all its tensors."""
    return max(SMALL_BYTES, MAX_RATIO * file_bytes)


def bytes_on_disk(path: pathlib.Path) -> int:
    """Returns the bytes of a file, or of all files below a folder.

    Links count as their targets, because some tools store data elsewhere and link each file.
    """
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):  # the file may just have been removed
                total += os.stat(os.path.join(folder, name)).st_size
    return total if path.is_dir() else path.stat().st_size


def open_regular_file(path: str, flags: int) -> int:
    """Opens a file for `open(path, "rb", opener=open_regular_file)`.

    Raises InputError for a pipe or device, which may block or have no end.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # a pipe would block until it is written
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError("it is not a regular file; copy its content to one")
    return descriptor


def image_limits() -> tuple[int, int]:
    """Returns the largest number of pixels and aspect ratio that an image file may have.

    The environment variables VARJAX_MAX_PIXELS and VARJAX_MAX_ASPECT_RATIO set other limits, for
    all commands and their worker processes. Raises InputError if one is not a positive integer.
    """
    limits = []
    for name, default in (
        ("VARJAX_MAX_PIXELS", MAX_PIXELS),
        ("VARJAX_MAX_ASPECT_RATIO", MAX_ASPECT_RATIO),
    ):
        text = os.environ.get(name, "") or str(default)
        if not text.isdecimal() or int(text) < 1:
            raise InputError(f"{name}={text}: must be a whole number, 1 or more")
        limits.append(int(text))
    return limits[0], limits[1]


def check_integers(numbers: Any) -> tuple[int, ...]:
    """Returns a size or strides as a tuple.

    Raises InputError unless they are a list or tuple of at most 64 integers of 0 or more.
    """
    if not isinstance(numbers, list | tuple) or len(numbers) > MAX_RANK:
        raise InputError(
            f"a tensor has size or stride {shown(numbers)}; at most {MAX_RANK} integers are allowed"
        )
    if any(type(n) is not int or not 0 <= n < MAX_SIDE for n in numbers):
        raise InputError(
            f"a tensor has size or stride {shown(numbers)}, which must be non-negative integers: "
            "the file is damaged"
        )
    return tuple(numbers)


def check_shape(shape: Any, itemsize: int) -> tuple[int, ...]:
    """Returns a shape as a tuple; raises InputError unless NumPy supports it.

    Args:
        shape: value to check, of any type.
        itemsize: bytes per element.
    """
    shape = check_integers(shape)
    # NumPy limits the other axes even if one has length 0.
    if math.prod(n or 1 for n in shape) * itemsize >= MAX_BYTES:
        raise InputError(f"a tensor has size {shown(shape)}, larger than any memory")
    return shape


def check_name(name: Any) -> str:
    """Returns the name of a tensor; raises InputError unless it is a short, printable string."""
    if not isinstance(name, str):
        raise InputError(f"the name {shown(name)} is {_kind(name)}, not a string")
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise InputError(
            f"a tensor is called {shown(name)}; names have at most {MAX_NAME_LENGTH} printable "
            "characters"
        )
    return name


def check_relative_name(name: Any, source: object) -> str:
    """Returns the name of a file below a folder, unless it leads out of the folder.

    Args:
        name: value to check, of any type; a path with "/" between its parts.
        source: where the name comes from, for the message.

    Raises:
        InputError: the name is not a string, is absolute, has empty parts, "." or "..", or
            characters that file names cannot have.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") or "\0" in part or not _encodable(part) for part in parts):
        raise InputError(
            f"{source} names a file {shown(name)}; names must be relative, without empty parts, "
            '"." and ".."; rename or remove the file'
        )
    return name


def path_inside(folder: pathlib.Path, name: Any, source: object) -> pathlib.Path:
    """Returns the path of a file in a folder on a disk, for a name of unknown origin.

    Every path made from a name in a listing, an index or an archive must come from this function.
    Arguments and errors are those of `check_relative_name`. It also raises InputError for a link
    that leads out of the folder.
    """
    path = folder / check_relative_name(name, source)
    if not os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), "")):
        raise InputError(f"{path} is a link that leads out of {folder}; remove the link")
    return path


def parse_json(text: str | bytes) -> Any:
    """Parses JSON of unknown origin.

    Raises ValueError for data that are not JSON or not UTF-8, are nested more than 64 deep, or
    have an integer of more than 64 bits.
    """
    try:
        data = json.loads(text, parse_int=_parse_integer)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from error
    level = [data]
    for _ in range(MAX_DEPTH):
        inner = [
            x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)
        ]
        if not (level := [value for values in inner for value in values]):
            return data
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def parse_metrics_line(line: str | bytes) -> dict[str, Any] | None:
    """Reads a line of metrics.jsonl.

    Returns:
        "step" and the numbers of the line, with None for numbers that were not finite; {} for a
        line without a step; None for a line that is truncated or damaged.
    """
    try:
        data = parse_json(line)
    except ValueError:
        return None
    if not isinstance(data, dict) or type(data.get("step", 0)) is not int:
        return None
    numbers = {name: x for name, x in data.items() if type(x) in (int, float, type(None))}
    return numbers if "step" in data else {}


def check_settings(settings: Any, path: str) -> None:
    """Raises InputError for a number or a list that is too large for a model's config.

    Args:
        settings: settings of a config, read from a file.
        path: dotted path of the settings, for the message.
    """
    if isinstance(settings, dict):
        for name, value in settings.items():
            check_settings(value, f"{path}.{name}")
    elif isinstance(settings, list):
        if len(settings) > MAX_SETTINGS_LENGTH:
            allowed = f"at most {MAX_SETTINGS_LENGTH} are allowed"
            raise InputError(f"{path} has {len(settings)} items; {allowed}")
        for i, value in enumerate(settings):
            check_settings(value, f"{path}[{i}]")
    elif isinstance(settings, int | float) and not abs(settings) <= MAX_SETTING:
        raise InputError(f"{path} is {shown(settings)}; numbers up to {MAX_SETTING:,} are allowed")


def shown(value: Any) -> str:
    """Formats a value for a message: a short, plain value itself, otherwise its type and size.

    The repr of a hostile object may take exponential time.
    """
    if isinstance(value, str | bytes):
        start = repr(value[:SHOWN_LENGTH])
        return start if len(value) <= SHOWN_LENGTH else f"{start} … ({len(value)} in all)"
    if isinstance(value, int) and abs(value) >= MAX_BYTES:
        return f"about {'-' * (value < 0)}10^{int(value.bit_length() * math.log10(2))}"
    if isinstance(value, int | float | complex | None):
        return repr(value)
    if type(value) in (tuple, list):
        items = [_kind(x) if type(x) in (tuple, list) else shown(x) for x in value[:SHOWN_ITEMS]]
        more = ["…"] if len(value) > SHOWN_ITEMS else []
        text = ", ".join(items + more)
        if type(value) is list:
            return f"[{text}]"
        return f"({text},)" if len(value) == 1 else f"({text})"
    return _kind(value)


def differences(a: Any, b: Any, in_a: str, in_b: str, path: str = "") -> list[str]:
    """Lists where two JSON trees differ: "path: A in_a, B in_b".

    An absent value equals None: it may be missing because it was added to a later version.

    Args:
        a: first tree of JSON data.
        b: second tree of JSON data.
        in_a: words that follow a value of the first tree, such as "there".
        in_b: words that follow a value of the second tree.
        path: dotted path of the trees; "" for none.
    """
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return [] if a == b else [f"{path}: {_compared(a)} {in_a}, {_compared(b)} {in_b}"]
    lines = []
    for name in dict.fromkeys((*a, *b)):
        below = f"{path}.{name}" if path else name
        lines += differences(a.get(name, ABSENT), b.get(name, ABSENT), in_a, in_b, below)
    return lines


def printable(text: str) -> str:
    """Escapes characters that a terminal would not print: text from a file may contain any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason(error: Exception) -> str:
    """Returns the text of an exception for a message, short and printable."""
    text = str(error)[:REASON_LENGTH]
    return text if text.isprintable() else repr(text)


def abridged(lines: Sequence[str]) -> list[str]:
    """Returns the first lines of a message, and the number of the others."""
    others = len(lines) - SHOWN_LINES
    return [*lines[:SHOWN_LINES], f"… and {others} more"] if others > 0 else list(lines)


def _parse_integer(text: str) -> int:
    if len(text) > 21 or abs(value := int(text)) >= MAX_INTEGER:
        raise ValueError(f"an integer of {len(text)} digits")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Absent:
    def __eq__(self, other: object) -> bool:
        return other is None

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def _compared(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= COMPARED_LENGTH else f"{text[:COMPARED_LENGTH]} …"


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
