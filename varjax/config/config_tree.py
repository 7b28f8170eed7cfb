"""Converts configs, trees of frozen dataclasses, to JSON and back, and checks and changes fields.

No library does this: tyro 1.0 and draccus 0.11 cannot read a tree with fields that are annotated by
a Protocol (`task: Task`), which keep training independent of models. tyro also requires spaces in
tuples, where users write --config.task.model.scales=1,2,3.
"""

import ast
import dataclasses
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, Union

from varjax.config.numbers import FLOAT32_MAX, INT32_MAX, UINT32_MAX
from varjax.config.renamed import renamed_message
from varjax.errors import InputError, did_you_mean
from varjax.storage.untrusted import shown

T = TypeVar("T")
WORDS = {"true": True, "false": False, "none": None, "null": None}


class _OutOfBounds(InputError):
    """Reports a number of the right type that JAX would truncate."""


def to_dict(config: Any) -> dict[str, Any]:
    """Returns plain JSON data; a field annotated by a Protocol or a union also stores "_type"."""
    hints = typing.get_type_hints(type(config))
    return {
        field.name: _plain(hints[field.name], getattr(config, field.name))
        for field in dataclasses.fields(config)
    }


def changed_fields(config: Any) -> dict[str, Any]:
    """Returns the fields that differ from their defaults as JSON data, in the whole tree.

    With its type, this identifies a config, and fields that are added later change nothing.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [*map(plain, value)]
        return changed_fields(value) if dataclasses.is_dataclass(value) else value

    changed = {name: plain(x) for name, x in values.items() if x != defaults[name]}
    return {"_type": type(config).__name__} | changed


def from_dict(cls: type[T], data: dict[str, Any]) -> T:
    """Builds a `cls` from the data of `to_dict`; absent fields keep their defaults.

    A field annotated by a Protocol cannot be rebuilt, because its class is unknown; build that part
    separately.

    Raises:
        InputError: a field is unknown, a value has a wrong type, or the data belong to another
            class.
    """
    return _build(cls, data, cls.__name__)


def override(config: T, assignments: Iterable[str]) -> T:
    """Returns a copy with every "a.b=value" applied; annotations say how to parse a value.

    All are applied together, so that fields that depend on each other can change at once. A field
    whose metadata have a function "parse" gets `parse(text, config)`.

    Raises:
        InputError: a field is unknown, or a value has a wrong type.
    """
    changes = []
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"{assignment!r} has no value; write {assignment}=value")
        changes.append((path.split("."), text, path))
    return _override(config, changes)


def check_types(config: Any, path: str = "") -> None:
    """Checks every value in a tree of dataclasses against its annotation, as `from_dict` does.

    Python itself accepts order="Random", and a list in place of a tuple.

    Args:
        config: the tree, of which fields that are annotated by a Protocol are a part.
        path: name of the tree in messages; "" for none.

    Raises:
        InputError: a value does not fit; names its field.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        kind, value = hints[field.name], getattr(config, field.name)
        below = f"{path}.{field.name}" if path else field.name
        if _build(kind, value, below) != value:  # a list, which from_dict makes a tuple
            raise InputError(f"{below} must be {_spell(kind)}, not {shown(value)}")


def type_name(kind: Any) -> str:
    """Formats an annotation as in source code, without module names: "int | None"."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " | ".join(map(type_name, inner))
    if typing.get_origin(kind) is Literal:
        return " | ".join(map(repr, inner))
    if kind is types.NoneType:
        return "none"
    if inner:
        parts = ("..." if part is ... else type_name(part) for part in inner)
        return f"{typing.get_origin(kind).__name__}[{', '.join(parts)}]"
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _plain(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        label = {} if dataclasses.is_dataclass(kind) else {"_type": type(value).__name__}
        return label | to_dict(value)
    if isinstance(value, tuple):
        tuples = (k for k in (kind, *typing.get_args(kind)) if typing.get_origin(k) is tuple)
        inner = typing.get_args(next(tuples, None))
        variadic = len(inner) == 2 and inner[1] is ...
        kinds = inner if inner and not variadic else (inner[0] if inner else Any,) * len(value)
        return [_plain(k, v) for k, v in zip(kinds, value, strict=True)]
    assert value is None or isinstance(value, bool | int | float | str), (kind, value)
    return value


def _build(kind: Any, data: Any, path: str) -> Any:
    """Converts `data` to a value of the annotation `kind`; raises InputError if it does not fit.

    Dataclasses are checked, and stay as they are.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    is_protocol = getattr(kind, "_is_protocol", False)
    if dataclasses.is_dataclass(type(data)) and (is_protocol or type(data) is kind):
        check_types(data, path)
        return data
    if dataclasses.is_dataclass(kind) and isinstance(data, dict):
        return _build_dataclass(typing.cast(type, kind), data, path)
    if origin in (Union, types.UnionType):
        label = data.get("_type") if isinstance(data, dict) else type(data).__name__
        if label:  # the class is known, so its own error is the clearest
            inner = tuple(o for o in inner if getattr(o, "__name__", "") == label) or inner
        if len(inner) == 1:
            return _build(inner[0], data, path)
        for option in inner:
            try:
                return _build(option, data, path)
            except ValueError:
                continue
    elif origin is Literal and any(data == v and type(data) is type(v) for v in inner):
        return data
    elif origin is tuple and isinstance(data, list | tuple):
        kinds = inner[:1] * len(data) if inner[1:] == (...,) else inner
        if len(kinds) == len(data):
            return tuple(
                _build(k, v, f"{path}[{i}]")
                for i, (k, v) in enumerate(zip(kinds, data, strict=True))
            )
    elif kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        if not abs(data) <= FLOAT32_MAX:  # True for NaN
            raise _OutOfBounds(
                f"{path} must be a finite number, at most {FLOAT32_MAX:g}, not {shown(data)}"
            )
        return float(data)
    elif kind is int and type(data) is int:
        if not -INT32_MAX <= data <= UINT32_MAX:
            raise _OutOfBounds(
                f"{path} must be a number {-INT32_MAX} … {UINT32_MAX}, not {shown(data)}"
            )
        return data
    elif kind in (str, bool, type(None)) and type(data) is kind or kind is Any:
        return data
    if is_protocol:
        raise InputError(f"{path} is annotated by a Protocol; build it as its own class")
    raise InputError(f"{path} must be {_spell(kind)}, not {shown(data)}")


def _build_dataclass(cls: type, data: dict[str, Any], path: str) -> Any:
    if data.get("_type", cls.__name__) != cls.__name__:
        label = shown(data["_type"]).strip("'")
        raise InputError(f"{path} holds a {label}, not a {cls.__name__}")
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    values = {name: value for name, value in data.items() if name != "_type"}
    if unknown := sorted(values.keys() - known):
        raise InputError(f"{path} has no field {shown(unknown)}; its fields are {sorted(known)}")
    built = {name: _build(hints[name], value, f"{path}.{name}") for name, value in values.items()}
    try:
        return cls(**built)
    except TypeError as error:
        raise InputError(f"{path} is incomplete: {error}") from error


def _override(config: Any, changes: list[tuple[list[str], str, str]]) -> Any:
    """Applies changes, each (names, text, whole path); the last one for a field counts."""
    values: dict[str, Any] = {}
    below: dict[str, list[tuple[list[str], str, str]]] = {}
    for (name, *rest), text, path in changes:
        owner = type(config).__name__
        if config is None:
            off = path.removesuffix("." + ".".join([name, *rest]))
            raise InputError(f"{path}: {off} is none in this config, so {name!r} cannot be set")
        if not dataclasses.is_dataclass(config):
            raise InputError(f"{path}: a {owner} has no field {name!r}")
        fields = {field.name: field for field in dataclasses.fields(config)}
        known = list(fields)
        if name not in known:
            if not rest and (message := renamed_message(type(config), path, text)):
                raise InputError(message)
            help = did_you_mean(name, known) or f"; its fields are {known}"
            raise InputError(f"{path}: {owner} has no field {name!r}{help}")
        if rest:
            below.setdefault(name, []).append((rest, text, path))
        else:
            parse = fields[name].metadata.get("parse")
            hint = typing.get_type_hints(type(config))[name]
            values[name] = parse(text, config) if parse else _parse(hint, text, path)
    for name, inner in below.items():
        values[name] = _override(values.get(name, getattr(config, name)), inner)
    return dataclasses.replace(typing.cast(Any, config), **values)


def _parse(kind: Any, text: str, path: str) -> Any:
    try:
        literal = WORDS[text.lower()] if text.lower() in WORDS else ast.literal_eval(text)
        return _build(kind, literal, path)
    except _OutOfBounds:
        raise
    except (ValueError, SyntaxError, TypeError):
        return _build(kind, text, path)


def _spell(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        fields = [field.name for field in dataclasses.fields(kind)]
        return f"a group of settings ({', '.join(fields)}), each set by its name"
    if typing.get_origin(kind) is Literal:
        return f"one of {list(typing.get_args(kind))}"
    return type_name(kind)
