"""What may stand after the colon of --config=configs/FILE.py:…"""

from collections.abc import Collection

from varjax.core.errors import InputError


def read_argument(
    arg: str, sizes: Collection[str], options: Collection[str] = ()
) -> tuple[str, str, set[str]]:
    """(size, data, options) of "SIZE,data=WHERE,OPTION,…" in any order.

    The first of `sizes`, and ImageNet of TFDS, where they are not said. Raises InputError that says
    what is allowed.
    """
    size, data, chosen = next(iter(sizes)), "tfds:imagenet2012", set()
    for word in arg.split(","):
        name, _, where = word.partition("=")
        if word in sizes:
            size = word
        elif word in options:
            chosen.add(word)
        elif name == "data" and where:
            data = where
        else:
            allowed = ", ".join([*sizes, *options])
            raise InputError(f"cannot read {word!r}; allowed are {allowed} and data=KIND:WHERE")
    return size, data, chosen
