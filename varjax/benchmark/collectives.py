"""Counts what a compiled program's devices send one another, from its HLO text."""

import collections
import dataclasses
import math
import re

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "c64": 64, "c128": 128}
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z\-]+)\(([^)]*)\)(.*)")
# Bytes that each of g devices sends on a ring: (g - 1)/g × the larger of input and output, × this.
RINGS = {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "all-reduce": 2}


@dataclasses.dataclass
class Traffic:
    """Counts one kind of collective in one run of a program.

    Attributes:
        calls: how often it runs.
        bytes: sent by one device.
    """

    calls: int = 0
    bytes: float = 0.0


def count_traffic(hlo: str) -> dict[str, Traffic]:
    """Counts the collectives in HLO text, by kind; a loop counts as often as it runs.

    All-reduces of which each device keeps a slice only count as "reduce-scatter": TPUs and GPUs
    compile them to that.
    """
    computations, entry = _computations(hlo)
    found = collections.defaultdict(Traffic)

    def walk(name: str, times: int) -> None:
        for line in computations[name]:
            if not (match := INSTRUCTION.match(line)):
                continue
            result, shape, operation, _, rest = match.groups()
            if operation == "while":
                body, condition = (
                    re.findall(rf"{k}=%?([\w.\-]+)", rest)[0] for k in ("body", "condition")
                )
                walk(body, times * _trips(rest, computations[condition]))
            elif operation in ("call", "fusion", "conditional", "async-start"):
                called = re.findall(r"(?:calls|to_apply|branch_computations)=\{?([^,}]*)", rest)
                for inner in re.findall(r"%([\w.\-]+)", " ".join(called)):
                    walk(inner, times)
            elif (kind := operation.removesuffix("-start")) in RINGS:
                if kind == "all-reduce" and _is_sliced(result, computations[name]):
                    kind = "reduce-scatter"
                devices = group_size(rest)
                factor = RINGS[kind] * (devices - 1) / devices
                if operation == "reduce-scatter":  # its shape is a part's, unlike a start's
                    factor *= devices
                found[kind].calls += times
                found[kind].bytes += times * factor * _bytes(shape, largest="-start" in operation)
            elif kind == "collective-permute":
                found[kind].calls += times
                found[kind].bytes += times * _bytes(shape, largest="-start" in operation)

    walk(entry, 1)
    return dict(found)


def group_size(attributes: str) -> int:
    """Returns how many devices take part, from any of XLA's spellings of replica_groups."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    match = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", attributes
    )
    assert match, attributes
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
    # Part of an axis is written 'name':(before)size.
    parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
    return math.prod(int(part or sizes[name]) for name, part in parts)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Splits the text into each computation's lines; also returns the entry computation's name."""
    found, lines, entry = {}, [], ""
    for line in hlo.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
            lines = found.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    return found, entry


def _trips(attributes: str, condition: list[str]) -> int:
    """Reads how often a loop runs: as XLA found out, or what its counter is compared with."""
    if match := re.search(r"known_trip_count\W+n\W+(\d+)", attributes):
        return int(match[1])
    numbers = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    return max(map(int, numbers), default=1)


def _is_sliced(name: str, lines: list[str]) -> bool:
    users = [line for line in lines if re.search(rf"[(, ]%{re.escape(name)}[,)]", line)]
    return bool(users) and all(" dynamic-slice(" in line for line in users)


def _bytes(shape: str, largest: bool = False) -> float:
    """Adds the bytes of all arrays in a tuple, for an asynchronous start takes the largest."""
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * _bits(kind) / 8
        for kind, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    ]
    return max(sizes) if largest else sum(sizes)


def _bits(kind: str) -> int:
    return BITS.get(kind) or int(re.sub(r"\D", "", kind)[:2])
