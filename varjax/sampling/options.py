"""A family's sampling options, a frozen dataclass, as keyword arguments and as flags."""

import argparse
import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from varjax.core.errors import InputError

T = TypeVar("T")


def replace_options(options: T, given: Mapping[str, Any]) -> T:
    """Returns `options` with the fields in `given` replaced, except by None.

    Raises InputError for a name that is no field.
    """
    names = [field.name for field in dataclasses.fields(typing.cast(Any, options))]
    chosen = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(chosen.keys() - names):
        known = ", ".join(names)
        raise InputError(f"{', '.join(unknown)}: no option of this model; it has {known}")
    return dataclasses.replace(typing.cast(Any, options), **chosen)


def add_option_flags(parser: argparse.ArgumentParser, kinds: Iterable[type]) -> None:
    """Adds a flag for each field of these option classes; without it, the value is None.

    A field's "help" in its metadata is the flag's help. A name that several classes share must
    have one type in all of them.
    """
    types: dict[str, Any] = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            hint, about = hints[field.name], field.metadata["help"]
            assert types.setdefault(field.name, hint) == hint, (kind, field.name)
            if f"--{field.name}" in parser._option_string_actions:
                continue
            if hint is bool:
                parser.add_argument(
                    f"--{field.name}", action="store_true", default=None, help=about
                )
            else:
                parser.add_argument(f"--{field.name}", type=hint, help=about)


def given_options(flags: argparse.Namespace, kinds: Iterable[type]) -> dict[str, Any]:
    """Returns the options that the command line names, by field."""
    names = dict.fromkeys(field.name for kind in kinds for field in dataclasses.fields(kind))
    return {name: value for name in names if (value := getattr(flags, name)) is not None}
