"""Tells users of former names of config fields what to write instead.

guidance: float = field(default=2.5, metadata={"renamed": Renamed("cfg", plus=1)})
"""

import dataclasses
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Renamed:
    """Describes the former name of a dataclass field.

    Attributes:
        name: former name of the field.
        plus: number to add to a value given by the former name.
        reason: end of the message for users of the former name.
    """

    name: str
    plus: float = 0.0
    reason: str = ""


def renamed_message(cls: type, name: str, value: Any) -> str | None:
    """Returns what to write instead of a former name and its value; None for any other name.

    Args:
        cls: dataclass with the fields.
        name: name of a field, or a path that ends in it.
        value: value of the field, or the text of one or more, separated by commas.
    """
    *path, last = name.split(".")
    for new, renamed in _renamed_fields(cls).items():
        if renamed.name == last:
            texts = str(value).split(",")
            values = ",".join(str(_new_value(renamed, _number(text))) for text in texts)
            return f"{name}={value}: write {'.'.join([*path, new])}={values}{renamed.reason}"
    return None


def former_names(classes: Iterable[type]) -> list[str]:
    """Returns all former names of the fields of some dataclasses, sorted."""
    return sorted({r.name for cls in classes for r in _renamed_fields(cls).values()})


def _renamed_fields(cls: type) -> dict[str, Renamed]:
    fields = {field.name: field.metadata.get("renamed") for field in dataclasses.fields(cls)}
    return {name: renamed for name, renamed in fields.items() if renamed}


def _new_value(renamed: Renamed, value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value + renamed.plus if is_number and renamed.plus else value


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
