"""Reads the text after the colon of --config=configs/FILE.py:…"""

from collections.abc import Collection, Sequence

from varjax.config.arguments import COMMA_HINT
from varjax.config.arguments import split_argument as split_argument
from varjax.errors import InputError


def read_argument(
    words: Sequence[str], sizes: Collection[str], options: Collection[str] = ()
) -> tuple[str, str, set[str]]:
    """Returns (size, data, options) from words "SIZE", "data=WHERE" and "OPTION", in any order.

    Defaults are the first of `sizes`, and TFDS's ImageNet. Raises InputError for any other word.
    """
    size, data, chosen = next(iter(sizes)), "tfds:imagenet2012", set()
    for word in words:
        name, _, where = word.partition("=")
        if word in sizes:
            size = word
        elif word in options:
            chosen.add(word)
        elif name == "data" and where:
            data = where
        else:
            allowed = ", ".join([*sizes, *options])
            hint = COMMA_HINT if any(word.startswith("data=") for word in words) else ""
            raise InputError(
                f"cannot read {word!r}; allowed are {allowed} and data=KIND:WHERE{hint}"
            )
    return size, data, chosen
