"""Reads the pickle inside a PyTorch checkpoint with an interpreter that can only build data.

Python's unpickler calls whatever a file names. This one interprets the opcodes itself and knows
only the names in `ALLOWED`, so a file can at worst produce a wrong array, and cannot reach outside
its storages. It cannot take more than seconds or about 200 MB either, because the number of
operations, the data that they copy and the sizes of their tensors are limited.
"""

import pickletools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import numpy as np

from varjax.convert.pth.allowed import ALLOWED, REFUSED, Namespace, Storage, check_key
from varjax.errors import InputError
from varjax.storage.untrusted import MAX_BYTES, plausible_bytes, reason, shown

LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONTAINERS = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
VALUES = frozenset(
    "BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES "
    "BINSTRING SHORT_BINSTRING".split()  # from Python 2
)
MAX_OPCODES = 2**19  # about 45 per tensor; a full trainer checkpoint of MAR-H has 3000 tensors
MAX_COPIED_BYTES, ELEMENT_BYTES = 2**22, 16  # copied by calls, on top of twice the pickle's size


def unpickle(
    pickle: bytes, storage: Callable[[np.dtype, str, int], Storage], file_bytes: int = 0
) -> Any:
    """Builds the object that a pickle describes, without executing any code.

    Args:
        pickle: bytes of the pickle.
        storage: (element type, key, number of elements) -> the storage of that key.
        file_bytes: size of the file; the total size of all tensors must be in proportion to it.

    Returns:
        Plain data, with tensors as read-only NumPy views of what `storage` returned. OrderedDict
        and argparse.Namespace become dict, torch.Size tuple, torch.device and Lightning's class
        ModelCheckpoint str, and torch.dtype np.dtype.

    Raises:
        InputError: the pickle is damaged, asks for a name that is not allowed, or for more data
            than is plausible.
    """
    try:
        return _run(pickle, storage, file_bytes)
    except InputError:
        raise
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
        # Operands are not checked one by one, so meaningless opcodes raise these errors.
        problem = f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"its pickle is damaged ({problem}); download or save it again") from error


def pickle_size(data: bytes) -> int:
    """Counts the bytes of the pickle at the start of `data`; raises InputError if it is damaged."""
    return max(position for _, _, position in _opcodes(data)) + 1


def _opcodes(pickle: bytes) -> Iterator[tuple[str, Any, int]]:
    try:
        for i, (opcode, arg, position) in enumerate(pickletools.genops(pickle)):
            if i == MAX_OPCODES:
                raise InputError(f"its pickle has more than {i} operations; is it a checkpoint?")
            yield opcode.name, arg, position or 0
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"its pickle is damaged ({reason(error)}); download or save it again"
        ) from error


def _run(pickle: bytes, storage: Callable[[np.dtype, str, int], Storage], file_bytes: int) -> Any:
    stack, marks, memo = [], [], {}
    copied_bytes, max_copied_bytes = 0, MAX_COPIED_BYTES + 2 * len(pickle)
    tensor_bytes = 0

    def pop(count: int) -> list[Any]:
        if len(stack) < count:
            raise IndexError("nothing left on the stack")
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    def since_mark() -> list[Any]:
        return pop(len(stack) - marks.pop())

    def count_copies(values) -> None:
        # A few bytes could copy the same long list a thousand times.
        nonlocal copied_bytes
        for x in values:
            if isinstance(x, str | bytes):
                copied_bytes += len(x)
            elif isinstance(x, list | tuple | dict | set):
                copied_bytes += ELEMENT_BYTES * len(x)
        if copied_bytes > max_copied_bytes:
            raise InputError(f"its pickle copies the same data too often; {REFUSED}")

    def count_bytes(tensor: np.ndarray) -> None:
        nonlocal tensor_bytes
        tensor_bytes += tensor.nbytes
        if tensor_bytes > plausible_bytes(file_bytes):
            raise InputError(
                f"its tensors have {tensor_bytes} bytes or more, which is more than is plausible "
                f"in a file of {file_bytes}; save tensor.contiguous() if they are expanded"
            )

    for opcode, arg, _ in _opcodes(pickle):
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
                stack.append(_allowed(".".join(map(_short_name, pop(2)))))
            case "REDUCE":
                function, args = pop(2)
                if not isinstance(function, FunctionType):  # a dtype, or plain data
                    raise InputError(f"its pickle calls a {type(function).__name__}; {REFUSED}")
                if not isinstance(args, tuple):
                    raise TypeError(f"a call with a {type(args).__name__} of arguments")
                count_copies(args)
                result = function(*args)
                # A Parameter is the tensor that it was made from, which is already counted.
                if isinstance(result, np.ndarray) and result is not args[0]:
                    count_bytes(result)
                stack.append(result)
            case "NEWOBJ":
                stack.append(_new_object(*pop(2)))
            case "BUILD":
                (state,) = pop(1)
                count_copies([state])
                _set_state(stack[-1], state)
            case "BINPERSID":
                (reference,) = pop(1)
                stack.append(_storage(reference, storage))
            case _ if opcode in VALUES:
                stack.append(arg)
            case _ if opcode in LITERALS:
                stack.append(LITERALS[opcode])
            case _ if opcode in CONTAINERS:
                stack.append(CONTAINERS[opcode]())
            case _:
                raise InputError(f"its pickle uses the opcode {opcode}; {REFUSED}")
    return stack.pop()


def _short_name(name: Any) -> str:
    if not isinstance(name, str) or len(name) > 200:
        raise InputError(f"its pickle asks for {shown(name)}; {REFUSED}")
    return name


def _allowed(name: str) -> Any:
    if name not in ALLOWED:
        raise InputError(f"its pickle asks for {shown(name)}; {REFUSED}")
    return ALLOWED[name]


def _storage(reference: Any, storage: Callable[[np.dtype, str, int], Storage]) -> Storage:
    if not isinstance(reference, tuple):
        raise TypeError(f"a storage called by a {type(reference).__name__}")
    kind, dtype, key, _location, count, *part = reference
    if len(part) > 1 or part and part[0] is not None:
        # PyTorch before 1.6 adds which part of another storage this is.
        raise InputError("its tensors share storages in an old way; re-save it in a recent PyTorch")
    if not isinstance(kind, str) or kind != "storage":
        raise InputError(f"its pickle refers to a storage of unknown kind {shown(kind)}; {REFUSED}")
    if not isinstance(dtype, np.dtype) or not isinstance(key, str):
        raise InputError(
            f"its pickle refers to a storage {shown(key)} of {shown(dtype)}; {REFUSED}"
        )
    if type(count) is not int or not 0 <= count < MAX_BYTES:
        raise InputError(f"storage {shown(key)} has {shown(count)} elements: the file is damaged")
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
    # Every other class that a pickle may name is made by a call.
    if kind is not Namespace or not isinstance(args, tuple) or args:
        raise InputError(
            f"its pickle makes an object other than a plain argparse.Namespace; {REFUSED}"
        )
    return Namespace()


def _set_state(target: Any, state: Any) -> None:
    """Fills a Namespace. The state of other objects is ignored, or refused if it matters.

    The state of an OrderedDict holds versions, and that of a dtype holds the byte order.
    """
    if isinstance(target, Namespace):
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise InputError(
                f"its pickle sets the attributes of a Namespace to a {type(state).__name__} "
                f"instead of values by name; {REFUSED}"
            )
        target.update(state)
    elif isinstance(target, np.dtype):
        if not isinstance(state, tuple) or not isinstance(state[1], str):
            raise TypeError(f"a state of a dtype that is a {type(state).__name__}")
        if state[1] not in ("<", "|"):
            raise InputError("it holds big-endian numbers; save it on a little-endian machine")
    elif not isinstance(target, dict):
        raise InputError(f"its pickle sets the state of a {type(target).__name__}; {REFUSED}")
