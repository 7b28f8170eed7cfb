"""Writes the results of `varjax benchmark report` as Markdown, next to the expected values."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from varjax.runtime.hardware import published_peak_flops

# Images/s by the seconds that docs/benchmarks.md and docs/training.md derive: by arithmetic for an
# H100, by the compiler's estimate for a TPU v5e. (pattern of the device, command, part of it)
H100, V5E = r"H[12]00", r"TPU v5( lite|e)"
EXPECTED = (
    (H100, "sample --preset=d16 --batch_size=auto", "whole", 64 / 0.209),
    (H100, "train --preset=d16 --batch_size=24", "step", 1 / 4.9e-3),
    # Of 350 H100-hours, cached latents leave 160.
    (H100, "train --preset=d16 --batch_size=24 --cached", "step", 1 / (4.9e-3 * 160 / 350)),
    (V5E, "sample --preset=d16 --batch_size=1", "whole", 1 / 0.036),
    (V5E, "sample --preset=d16 --batch_size=auto", "whole", 16 / 0.229),
    (V5E, "sample --preset=d30 --batch_size=1", "whole", 1 / 0.108),
    (V5E, "train --preset=d16 --batch_size=24 --cached", "step", 24 / 0.491),
    # The encoder takes another 45 ms for every 8 images.
    (V5E, "train --preset=d16 --batch_size=24", "step", 24 / (0.491 + 3 * 0.045)),
)
COLUMNS = (
    *("part", "ms", "PyTorch ms", "images/s", "expected", "TFLOP/s"),
    *("of a product", "of the peak", "GB", "GB by auto", "compile s", "notes"),
)
NOTES = (
    *("implementation", "equal_tokens", "relative_error", "precision"),
    *("repeated_equal", "repeated_difference_255", "alone_equal", "alone_difference_255"),
    *("library", "torch_device", "error"),
)
# What two lines must agree on to be of the same operation.
OPERATION = "benchmark", "preset", "batch_size", "dtype", "part"


def report_page(machine: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown page: the machine, and a table for each part.

    Args:
        machine: description of the machine, by name.
        measured: results of the parts; see `measure_parts`.
    """
    known = ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    sections = [
        "# What this machine measured",
        f"{known}.",
        "**of a product**: share of the speed of a large matrix product, measured in the same run. "
        "**of the peak**: share of the published speed of the devices. **expected**: images/s of "
        "one device, by arithmetic or by the compiler's estimate. **GB**: peak memory of a device, "
        "left out where an earlier part used more. **GB by auto**: what batch_size=auto "
        "calculates. **compile s**: seconds to compile a program, or to load it from the cache of "
        "an earlier report.",
    ]
    lines = [line for part in measured for line in part["lines"]]
    torch = {_operation_key(line): line for line in lines if "library" in line}
    ours = {_operation_key(line) for line in lines if "library" not in line}
    for part in measured:
        sections.append(f"## varjax benchmark {part['command']}")
        if part["state"] != "done":
            sections.append(f"{part['state']}. {part.get('error', '')[-300:]}".strip())
        rows, libraries = [], set()
        for line in part["lines"]:
            row, key = _row(line, part["command"]), _operation_key(line)
            if "library" not in line and key in torch:
                row["PyTorch ms"] = f"{torch[key]['milliseconds']:.3g}"
                libraries.add(f"{torch[key]['library']} on {torch[key]['torch_device']}")
            if "library" not in line or key not in ours:  # otherwise it is in our row
                rows.append(row)
        if rows:
            sections.append(markdown_table(COLUMNS, rows))
        sections += [f"PyTorch ms: {library}." for library in sorted(libraries)]
    return "\n\n".join(sections) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """Returns rows, which are cells by column, as a table without its empty columns."""
    used = [c for c in columns if any(row.get(c) for row in rows)]
    table = [used, ["---"] * len(used), *([row.get(c, "") for c in used] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def expected_speed(device: str, command: str, part: str) -> float | None:
    """Returns the images/s that are expected of a part on a device; None where nothing is known."""
    for kind, expected_command, expected_part, speed in EXPECTED:
        if re.search(kind, device) and (command, part) == (expected_command, expected_part):
            return speed
    return None


def _operation_key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(name) for name in OPERATION)


def _row(line: Mapping[str, Any], command: str) -> dict[str, str]:
    speed, gflop = line.get("images_per_second"), line.get("model_gflop_per_image")
    tflops = line.get("tflops") or (speed * gflop / 1e3 if speed and gflop else None)
    peak = published_peak_flops(line["device"]) if line.get("dtype") == "bfloat16" else None
    devices = line.get("devices", 1)  # that shared the work; most benchmarks use one
    seconds, efficiency = line.get("seconds"), line.get("efficiency")
    numbers = {
        "ms": 1e3 * seconds if seconds else line.get("milliseconds"),
        "images/s": speed,
        "expected": expected_speed(line["device"], command, line["part"]),
        "TFLOP/s": tflops,
        "of a product": efficiency,
        "of the peak": tflops * 1e12 / peak / devices if tflops and peak else None,
        "GB": line.get("peak_memory_gb"),
        "GB by auto": line.get("needed_gb"),
        "compile s": line.get("compile_seconds"),
    }
    row = {name: f"{value:.3g}" for name, value in numbers.items() if value is not None}
    notes = [f"{name} {line[name]}" for name in NOTES if name in line]
    return {"part": line["part"], **row, "notes": "; ".join(notes).replace("|", "/")}
