"""Reads --config=FILE.py[:ARGUMENT] and --config.FIELD=VALUE for all commands.

    parser = argparse.ArgumentParser("varjax train", description=__doc__)
    add_config_flags(parser)
    flags, experiment = config_from_flags(parser, arguments)

Fields are documented by their class: the `Attributes:` section, or any line "name: text", of its
docstring.
"""

import argparse
import dataclasses
import importlib.machinery
import importlib.util
import inspect
import json
import os
import pathlib
import re
import sys
import textwrap
import types
import typing
import zlib
from collections.abc import Iterator
from typing import Any

from varjax.config import config_tree
from varjax.errors import InputError, did_you_mean
from varjax.storage.read_errors import retry_read

# "name: text", "a, b: text" or "name (int): text"; the text may continue on further lines.
ENTRY = re.compile(r"\s*(\w+(?:, \w+)*)(?: \([^)]*\))?:\s+(\S.*)")
PREFIX = "--config."
_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# The installed package contains the configs; in a clone they are next to it.
SHIPPED = (_PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent) / "configs"


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --config and --print_config, for `config_from_flags`."""
    group = parser.add_argument_group(
        "config", "with --help, --config=FILE.py also lists every field of that config"
    )
    group.add_argument(
        "--config",
        required=True,
        metavar="FILE.py[:ARGUMENT]",
        help="Python file with a function get_config(), and its argument",
    )
    group.add_argument(
        "--config.FIELD", dest="_", metavar="VALUE", help="change a field, as in --config.seed=1"
    )
    group.add_argument(
        "--print_config", action="store_true", help="print the whole config as JSON and exit"
    )


def config_from_flags(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, Any]:
    """Parses a command line, reads its config and applies the changed fields.

    With --help or --print_config, prints the config and exits with code 0.

    Args:
        parser: parser of the command, with the flags of `add_config_flags`.
        arguments: the command line without the command's name.

    Returns:
        The parsed flags, and what the config's `get_config` returned with the changes.

    Raises:
        InputError: the config file does not exist, a flag or field is unknown, or a value does not
            fit the type of its field.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("-h", "--help", action="store_true")
    first.add_argument("--config")
    first.add_argument("--print_config", action="store_true")
    first_flags, others = first.parse_known_args(arguments)
    others, changes = split_changes(others)
    if first_flags.config and (first_flags.help or first_flags.print_config):
        config = _changed_config(first_flags.config, changes)
        text = json.dumps(config_tree.to_dict(config), indent=2)
        if first_flags.help:
            text = (
                f"{parser.format_help()}\nfields of {first_flags.config}, as they are set now:\n\n"
            )
            text += describe(config)
        try:
            print(text, flush=True)
        except BrokenPipeError:  # "| head" has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    flags, unknown = parser.parse_known_args(split_changes(arguments)[0])
    if unknown:
        hint = did_you_mean(unknown[0].partition("=")[0], parser._option_string_actions)
        raise InputError(f"unknown arguments {unknown}; settings are --config.FIELD=VALUE{hint}")
    return flags, _changed_config(flags.config, changes)


def _changed_config(location: str, changes: list[str]) -> Any:
    config = config_tree.override(load_config(location), changes)
    config_tree.check_types(config)
    return config


def split_changes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into other arguments and changes of fields.

    Returns:
        (arguments without --config.FIELD=VALUE and --config.FIELD VALUE, texts "FIELD=VALUE").
    """
    others, changes, left = [], [], list(arguments)
    while left:
        text = left.pop(0)
        if not text.startswith(PREFIX):
            others.append(text)
            continue
        change = text.removeprefix(PREFIX)
        if "=" not in change and left and not left[0].startswith("--"):
            change = f"{change}={left.pop(0)}"
        changes.append(change)
    return others, changes


def load_config(location: str) -> Any:
    """Returns `get_config(argument)` of the Python file in "file.py" or "file.py:argument".

        experiment = varjax.load_config("var:d16,data=folder:/data/imagenet")

    A name without ".py" is a config that comes with varjax, such as "digits" or "var:d16". Files in
    one folder can import each other by `from .other import …`.

    Raises:
        InputError: the file or the function does not exist.
        StorageError: the file cannot be read now.
    """
    name, _, argument = location.partition(":")
    path = pathlib.Path(name).expanduser()
    if path.suffix != ".py" and not path.exists():
        path = SHIPPED / f"{name}.py"
    if path.suffix != ".py" or not retry_read(path.is_file, path):
        names = sorted(path.stem for path in SHIPPED.glob("[a-z]*.py"))
        hint = did_you_mean(path.stem, names) or f"; use FILE.py or one of {', '.join(names)}"
        raise InputError(f"there is no config file {name!r}{hint}")
    folder = path.resolve().parent
    package = f"configs_{zlib.crc32(bytes(folder)):08x}"  # so that configs can import one another
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    loader = _RetryingLoader(f"{package}.{path.stem}", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up annotations that are strings
    loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"{name} defines no function get_config(arg)")
    if argument and not inspect.signature(module.get_config).parameters:
        raise InputError(f"{name} takes no argument, but {argument!r} was given after the colon")
    return module.get_config(argument) if argument else module.get_config()


class _RetryingLoader(importlib.machinery.SourceFileLoader):
    """Reads a file again if the machine or network failed, but executes it once."""

    def get_data(self, path: str) -> bytes:
        return retry_read(lambda: super(_RetryingLoader, self).get_data(path), path)


def describe(config: Any) -> str:
    """Lists every field of a dataclass tree: path, type, value and documentation."""
    entries = []
    for path, kind, value, text in _leaves(config, ""):
        shown = json.dumps(value) if isinstance(value, str) else _shown(value)
        entries.append(f"  {path}: {config_tree.type_name(kind)} = {shown}")
        entries += textwrap.wrap(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(entries)


def field_docs(cls: type) -> dict[str, str]:
    """Returns the documentation of each field that the docstring of `cls` describes."""
    names = {field.name for field in dataclasses.fields(cls)}
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        current: list[str] = []
        for line in inspect.cleandoc(owner.__dict__.get("__doc__") or "").splitlines():
            match = ENTRY.match(line)
            if match and names.issuperset(entry := match[1].split(", ")):
                current = entry
                docs |= dict.fromkeys(current, match[2])
            elif not line.strip() or line.endswith(":") and not line.startswith(" "):
                current = []
            else:
                docs |= {name: f"{docs[name]} {line.strip()}" for name in current}
    return docs


def _leaves(config: Any, path: str) -> Iterator[tuple[str, Any, Any, str]]:
    hints, docs = typing.get_type_hints(type(config)), field_docs(type(config))
    for field in dataclasses.fields(config):
        value, below = getattr(config, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{below}.")
        else:
            yield below, hints[field.name], value, docs.get(field.name, "")


def _shown(value: Any) -> str:
    """Formats a value as it is written on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(_shown, value)) or "()"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
