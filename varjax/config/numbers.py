"""Checks numbers from users against the ranges of JAX's int32, uint32 and float32.

JAX truncates larger numbers silently: seed 2**32 would draw the images of seed 0.

    steps = whole_number("steps", steps, 1)
    guidance = finite_number("guidance", guidance, 1, allowed="1 (off) or more")
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from varjax.errors import InputError, check_setting

T = TypeVar("T")
OneOrEach = T | tuple[T, ...]  # a number, or one for each scale or step

INT32_MAX = 2**31 - 1
UINT32_MAX = 2**32 - 1
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)  # smaller numbers may become 0


def whole_number(name: str, value: Any, low: int, high: int = INT32_MAX, allowed: str = "") -> int:
    """Converts a whole number of any type to a Python int.

    Args:
        name: name of the setting, for the message.
        value: an int, a NumPy or JAX integer, or a float like 3.0; not a bool.
        low: smallest value that is allowed.
        high: largest value that is allowed.
        allowed: description of the allowed values, for the message; "" to state the bounds.

    Raises:
        InputError: the value is anything else.
    """
    number = _converted(int, value)
    valid = number is not None and low <= number <= high and bool(number == value)
    if number is not None and number > high:
        allowed = f"at most {high}"
    check_setting(name, value, valid, allowed or f"{low} or more, a whole number up to {high}")
    return int(value)


def finite_number(
    name: str, value: Any, low: float, high: float = FLOAT32_MAX, allowed: str = ""
) -> float:
    """Converts a number of any type to a Python float.

    Arguments are those of `whole_number`. Raises InputError for anything else, such as NaN, and for
    numbers that float32 would round to infinity or 0.
    """
    number = _converted(float, value)
    valid = (
        number is not None
        and low <= number <= high  # False for NaN
        and (number == 0 or abs(number) >= FLOAT32_TINY)
    )
    check_setting(name, value, valid, allowed or f"a finite number, {low:g} or more")
    return float(value)


def number_or_list(
    name: str, value: Any, check: Callable[[str, Any], T], count: int | None
) -> OneOrEach[T]:
    """Checks a setting that is one number, or a list with a number for each scale or step.

    Args:
        name: name of the setting, for the message.
        value: a number, a list, an array, or a function of the scale's or step's index.
        check: (name, value) -> number, such as a partial `finite_number`.
        count: number of scales or steps; None if it is not known, and then not checked.

    Returns:
        A number, or a tuple of them.

    Raises:
        InputError: a number is not allowed, or a list has another length.
    """
    if callable(value):
        if count is None:
            raise InputError(f"{name}={value}: a function needs a model, which calls it")
        value = [value(index) for index in range(count)]
    if not isinstance(value, list | tuple) and np.ndim(value) == 0:
        return check(name, value)
    if count not in (None, len(value)) or not len(value):
        several = "" if count is None else f"{count}, "
        raise InputError(
            f"{name} has {len(value)} numbers: give one, or {several}one for each scale or step"
        )
    return tuple(check(f"{name}[{index}]", number) for index, number in enumerate(value))


def true_or_false(name: str, value: Any) -> bool:
    """Converts True or False to a Python bool; raises InputError for anything else."""
    valid = isinstance(value, bool | np.bool_) or (np.ndim(value) == 0 and value in (0, 1))
    check_setting(name, value, valid, "True or False")
    return bool(value)


def seed_number(name: str, value: Any) -> int:
    """Converts a seed to a Python int; raises InputError for one that JAX would truncate."""
    return whole_number(name, value, 0, UINT32_MAX)


def _converted(kind: type, value: Any) -> Any:
    """Converts a value to an int or float; returns None for strings, bools, arrays and failures."""
    if isinstance(value, str | bytes | bool | np.bool_) or np.ndim(value):
        return None
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        return None
