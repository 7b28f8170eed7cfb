"""Reads the pickle inside a PyTorch checkpoint by a machine that can only build data.

Python's unpickler calls whatever a file names. This one walks the opcodes itself: a name means what
`ALLOWED` says and nothing else, so a file can at most produce a wrong array, and no file can reach
outside its own storages.
"""

import pickletools
from collections.abc import Callable, Iterator
from reprlib import repr as short  # bounded: the full repr of a hostile object may never end
from types import FunctionType
from typing import Any

import numpy as np

from varjax.convert.pth.allowed import ALLOWED, REFUSED, Namespace, Storage, check_key
from varjax.core.errors import InputError

LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
FRESH = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
VALUES = frozenset(
    "BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES "
    "BINSTRING SHORT_BINSTRING".split()  # of Python 2
)


def unpickle(pickle: bytes, storage: Callable[[np.dtype, str, int], Storage]) -> Any:
    """Builds the object that a pickle describes, executing nothing.

    Args:
        pickle: its bytes.
        storage: (element type, key, number of elements) -> the storage of that key.

    Returns:
        Plain data, with tensors as read-only NumPy views of what `storage` returned. OrderedDict
        and argparse.Namespace become dict, torch.Size tuple, torch.device str and torch.dtype
        np.dtype.

    Raises:
        InputError: it asks for anything that is not on the allow-list, or is damaged.
    """
    try:
        return _run(_opcodes(pickle), storage)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        # A machine without checks at every pop runs into these when the opcodes make no sense.
        raise InputError(f"its pickle is damaged ({error!r}); download or save it again") from error


def pickle_size(data: bytes) -> int:
    """Counts the bytes of the pickle at the start of `data`; raises InputError if it is damaged."""
    return max(position for _, _, position in _opcodes(data)) + 1


def _opcodes(pickle: bytes) -> Iterator[tuple[str, Any, int]]:
    try:
        yield from ((opcode.name, arg, at or 0) for opcode, arg, at in pickletools.genops(pickle))
    except ValueError as error:
        raise InputError(f"its pickle is damaged ({error}); download or save it again") from error


def _run(
    opcodes: Iterator[tuple[str, Any, int]], storage: Callable[[np.dtype, str, int], Storage]
) -> Any:
    stack, marks, memo = [], [], {}

    def pop(count: int) -> list[Any]:
        if len(stack) < count:
            raise IndexError("nothing left on the stack")
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    def since_mark() -> list[Any]:
        return pop(len(stack) - marks.pop())

    for opcode, arg, _ in opcodes:
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                break
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(opcode[-1]))))
            case "APPEND":
                _add_items(stack[-2], pop(1))
            case "APPENDS" | "ADDITEMS":
                items = since_mark()
                _add_items(stack[-1], items)
            case "SETITEM":
                _set_items(stack[-3], pop(2))
            case "SETITEMS":
                items = since_mark()
                _set_items(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_allowed(arg.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack.append(_allowed(".".join(pop(2))))
            case "REDUCE":
                function, args = pop(2)
                if not isinstance(function, FunctionType):  # a type of number, or plain data
                    raise InputError(f"its pickle calls a {type(function).__name__}; {REFUSED}")
                stack.append(function(*args))
            case "NEWOBJ":
                stack.append(_new_object(*pop(2)))
            case "BUILD":
                (state,) = pop(1)
                _set_state(stack[-1], state)
            case "BINPERSID":
                (reference,) = pop(1)
                stack.append(_storage(reference, storage))
            case _ if opcode in VALUES:
                stack.append(arg)
            case _ if opcode in LITERALS:
                stack.append(LITERALS[opcode])
            case _ if opcode in FRESH:
                stack.append(FRESH[opcode]())
            case _:
                raise InputError(f"its pickle uses the opcode {opcode}; {REFUSED}")
    return stack.pop()


def _allowed(name: str) -> Any:
    if name not in ALLOWED:
        raise InputError(f"its pickle asks for {name[:200]!r}; {REFUSED}")
    return ALLOWED[name]


def _storage(reference: Any, storage: Callable[[np.dtype, str, int], Storage]) -> Storage:
    kind, dtype, key, _location, count, *part = reference
    if part not in ([], [None]):  # what PyTorch before 1.6 adds: which part of another storage
        raise InputError("its tensors share storages in an old way; re-save it in a recent PyTorch")
    if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
        raise InputError(f"its pickle refers to a storage of unknown kind {short(kind)}; {REFUSED}")
    if type(count) is not int or count < 0:
        raise InputError(f"storage {short(key)} has {short(count)} elements: the file is damaged")
    return storage(dtype, key, count)


def _add_items(target: Any, items: list[Any]) -> None:
    if isinstance(target, set):
        target.update(map(check_key, items))
    elif isinstance(target, list):
        target.extend(items)
    else:
        raise TypeError(f"items added to a {type(target).__name__}")


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise TypeError(f"items set in a {type(target).__name__}")
    target.update(zip(map(check_key, items[::2]), items[1::2], strict=True))


def _new_object(kind: Any, args: Any) -> Namespace:
    # Of all classes that a pickle may name, only this one is not made by a call.
    if kind is not Namespace or not isinstance(args, tuple) or args:
        raise InputError(
            f"its pickle makes an object that is no plain argparse.Namespace; {REFUSED}"
        )
    return Namespace()


def _set_state(target: Any, state: Any) -> None:
    """Fills a Namespace. Other state is left out, and refused if it would change anything.

    OrderedDict's is versions, dtype's a byte order.
    """
    if isinstance(target, Namespace):
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise InputError(
                f"its pickle sets the attributes of a Namespace to a {type(state).__name__} "
                f"instead of values by name; {REFUSED}"
            )
        target.update(state)
    elif isinstance(target, np.dtype):
        if state[1] not in ("<", "|"):
            raise InputError("it holds big-endian numbers; save it on a little-endian machine")
    elif not isinstance(target, dict):
        raise InputError(f"its pickle sets the state of a {type(target).__name__}; {REFUSED}")
