"""Tests `varjax benchmark report`: all parts with tiny models, time limits, interruptions."""

import contextlib
import io
import itertools
import json
import re
import subprocess
import sys

import pytest

from tests.benchmark.test_benchmark import tiny  # noqa: F401  (a fixture)
from tests.helpers.paths import ROOT
from varjax.benchmark import __main__ as benchmark
from varjax.benchmark import evaluate, operations, parity, report
from varjax.benchmark.report_page import EXPECTED, expected_speed, report_page
from varjax.metrics.features import pixel_network

CPU = {"platform": "cpu", "device": "cpu", "jax": "0.10.2", "memory_gb": None}
LINE = {"part": "whole", "device": "cpu", "seconds": 0.5, "images_per_second": 2.0}


def run_here(arguments, seconds):
    """Runs a part in this process, where models are tiny."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = benchmark.main(arguments)
    printed = [json.loads(line) for line in output.getvalue().splitlines()]
    return {"state": "failed" if code else "done", "lines": printed, "seconds": 1.0}


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path, monkeypatch, tiny):  # noqa: F811
    monkeypatch.setattr(evaluate, "random_inception_network", pixel_network)
    monkeypatch.setattr(evaluate, "FEATURES", 12)
    monkeypatch.setattr(evaluate, "COMPARED_IMAGES", 20)
    # Other tests have already compiled the programs for these batch sizes.
    commands = [
        part.cpu.replace("=500", "=20 --side=8").replace("batch_size=1", "batch_size=2")
        for part in report.PARTS
        if part.cpu and "--torch" not in part.cpu
    ]
    small = [report.Part("", 1, command) for command in commands]
    measured = report.measure_parts(small, CPU, 1000, tmp_path, run_here)
    assert [part["state"] for part in measured] == ["done"] * len(small)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == {"machine": CPU, "parts": measured}
    page = (tmp_path / "report.md").read_text()
    for text in (
        "equal_tokens 1.0",
        "alone_equal True",
        "alone_difference_255 0.0",
        "| encoder tf32_3x |",
        "| whole |",
    ):
        assert text in page
    lines = {(x["benchmark"], x["part"]): x for part in measured for x in part["lines"]}
    assert lines["operations", "attention, 4 queries"]["tflops"] > 0
    assert lines["operations", "attention in training, 5 tokens"]["tflops"] > 0
    assert lines["operations", "attention with dropout, 18 tokens"]["tflops"] > 0
    once, thrice = (lines["operations", f"encoder {name}"] for name in ("highest", "tf32_3x"))
    work = [line["tflops"] * line["milliseconds"] for line in (once, thrice)]
    assert work[0] == pytest.approx(work[1], rel=2e-3)  # FLOP of the model, not of its three passes
    assert lines["parity", "decoder"]["relative_error"] < 1e-5
    assert lines["parity", "loss and gradient"]["relative_error"] < 1e-5


@pytest.mark.slow
def test_parity_compares_mar_and_its_tokenizer_too(monkeypatch, tiny):  # noqa: F811
    # test_benchmark.py covers the sampling program.
    monkeypatch.setattr(parity, "compared_images", lambda *_: {"part": "sample"})
    _, *lines = run_here(["parity", "--preset=mar_b"], 0)["lines"]
    assert {line["part"] for line in lines} == {"encoder", "decoder", "loss and gradient"}
    assert all(line["relative_error"] < 1e-5 for line in lines)  # MAR encodes latents, not tokens


def test_accelerator_commands_are_accepted_by_their_parsers(monkeypatch):
    """Nothing is measured: the first function called after parsing raises `Read`."""

    class Read(Exception):
        pass

    def stop(*arguments, **options):
        raise Read

    for module in (operations, parity):
        monkeypatch.setattr(module, "compute_from_flags", stop)
    monkeypatch.setattr(evaluate, "measure_features", stop)
    for name in ("sample", "train"):
        monkeypatch.setattr(f"varjax.benchmark.{name}.compute_from_flags", stop)
    for part in report.PARTS:
        with pytest.raises(Read):
            benchmark.main(part.command.split())


def test_no_part_begins_after_the_total_time_limit(tmp_path, monkeypatch):
    now, limits = [0.0], []

    def run(arguments, seconds):
        limits.append(seconds)
        now[0] += seconds
        return {"state": "over its limit", "lines": [LINE], "seconds": seconds}

    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    parts = [report.Part("", 60, name) for name in ("a", "b", "c")]
    measured = report.measure_parts(parts, CPU, 100, tmp_path, run)
    assert limits == [60, 40]
    assert [part["state"] for part in measured] == ["over its limit"] * 2 + ["no time left"]
    assert "| whole | 500 | 2 |" in (tmp_path / "report.md").read_text()


def test_results_are_kept_when_the_report_is_interrupted(tmp_path):
    def run(arguments, seconds):
        if arguments == ["b"]:
            raise KeyboardInterrupt
        return {"state": "done", "lines": [LINE], "seconds": 1.0}

    parts = [report.Part("", 60, name) for name in ("a", "b")]
    with pytest.raises(KeyboardInterrupt):
        report.measure_parts(parts, CPU, 100, tmp_path, run)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert [part["command"] for part in saved["parts"]] == ["a"]


@pytest.mark.parametrize(
    ("code", "state", "lines", "error"),
    [
        ("print('{\"part\": 1}')", "done", 1, None),
        ("print('{\"part\": 1}'); raise SystemExit('no memory')", "failed", 1, "no memory"),
        ("print('{\"part\": 1}', flush=True); import time; time.sleep(60)", "over", 1, None),
    ],
)
def test_a_part_runs_in_a_process_with_a_time_limit(monkeypatch, code, state, lines, error):
    start = subprocess.run

    def run(command, **options):
        assert command[1:] == ["-m", "varjax", "benchmark", "data"]
        return start([sys.executable, "-c", code], **options)

    monkeypatch.setattr(report.subprocess, "run", run)
    result = report.run_part(["data"], 2)
    assert result["state"].startswith(state) and len(result["lines"]) == lines
    assert result.get("error") == error


@pytest.mark.parametrize(
    ("device", "command", "part", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "train --preset=d16 --batch_size=24", "step", 204),
        ("NVIDIA H100 80GB HBM3", "train --preset=d16 --batch_size=24 --cached", "step", 446),
        ("TPU v5 lite", "sample --preset=d16 --batch_size=1", "whole", 28),
        ("TPU v5 lite", "sample --preset=d16 --batch_size=auto", "whole", 70),
        ("TPU v5 lite", "sample --preset=d30 --batch_size=1", "whole", 9.3),
        ("TPU v5 lite", "train --preset=d16 --batch_size=24 --cached", "step", 49),
        ("TPU v5 lite", "train --preset=d16 --batch_size=24", "step", 38),
    ],
)
def test_expected_speeds_are_as_derived_in_the_docs(device, command, part, expected):
    assert expected_speed(device, command, part) == pytest.approx(expected, rel=0.01)


def test_expected_speeds_are_of_commands_in_the_report():
    commands = {part.command for part in report.PARTS}
    assert {command for _, command, _, _ in EXPECTED} <= commands


def test_expected_speeds_depend_on_the_device_and_command():
    h200, auto = "NVIDIA H200", "sample --preset=d16 --batch_size=auto"
    assert expected_speed(h200, auto, "whole") == pytest.approx(306, rel=0.01)
    assert expected_speed(h200, auto, "decoder") is None
    assert expected_speed("cpu", auto, "whole") is None
    line = LINE | {"device": h200, "dtype": "bfloat16", "model_gflop_per_image": 1000.0}
    page = report_page(CPU, [{"command": auto, "state": "done", "lines": [line], "seconds": 1}])
    assert "| part | ms | images/s | expected | TFLOP/s | of the peak |" in page
    assert "| whole | 500 | 2 | 306 | 2 | 0.00202 |" in page
    on_two = [{"command": auto, "state": "done", "lines": [line | {"devices": 2}], "seconds": 1}]
    assert "| whole | 500 | 2 | 306 | 2 | 0.00101 |" in report_page(CPU, on_two)


def test_an_existing_or_unwritable_report_is_refused_before_measuring(tmp_path, capsys):
    (tmp_path / "report.json").write_text('{"machine": {}, "parts": []}')
    for flags, message in {
        (f"--out={tmp_path}",): "has a report already",
        ("--out=/proc/report",): "cannot write to /proc/report",
        ("--minutes=0",): "minutes=0",
    }.items():
        assert benchmark.main(["report", *flags]) == 1
        assert message in capsys.readouterr().err


def test_a_report_that_found_no_device_can_be_restarted(tmp_path, monkeypatch, capsys):
    found, probes = [], iter(["raise SystemExit('no device')", f"print({json.dumps(CPU)!r})"])
    monkeypatch.setattr(report, "measure_parts", lambda parts, *_: found.append(parts) or [])
    for code, stated in ((1, "JAX cannot use a device here: no device"), (0, "the same as")):
        monkeypatch.setattr(report, "PROBE", next(probes))
        assert benchmark.main(["report", f"--out={tmp_path}"]) == code
        assert stated in capsys.readouterr().err
    assert len(found) == 1


def test_pytorch_times_are_in_the_rows_of_the_same_operations():
    setting = {"benchmark": "operations", "preset": "d16", "batch_size": 8, "dtype": "bfloat16"}
    setting |= {"device": "NVIDIA H200", "tflops": 1.0}
    ours = [
        setting | {"part": part, "implementation": name, "milliseconds": 2.0}
        for part, name in (("attention", "xla"), ("attention", "cudnn"), ("encoder", ""))
    ]
    torch = setting | {"library": "torch 2.13.0", "torch_device": "cpu", "milliseconds": 7.0}
    parts = [
        {"command": "operations", "state": "done", "lines": ours},
        {
            "command": "operations --torch",
            "state": "done",
            "lines": [torch | {"part": "attention"}, torch | {"part": "convolution"}],
        },
    ]
    page = report_page(CPU, parts)
    rows = [line.split(" | ")[:3] for line in page.splitlines() if line.startswith("| ")]
    assert rows[0] == ["| part", "ms", "PyTorch ms"]
    assert rows[2:5] == [
        ["| attention", "2", "7"], ["| attention", "2", "7"], ["| encoder", "2", ""]
    ]  # fmt: skip
    assert "implementation cudnn" in page and "PyTorch ms: torch 2.13.0 on cpu." in page
    # An operation measured only by PyTorch has its own row, with the library and its device.
    assert rows[7][:2] == ["| convolution", "7"] and len(rows) == 8
    assert "library torch 2.13.0; torch_device cpu" in page


def test_the_documentation_lists_the_parts_in_order():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    listed = page[page.index("\n1. `parity`") : page.index("After each part, `report/")]
    names = [name for name in re.findall(r"`(\w+)`", listed) if name in benchmark.NAMES]
    run = [part.command.split()[0] for part in report.PARTS]
    assert names == [name for name, _ in itertools.groupby(run)]


def test_limits_leave_time_for_the_most_valuable_parts():
    assert sum(part.seconds for part in report.PARTS[:5]) <= 8 * 60
    assert {part.command.split()[1] for part in report.PARTS[:5]} == {"--preset=d16"}
    assert sum(part.seconds for part in report.PARTS) <= 22 * 60  # as the page says


def test_parity_prints_first_what_needs_no_cpu(monkeypatch, capsys, tiny):  # noqa: F811
    monkeypatch.setattr(parity, "compared_images", lambda *_: {"part": "sample"})
    monkeypatch.setattr(parity, "compared_with_cpu", lambda *_: iter([{"part": "encoder"}]))
    assert benchmark.main(["parity"]) == 0
    printed = [json.loads(line)["part"] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["sample", "encoder"]
