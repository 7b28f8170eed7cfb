"""Counts the communication between devices in a compiled program, from its HLO text."""

import collections
import dataclasses
import math
import re

from varjax.benchmark.hlo_text import executed_instructions

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "c64": 64, "c128": 128}
# On a ring of g devices, each sends (g - 1)/g × the larger of input and output, × this factor.
RINGS = {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "all-reduce": 2}


@dataclasses.dataclass
class Traffic:
    """Counts one kind of collective in one run of a program.

    Attributes:
        calls: number of times the collective runs.
        bytes: number of bytes sent by one device.
    """

    calls: int = 0
    bytes: float = 0.0


def count_traffic(hlo: str) -> dict[str, Traffic]:
    """Counts the collectives in HLO text, by kind; a loop counts as often as it runs.

    An all-reduce of which each device keeps only a slice counts as "reduce-scatter", because TPUs
    and GPUs compile it to one.
    """
    traffic = collections.defaultdict(Traffic)
    for instruction in executed_instructions(hlo):
        operation = instruction.operation
        kind, started = operation.removesuffix("-start"), "-start" in operation
        if kind in RINGS:
            if kind == "all-reduce" and _is_sliced(instruction.name, instruction.computation):
                kind = "reduce-scatter"
            devices = group_size(instruction.attributes)
            factor = RINGS[kind] * (devices - 1) / devices
            # The shape is that of one part, but "reduce-scatter-start" has the whole input's.
            if operation == "reduce-scatter":
                factor *= devices
        elif kind == "collective-permute":
            factor = 1
        else:
            continue
        size = _bytes(instruction.shape, largest=started)
        traffic[kind].calls += instruction.times
        traffic[kind].bytes += instruction.times * factor * size
    return dict(traffic)


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


def _is_sliced(name: str, lines: list[str]) -> bool:
    users = [line for line in lines if re.search(rf"[(, ]%{re.escape(name)}[,)]", line)]
    return bool(users) and all(" dynamic-slice(" in line for line in users)


def _bytes(shape: str, largest: bool = False) -> float:
    """Adds up the bytes of all arrays in a tuple, or takes the largest (an asynchronous start)."""
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * _bits(kind) / 8
        for kind, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    ]
    return max(sizes) if largest else sum(sizes)


def _bits(kind: str) -> int:
    return BITS.get(kind) or int(re.sub(r"\D", "", kind)[:2])
