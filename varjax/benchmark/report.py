"""Measures this machine's devices in eight minutes, the most valuable figures first.

varjax benchmark report --out=report
varjax benchmark report --minutes=20

Runs the other benchmarks one after the other, each with a time limit: whether the device computes
what a CPU computes, sampling, training, single operations, evaluation, and PyTorch where it is
installed. After each one, all results so far are written to OUT/report.json and OUT/report.md. A
second run starts sooner, because compiled programs are cached. On a CPU, the batches are small, and
what would take too long is left out.
"""

import dataclasses
import datetime
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from varjax.benchmark.report_page import report_page
from varjax.config.numbers import finite_number
from varjax.data.workers import available_cpus
from varjax.errors import InputError
from varjax.runtime.commands import command_parser
from varjax.runtime.hardware import processor_name
from varjax.storage import files
from varjax.storage.buckets import as_path
from varjax.storage.cache_dir import cache_folder
from varjax.storage.folders import check_writable

PROBE = """
import json, jax, jaxlib
device = jax.devices()[0]
limit = (device.memory_stats() or {}).get("bytes_limit")
print(json.dumps({"platform": device.platform, "device": device.device_kind,
    "devices": jax.device_count(), "memory_gb": limit and limit / 1e9,
    "jax": jax.__version__, "jaxlib": jaxlib.__version__}))
"""


@dataclasses.dataclass(frozen=True)
class Part:
    """Names a benchmark of the report.

    Attributes:
        command: command line after `varjax benchmark` on an accelerator.
        seconds: time limit in seconds.
        cpu: command line on a CPU; "" to leave the part out.
    """

    command: str
    seconds: int
    cpu: str = ""


# The most valuable come first. The limits of the first five, on d16, add up to eight minutes, so
# they are measured even where each takes as long as it may.
PARTS = (
    Part("parity --preset=d16", 120, "parity --preset=d16 --batch_size=2"),
    Part(
        "sample --preset=d16 --batch_size=1", 60, "sample --preset=d16 --batch_size=1 --repeats=1"
    ),
    Part("sample --preset=d16 --batch_size=auto", 120),
    Part("train --preset=d16 --batch_size=24 --cached", 90),
    Part("train --preset=d16 --batch_size=24", 90, "train --preset=d16 --batch_size=1 --repeats=1"),
    Part("operations --preset=d16", 120, "operations --preset=d16 --batch_size=1 --repeats=1"),
    Part("sample --preset=d30 --batch_size=1", 90),
    Part("sample --preset=d30 --batch_size=auto", 120),
    Part("train --preset=mar_b --batch_size=32", 90),
    Part("sample --preset=mar_b --batch_size=32 --steps=16", 120),
    Part("parity --preset=mar_b", 120),
    Part("evaluate --images=2000", 90, "evaluate --images=500 --repeats=1"),
    Part(
        "operations --preset=d16 --torch",
        90,
        "operations --preset=d16 --torch --batch_size=1 --repeats=1",
    ),
)


def main(arguments: list[str]) -> int:
    """Reads the command line, measures, and prints the table; raises InputError."""
    parser = command_parser("varjax benchmark report", __doc__)
    parser.add_argument("--minutes", type=float, default=8, help="longest time of all parts (8)")
    parser.add_argument("--out", default="report", help="new folder for the results (report)")
    flags = parser.parse_args(arguments)
    minutes = finite_number("minutes", flags.minutes, 0.1)
    out = as_path(flags.out)
    if files.exists(out / "report.json"):
        raise InputError(f"{out} has a report already; give another folder: --out=DIR")
    check_writable(out)
    machine = describe_machine()
    torch = importlib.util.find_spec("torch") is not None
    parts = [part for part in PARTS if torch or "--torch" not in part.command]
    measured = measure_parts(parts, machine, 60 * minutes, out, run_part)
    print(report_page(machine, measured))
    print(f"the same as {out / 'report.md'}, all figures in {out / 'report.json'}", file=sys.stderr)
    return 1 if any(part["state"] == "failed" for part in measured) else 0


def describe_machine() -> dict[str, Any]:
    """Returns the devices, versions and processor of this machine, as JSON data.

    Another process asks JAX, because this one must not occupy the memory of a device.

    Raises:
        InputError: JAX finds no device, or cannot use the one that it finds.
    """
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"JAX cannot use a device here: {reason}")
    machine = json.loads(done.stdout.splitlines()[-1])
    machine |= {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "processor": processor_name(),
        "cores": available_cpus(),
    }
    if machine["platform"] == "gpu" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
        machine["driver"] = driver[0] if driver else ""
    return machine


def measure_parts(
    parts: Sequence[Part],
    machine: Mapping[str, Any],
    seconds: float,
    out: pathlib.Path,
    run: Callable[[list[str], float], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Measures one part after the other until the time is over, and writes the results of each.

    Args:
        parts: benchmarks, the most valuable first.
        machine: description of the machine; see `describe_machine`.
        seconds: longest time of all parts together.
        out: folder for report.json and report.md, which are replaced after each part.
        run: function that runs a part; see `run_part`.

    Returns:
        For each part its command, and what `run` returns.
    """
    begin, measured = time.monotonic(), []
    commands = [part.cpu if machine["platform"] == "cpu" else part.command for part in parts]
    chosen = [(part, command) for part, command in zip(parts, commands, strict=True) if command]
    with tqdm(chosen, unit="part", desc="measuring") as bar:
        for part, command in bar:
            bar.set_postfix_str(command)
            left = seconds - (time.monotonic() - begin)
            if left > 0:
                result = run(command.split(), min(part.seconds, left))
            else:
                result = {"state": "no time left", "lines": []}
            measured.append({"command": command} | result)
            files.write_json(out / "report.json", {"machine": machine, "parts": measured})
            with files.atomic_path(out / "report.md") as temporary:
                temporary.write_text(report_page(machine, measured))
    return measured


def run_part(arguments: list[str], seconds: float) -> dict[str, Any]:
    """Runs a benchmark in a process of its own, which frees the device's memory at its end.

    Args:
        arguments: command line after `varjax benchmark`.
        seconds: time limit in seconds.

    Returns:
        "state": "done", "failed", or "over its limit" of time; "lines": the JSON lines that it
        printed, of which there may be some in any case; "seconds"; and "error" if it failed.
    """
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache_folder() / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # PyTorch needs memory, too; other benchmarks want what an ordinary process gets.
        **({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if "--torch" in arguments else {}),
    }
    command = [sys.executable, "-m", "varjax", "benchmark", *arguments]
    begin, errors = time.monotonic(), ""
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=seconds, env=os.environ | environment
        )
        state, output, errors = "failed" * bool(done.returncode), done.stdout, done.stderr.decode()
    except subprocess.TimeoutExpired as stopped:
        state, output = "over its limit", stopped.stdout or b""
    lines = [json.loads(x) for x in output.decode().splitlines() if x.startswith("{") and "}" in x]
    result = {"state": state or "done", "lines": lines, "seconds": time.monotonic() - begin}
    return result | ({"error": errors.strip()[-2000:]} if state == "failed" else {})
