"""Splits texts such as "d16,data=folder:DIR", which a command line gives to a config."""

import os
import re

COMMA_HINT = "; write \\, for a comma within a path"
PATH = re.compile(r"\w+=(?:\w+:)?(.+)")


def split_argument(arg: str) -> list[str]:
    """Splits "a,b,c" at its commas, but not within a path that exists.

    "\\," always stands for a comma within a word.

        split_argument("d16,data=folder:/data/a, b")  # ["d16", "data=folder:/data/a, b"]
    """
    pieces = [word.replace("\\,", ",") for word in re.split(r"(?<!\\),", arg)]
    words = []
    while pieces:
        joined = {count: ",".join(pieces[:count]) for count in range(len(pieces), 0, -1)}
        with_comma = (count for count, word in joined.items() if count > 1 and _path_exists(word))
        count = next(with_comma, 1)
        words.append(joined[count])
        del pieces[:count]
    return words


def _path_exists(word: str) -> bool:
    """Returns whether a word is "NAME=PATH" or "NAME=KIND:PATH" with a path that exists."""
    match = PATH.fullmatch(word)
    return match is not None and os.path.exists(match[1])
