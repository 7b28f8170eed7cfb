"""Reads nodes of a TensorFlow graph (a GraphDef, which is a protocol buffer) without TensorFlow.

Only the few fields that constants need are read, and numbers stay in the file until they are used.
A library for protocol buffers would first make an object for every field, so a hostile file could
take 50 times its size in memory.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from varjax.errors import InputError
from varjax.storage.untrusted import check_shape, shown

MAX_FIELDS = 2**17  # five times as many as the graph of Inception-v3 has
VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5
FLOAT = 1  # TensorFlow's number for float32


@dataclasses.dataclass(frozen=True)
class GraphNode:
    """Holds a node of a graph.

    Attributes:
        name: name of the node.
        operation: name of the operation, such as "Const".
        attributes: encoded messages by name.
    """

    name: str
    operation: str
    attributes: dict[str, memoryview]


class TensorFlowGraph:
    """Reads a graph from a file.

        graph = TensorFlowGraph(path)
        constants = {n.name: graph.constant(n) for n in graph.nodes() if n.operation == "Const"}

    The methods raise InputError if the file is damaged.
    """

    def __init__(self, path: pathlib.Path):
        self._file = memoryview(b"")
        if path.stat().st_size:  # an empty file cannot be mapped
            self._file = np.memmap(path, np.uint8, "r").data
        self._fields_left = MAX_FIELDS

    def nodes(self) -> Iterator[GraphNode]:
        """Yields the nodes in the file's order."""
        for number, node in self._fields(self._file):
            if number == 1:
                yield self._node(node)

    def flag(self, node: GraphNode, attribute: str) -> bool:
        """Returns a boolean attribute; False if the node lacks it."""
        fields = dict(self._fields(node.attributes.get(attribute, b"")))
        return bool(fields.get(5))

    def constant(self, node: GraphNode) -> np.ndarray | None:
        """Returns the numbers of a constant as a view of the file; None if they are not float32.

        TensorFlow writes a single number if all are equal.
        """
        dtype, shape, content, numbers = 0, [], None, bytearray()
        for number, tensor in self._fields(node.attributes.get("value", b"")):
            for part, value in self._fields(tensor) if number == 8 else ():
                if part == 1:
                    dtype = value
                elif part == 2:
                    shape = self._shape(value)
                elif part == 4:
                    content = self._bytes(value)
                elif part == 5:
                    numbers += self._bytes(value)
        if dtype != FLOAT:
            return None
        shape = check_shape(shape, 4)
        if len(content or numbers) % 4:
            raise _damaged("a part of a number")
        flat = np.frombuffer(content or numbers, "<f4")
        if flat.size == 1 and not content:
            return np.broadcast_to(flat[0], shape)
        if flat.size != math.prod(shape):
            raise _damaged(f"{shown(node.name)} has {flat.size} numbers for {shown(shape)}")
        return flat.reshape(shape)

    def _node(self, message) -> GraphNode:
        texts, attributes = {1: "", 2: ""}, {}
        for number, value in self._fields(message):
            if number in texts:
                texts[number] = self._text(value)
            elif number == 5:
                entry = dict(self._fields(value))
                attributes[self._text(entry.get(1, b""))] = self._bytes(entry.get(2, b""))
        return GraphNode(texts[1], texts[2], attributes)

    def _shape(self, message) -> list[Any]:
        dimensions = (value for number, value in self._fields(message) if number == 2)
        return [dict(self._fields(dimension)).get(1, 0) for dimension in dimensions]

    def _fields(self, message) -> Iterator[tuple[int, int | memoryview]]:
        """Yields the number and value of each field: an integer, or bytes for all other types."""
        message, position = self._bytes(message), 0
        while position < len(message):
            self._fields_left -= 1
            if self._fields_left < 0:
                raise _damaged(f"more than {MAX_FIELDS} fields")
            key, position = self._varint(message, position)
            number, kind = key >> 3, key & 7
            value = 0
            if kind in (VARINT, BYTES):
                value, position = self._varint(message, position)
            size = {VARINT: 0, BYTES: value, FIXED_64: 8, FIXED_32: 4}.get(kind)
            if size is None or position + size > len(message):
                raise _damaged(f"field {number} at byte {position}")
            yield number, value if kind == VARINT else message[position : position + size]
            position += size

    def _varint(self, message: memoryview, position: int) -> tuple[int, int]:
        """Decodes a number with 7 bits per byte; returns it and the position after it."""
        number = 0
        for i, byte in enumerate(message[position : position + 10]):
            number |= (byte & 127) << 7 * i
            if byte < 128:
                return number, position + i + 1
        raise _damaged("a number without end")

    def _text(self, value) -> str:
        return bytes(self._bytes(value)).decode(errors="replace")

    def _bytes(self, value) -> memoryview:
        if isinstance(value, int):
            raise _damaged("a number where a message belongs")
        return memoryview(value)


def _damaged(problem: str) -> InputError:
    return InputError(f"this is not a TensorFlow graph, or it is cut short ({problem})")
