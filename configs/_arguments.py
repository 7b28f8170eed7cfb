"""Reads the text after the colon of --config=configs/FILE.py:…"""

from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

from varjax.config.arguments import COMMA_HINT, split_argument
from varjax.errors import InputError

Word = TypeVar("Word", bound=str)


def split_words(arg: str) -> list[str]:
    """Splits the text at its commas, as `split_argument` does.

    Raises InputError if a setting "NAME=VALUE" is given more than once.
    """
    words = split_argument(arg)
    names = [word.partition("=")[0] for word in words if "=" in word]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{twice} is given more than once in {arg!r}; give it once")
    return words


def read_argument(
    words: Sequence[str], sizes: Collection[str], options: Collection[str] = ()
) -> tuple[str, str, set[str]]:
    """Returns (size, data, options) from words "SIZE", "data=WHERE" and "OPTION", in any order.

    Defaults are the first of `sizes`, and TFDS's ImageNet. Raises InputError for any other word, or
    more than one size.
    """
    size = exclusive_word(words, sizes) or next(iter(sizes))
    data, chosen = "tfds:imagenet2012", set()
    for word in words:
        name, _, where = word.partition("=")
        if word in options:
            chosen.add(word)
        elif name == "data" and where:
            data = where
        elif word not in sizes:
            allowed = ", ".join([*sizes, *options])
            hint = COMMA_HINT if any(word.startswith("data=") for word in words) else ""
            raise InputError(
                f"cannot read {word!r}; allowed are {allowed} and data=KIND:WHERE{hint}"
            )
    return size, data, chosen


def exclusive_word(words: Sequence[str], allowed: Iterable[Word]) -> Word | None:
    """Returns the one word of `allowed` that is given, None for none; InputError for several."""
    found = [word for word in allowed if word in words]
    if len(found) > 1:
        raise InputError(f"{' and '.join(found)} exclude each other; give one of them")
    return found[0] if found else None
