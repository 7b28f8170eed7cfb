"""Reads sampling options with several values each, such as "guidance=1,2,4"."""

import argparse
import dataclasses
import functools
import itertools
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from varjax.config.renamed import renamed_message
from varjax.errors import InputError
from varjax.sampling.sampler import parse_option

T = TypeVar("T")


def parse_sweep(texts: Sequence[str], options: Any) -> list[dict[str, Any]]:
    """Reads texts such as "guidance=1,1.5,2" and returns all combinations of their values.

    A colon joins the numbers of a list: "guidance=1:2:3,2.5" is a list and a number.

    Args:
        texts: one NAME=VALUE,VALUE… for each option to vary.
        options: sampling options of the model, whose fields may be named.

    Returns:
        The combinations, each as values by option name.

    Raises:
        InputError: an unknown option, or a value that it cannot take or that is given twice.
    """
    types = typing.get_type_hints(type(options))
    names = [field.name for field in dataclasses.fields(options)]
    axes = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if values and (message := renamed_message(type(options), name, values)):
            raise InputError(f"sweep {message}")
        if not equals or not values or name not in names:
            raise InputError(
                f"sweep {text}: give OPTION=VALUE,VALUE…; options of this model are "
                f"{', '.join(names)}"
            )
        if name in axes:
            raise InputError(f"sweep {text}: {name} is swept twice")
        axes[name] = read_values(text, functools.partial(parse_sweep_value, name, types[name]))
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def check_given_or_swept(given: Mapping[str, Any], texts: Sequence[str]) -> None:
    """Checks that no option has a value and is swept too, which would ignore the value.

    Args:
        given: values of the options that are set, by name.
        texts: one NAME=VALUE,VALUE… for each option to vary.

    Raises:
        InputError: an option of both kinds.
    """
    for name in (text.partition("=")[0] for text in texts):
        if name in given:
            value = option_text(given[name])
            raise InputError(f"{name}={value} and a sweep of {name}: give one of them")


def read_values(text: str, read: Callable[[str], T]) -> list[T]:
    """Reads the values of NAME=VALUE,VALUE…; raises InputError if two of them are equal.

    Args:
        text: name and values.
        read: function that reads one value.
    """
    values = [read(value) for value in text.partition("=")[2].split(",")]
    if len(set(values)) < len(values):  # equal values, such as 1 and 1.0, share a report
        raise InputError(f"sweep {text}: a value is given twice; give each value once")
    return values


def parse_sweep_value(name: str, hint: Any, text: str) -> Any:
    """Converts the text of a value to its type; a colon joins the numbers of a list.

    Raises InputError for text that is not of this type.
    """
    try:
        return parse_option(name, hint, text, separator=":")
    except argparse.ArgumentTypeError as error:
        raise InputError(f"sweep {error}") from None


def option_text(value: Any) -> str:
    """Formats an option's value as `parse_sweep` reads it: "2.5", "1:2:3"."""
    if isinstance(value, tuple | list):  # a list if it was read from JSON
        return ":".join(map(option_text, value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
