"""Reads compiled programs as text (HLO): which instructions run, and how often."""

import dataclasses
import re
from collections.abc import Iterator

INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(([^)]*)\)(.*)")
CALLED = "calls|to_apply|branch_computations|true_computation|false_computation"
CALLERS = "call", "fusion", "conditional", "async-start"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Holds an instruction of a program.

    Attributes:
        name: name of the result, without %.
        shape: type and shape of the result, as written in the text.
        operation: name of the operation, such as "fusion".
        operands: text between the parentheses.
        attributes: text after the parentheses.
        computation: lines of the computation that contains the instruction.
        times: number of times it runs in one run of the program.
    """

    name: str
    shape: str
    operation: str
    operands: str
    attributes: str
    computation: list[str]
    times: int


def executed_instructions(hlo: str) -> Iterator[Instruction]:
    """Yields the instructions of a program, including those inside fusions and calls.

    An instruction in a loop counts once per iteration. All branches of a conditional count.

    hlo: text of the program.
    """
    computations, entry = _computations(hlo)

    def walk(name: str, times: int) -> Iterator[Instruction]:
        for line in computations[name]:
            if not (match := INSTRUCTION.match(line)):
                continue
            result, shape, operation, operands, attributes = match.groups()
            instruction = Instruction(
                result, shape, operation, operands, attributes, computations[name], times
            )
            yield instruction
            if operation == "while":
                body, condition = (
                    re.findall(rf"{k}=%?([\w.\-]+)", attributes)[0] for k in ("body", "condition")
                )
                trips = _trips(attributes, computations[condition])
                yield from walk(body, times * trips)
                yield from walk(condition, times * trips)
            elif operation in CALLERS:
                called = re.findall(rf"(?:{CALLED})=(\{{[^}}]*\}}|[^,\s]*)", attributes)
                for inner in re.findall(r"%([\w.\-]+)", " ".join(called)):
                    yield from walk(inner, times)

    yield from walk(entry, 1)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Splits the text into each computation's lines; also returns the entry computation's name."""
    computations, lines, entry = {}, [], ""
    for line in hlo.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
            lines = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _trips(attributes: str, condition: list[str]) -> int:
    """Reads how often a loop runs: XLA's trip count, or what its counter is compared with."""
    if match := re.search(r"known_trip_count\W+n\W+(\d+)", attributes):
        return int(match[1])
    numbers = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    return max(map(int, numbers), default=1)
