"""Measures documented figures again, and prints them next to those of docs/benchmarks.md.

varjax benchmark table
varjax benchmark table --minutes=15

Runs the commands of that page that this machine can run and whose time limit is at most --minutes.
Prints a JSON line for each figure, and a table at the end. "ratio" is the speed compared with the
documented one, each relative to a large matrix product of the same run, or simply the speed by the
TPU compiler's estimates; below 1 is slower.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from varjax.benchmark.report import describe_machine, run_part
from varjax.benchmark.report_page import markdown_table
from varjax.config.numbers import finite_number
from varjax.errors import InputError
from varjax.runtime.commands import command_parser


@dataclasses.dataclass(frozen=True)
class Row:
    """Describes a figure of docs/benchmarks.md.

    Attributes:
        command: command line after `varjax benchmark`, as on the page.
        part: part of that benchmark.
        figure: name of the figure: "efficiency", "seconds", or "ms" of the TPU's compiler.
        documented: value on the page.
        processor: what it was measured on.
        limit: time limit of the command in seconds.
        jax: version of JAX.
        matmul_gflops: GFLOP/s of the matrix product in that run, for "seconds".
    """

    command: str
    part: str
    figure: Literal["efficiency", "seconds", "ms"]
    documented: float
    processor: str
    limit: int
    jax: str = "0.10.2"
    matmul_gflops: float | None = None


EPYC, V5E = "AMD EPYC, 2 cores", "TPU v5e, by its compiler"
EVALUATE = "evaluate --images=10000"
GFLOPS = (176 + 195) / 2  # on the page as a range, of the machine that ran EVALUATE
SAMPLE = "sample --preset=d16 --batch_size=8 --dtype=float32 --repeats=1"
SAMPLE_MAR = "sample --preset=mar_b --dtype=float32 --batch_size=8 --steps=8 --repeats=1"
TRAIN = "train --preset=d16 --batch_size=2 --dtype=float32"
TRAIN_MAR = "train --preset=mar_b --dtype=float32 --repeats=1 --remat=none"
ROWS = (
    Row(EVALUATE, "features", "efficiency", 0.72, EPYC, 120),
    Row(EVALUATE, "features", "efficiency", 0.89, EPYC, 120, jax="0.12.0.1"),
    Row(EVALUATE, "fid", "seconds", 7.2, EPYC, 120, matmul_gflops=GFLOPS),
    Row(EVALUATE, "inception_score", "seconds", 0.6, EPYC, 120, matmul_gflops=GFLOPS),
    Row(EVALUATE, "precision_recall", "seconds", 26, EPYC, 120, matmul_gflops=GFLOPS),
    Row(EVALUATE, "kid", "seconds", 16, EPYC, 120, matmul_gflops=GFLOPS),
    Row(TRAIN, "gradient", "efficiency", 0.71, EPYC, 600),
    Row(SAMPLE, "whole", "efficiency", 0.92, EPYC, 600),
    Row(SAMPLE, "transformer", "efficiency", 0.84, EPYC, 600),
    Row(SAMPLE, "decoder", "efficiency", 0.76, EPYC, 600),
    Row(TRAIN_MAR, "tokenize", "efficiency", 0.80, "2 CPU cores", 900),
    Row(TRAIN_MAR, "gradient", "efficiency", 0.60, "2 CPU cores", 900),
    Row(SAMPLE_MAR, "transformer", "efficiency", 0.77, "2 CPU cores", 3600),
    Row(SAMPLE_MAR, "decoder", "efficiency", 0.71, "2 CPU cores", 3600),
    Row("tpu --preset=d16 --what=encode --batch_size=8", "total", "ms", 45, V5E, 600),
    Row("tpu --preset=d16 --what=train --batch_size=8 --cached", "total", "ms", 174, V5E, 600),
    Row("tpu --preset=mar_b --what=train --batch_size=8 --cached", "total", "ms", 102, V5E, 600),
    Row("tpu --preset=d16 --batch_size=16 --parts", "total", "ms", 229, V5E, 900),
)
COLUMNS = "command", "part", "figure", "documented", "measured", "ratio", "measured before with"


def main(arguments: list[str]) -> int:
    """Reads the command line, measures, and prints lines and table; raises InputError."""
    parser = command_parser("varjax benchmark table", __doc__)
    about = "time limit of the longest command to run, in minutes (2)"
    parser.add_argument("--minutes", type=float, default=2, help=about)
    flags = parser.parse_args(arguments)
    minutes = finite_number("minutes", flags.minutes, 0.1)
    platform = describe_machine()["platform"]
    compiler = importlib.util.find_spec("libtpu") is not None
    rows = [
        row
        for row in ROWS
        if row.limit <= 60 * minutes
        and (compiler if row.command.startswith("tpu ") else platform == "cpu")
    ]
    if not rows:
        raise InputError(
            f"minutes={minutes:g}: no documented command runs on this machine in this time. Give "
            "more minutes, and JAX_PLATFORMS=cpu for those of a CPU; `tpu` needs `pip install "
            "libtpu`"
        )
    lines = []
    for line in measured_rows(rows, run_part):
        print(json.dumps(line), flush=True)
        lines.append(line)
    print(markdown_table(COLUMNS, [_cells(line) for line in lines]))
    return 1 if any("ratio" not in line for line in lines) else 0


def measured_rows(
    rows: Sequence[Row], run: Callable[[list[str], float], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Measures rows, each command once.

    Args:
        rows: rows to measure.
        run: function that runs a command; see `run_part`.

    Yields:
        For each row its fields, and "measured" and "ratio"; "state" and "error" instead where the
        command did not print the figure.
    """
    for command in dict.fromkeys(row.command for row in rows):
        wanted = [row for row in rows if row.command == command]
        result = run(command.split(), max(row.limit for row in wanted))
        for row in wanted:
            line = {"benchmark": "table"} | dataclasses.asdict(row)
            found = [x for x in result["lines"] if x.get("part") == row.part and row.figure in x]
            if found:
                yield line | _comparison(row, found[0], result["lines"])
            else:
                yield line | {"state": result["state"], "error": result.get("error", "")}


def _comparison(row: Row, line: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Compares a line that was printed now with a row."""
    measured = line[row.figure]
    ratio = measured / row.documented if row.figure == "efficiency" else row.documented / measured
    if row.figure == "seconds":  # a machine of twice the speed should need half of them
        assert row.matmul_gflops is not None, row
        ratio *= row.matmul_gflops / next(x["matmul_gflops"] for x in lines if "matmul_gflops" in x)
    now = {f"{name}_now": line[name] for name in ("jax", "processor")}
    return {"measured": measured, "ratio": float(f"{ratio:.3g}")} | now


def _cells(line: dict[str, Any]) -> dict[str, str]:
    cells = {name: str(line[name]) for name in ("command", "part", "figure")}
    cells |= {"measured": line.get("state", ""), "documented": f"{line['documented']:g}"}
    cells |= {name: f"{line[name]:.3g}" for name in ("measured", "ratio") if name in line}
    return cells | {"measured before with": f"jax {line['jax']}, {line['processor']}"}
