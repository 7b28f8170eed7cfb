"""Makes file operations of short commands fail one by one, and checks how the commands react.

python -m tests.helpers.fault_sweep --folder=DIR [--calls=write,fsync,rename,open,create,read]
    [--errors=ENOSPC,EIO,ESTALE,EMFILE] [--each=1] [--cases=N] [--minutes=M] [--seed=0] [SCENARIO …]

First, the file operations of each command in fault_scenarios.py are counted, by call and kind of
file. Then the command runs once for each operation and each error that the call can return: either
this call fails, or all such calls from then on. The command must succeed as usual, or end with a
message, after which the same command without faults must succeed. --each=1 makes only the first
call on each kind of file fail, --each=0 every call. --cases=N draws N cases at random. After
--minutes=M, no further case starts.

Prints a line of JSON for each case, and finally a summary. The exit code is 1 if a command hung,
died, ended without a message, or left files from which it cannot continue.
"""

import argparse
import collections
import contextlib
import dataclasses
import errno
import faulthandler
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

from tests.helpers.faults import Faults, path_pattern

# Errors that local and network file systems return for each call.
ERRORS = {
    "write": ("ENOSPC", "EIO", "ESTALE"),
    "fsync": ("EIO", "ENOSPC"),
    "rename": ("ENOSPC", "EIO", "ESTALE"),
    "open": ("EMFILE", "EIO", "ESTALE"),
    "create": ("EMFILE", "ENOSPC", "EIO", "ESTALE"),
    "read": ("EIO", "ESTALE"),
    "stat": ("EIO", "ESTALE"),
    "mkdir": ("ENOSPC", "EIO", "ESTALE"),
    "unlink": ("EIO", "ESTALE"),
}
USUAL_CALLS = "write,fsync,rename,open,create,read"
USUAL_ERRORS = "ENOSPC,EIO,ESTALE,EMFILE"
# Without faults, a command takes 2 to 6 seconds, or a minute on a busy machine.
TIME_LIMIT = 600.0  # seconds
WINDOW, LEAST_WORK = (
    30.0,
    0.3,
)  # seconds; a command that uses less CPU time than LEAST_WORK in a WINDOW hangs
GOOD = ("same", "recovered")
QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@dataclasses.dataclass(frozen=True)
class Case:
    """Describes a fault: call `number` on `pattern` fails; if `for_good`, all later ones, too."""

    scenario: str
    call: str
    pattern: str
    number: int
    error: str
    for_good: bool


class Sweep:
    """Runs scenarios in processes that are forked from this one.

    Args:
        folder: a new folder.
        faults: faults whose library this process has loaded.
        names: names of the scenarios; empty for all.
    """

    def __init__(self, folder: pathlib.Path, faults: Faults, names: Sequence[str] = ()):
        from tests.helpers import fault_scenarios

        every = fault_scenarios.SCENARIOS
        self.scenarios = {name: every[name] for name in names or every}
        self._run_digest: dict[str, dict[str, str]] = {}
        self._folder, self._faults = folder, faults
        self._inputs, self.work = folder / "inputs", folder / "work"
        self._log, self._found = folder / "log.txt", folder / "found.json"
        self._inputs.mkdir()
        needed = {entry for scenario in self.scenarios.values() for entry in scenario.inputs}
        code, _ = self._forked(lambda: fault_scenarios.make_inputs(self._inputs, needed), 600.0)
        if code:
            raise SystemExit(f"the inputs cannot be made:\n{self._log.read_text()}")

    def operations(self, name: str) -> list[tuple[str, str]]:
        """Returns (call, pattern) of each operation of a command without faults, in order."""
        self._faults.clear_log()
        self._set_up(name)
        self._faults.record(True)
        code, _ = self._command(name)
        self._faults.record(False)
        if code:
            raise SystemExit(f"{name} without faults:\n{self._log.read_text()}")
        self._run_digest[name] = json.loads(self._found.read_text())
        return [(call, path_pattern(path)) for call, path in self._faults.logged("pass")]

    def case(self, case: Case) -> dict:
        """Runs a case; returns the outcome as JSON data."""
        begin = time.monotonic()
        self._faults.clear_log()
        self._set_up(case.scenario)
        count = {} if case.for_good else {"count": 1}
        error = getattr(errno, case.error)
        self._faults.arm([case.call], error, case.number, pattern=case.pattern, **count)
        try:
            code, hung = self._command(case.scenario)
        finally:
            self._faults.disarm()
        failed = self._faults.logged("fail")
        text = self._log.read_text()
        outcome = self._outcome(case.scenario, code, hung, text)
        if outcome == "refused":
            code, hung = self._command(case.scenario)
            outcome = "recovered"
            if hung or code or not self._as_it_should_be(case.scenario):
                outcome = "hung at the next start" if hung else "not recovered"
                text += f"\nnext start, code {code}:\n{self._log.read_text()}{self._difference}"
        name = case.pattern.removeprefix(f"{self.work}/")
        report = dataclasses.asdict(case) | {"pattern": name, "outcome": outcome}
        report |= {"failed": len(failed), "seconds": round(time.monotonic() - begin, 1)}
        report["noise"] = "Traceback" in text
        messages = [x for x in text.splitlines() if x.startswith(("varjax ", "note: "))]
        whole = outcome not in GOOD or report["noise"]
        report["message"] = text[-6000:] if whole else "\n".join(messages)[:400]
        return report

    def _outcome(self, name: str, code: int, hung: bool, text: str) -> str:
        if hung:
            return "hung"
        if code == 0:
            return "same" if self._as_it_should_be(name) else "other result"
        if code < 0:
            return f"died of signal {-code}"
        command = self.scenarios[name].arguments[0]
        if not any(line.startswith(f"varjax {command}: ") for line in text.splitlines()):
            return "no message"
        return "refused"

    def _as_it_should_be(self, name: str) -> bool:
        actual, wanted = json.loads(self._found.read_text()), self._run_digest[name]
        names = (k for k in actual.keys() | wanted.keys() if actual.get(k) != wanted.get(k))
        self._difference = "\n".join(f"{k}: {actual.get(k)}\n not {wanted.get(k)}" for k in names)
        return not self._difference

    def _set_up(self, name: str) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for entry in self.scenarios[name].inputs:
            source = self._inputs / entry
            if source.is_dir():
                shutil.copytree(source, self.work / entry)
            else:
                shutil.copy(source, self.work / entry)

    def _command(self, name: str) -> tuple[int, bool]:
        from varjax.cli import main

        scenario = self.scenarios[name]

        def run() -> int:
            os.chdir(self.work)
            if code := main.main(list(scenario.arguments)):
                return code
            self._faults.disarm()
            self._faults.record(False)
            self._found.write_text(json.dumps(scenario.digest(self.work / scenario.out)))
            return 0

        self._found.write_text("{}")
        self._difference = ""
        return self._forked(run, TIME_LIMIT)

    def _forked(self, action: Callable[[], int | None], limit: float) -> tuple[int, bool]:
        """Runs `action` in a separate process group; returns the exit code, and whether it hung."""
        if (child := os.fork()) == 0:
            code = 70
            try:
                os.setsid()
                log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                faulthandler.register(signal.SIGUSR1, all_threads=True)
                code = action() or 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
            # End like any other process, which joins threads and runs atexit functions.
            raise EndOfChild(code)
        begin = window = time.monotonic()
        used = 0.0
        while (now := time.monotonic()) < begin + limit:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                with contextlib.suppress(ProcessLookupError):  # kills its workers
                    os.killpg(child, signal.SIGKILL)
                return os.waitstatus_to_exitcode(status), False
            if now > window + WINDOW:
                if (spent := _cpu_seconds(child)) < used + LEAST_WORK:
                    break
                used, window = spent, now
            time.sleep(0.05)
        os.kill(child, signal.SIGUSR1)
        time.sleep(1)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return -signal.SIGKILL, True


def _cpu_seconds(group: int) -> float:
    """Returns the CPU time that the living processes of a group have used."""
    ticks = 0
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class EndOfChild(SystemExit):
    """Ends a forked process."""


def cases_of(
    name: str, operations: list[tuple[str, str]], calls: set[str], errors: set[str], each: int
) -> Iterator[Case]:
    """Yields the cases of a scenario, for at most `each` calls of a kind; 0 for all."""
    counts = collections.Counter(operations)
    for (call, pattern), count in counts.items():
        if call not in calls:
            continue
        numbers = range(count)
        if each and count > each:  # evenly spread from the first to the last
            numbers = sorted({round(i * (count - 1) / max(1, each - 1)) for i in range(each)})
        for number in numbers:
            for error in ERRORS[call]:
                if error in errors:
                    for for_good in (False, True):
                        yield Case(name, call, pattern, number, error, for_good)


def drawn(cases: list[Case], count: int, rng: random.Random) -> list[Case]:
    """Draws some of the cases, with equal weight for all scenarios and calls."""
    rng.shuffle(cases)
    kinds = collections.Counter()
    order = []
    for case in cases:
        kind = case.scenario, case.call
        order.append((kinds[kind], kind))
        kinds[kind] += 1
    ranked = sorted(range(len(cases)), key=lambda i: order[i][0])
    return [cases[i] for i in ranked[:count]]


def sweep(flags: argparse.Namespace, faults: Faults) -> int:
    folder = flags.folder.absolute()
    begin = time.monotonic()
    swept = Sweep(folder, faults, flags.scenarios)
    cases: list[Case] = []
    for name in swept.scenarios:
        operations = swept.operations(name)
        counts = collections.Counter(call for call, _ in operations)
        kinds = collections.Counter(call for call, _ in set(operations))
        print(json.dumps({"scenario": name, "operations": counts, "kinds": kinds}), flush=True)
        calls, errors = set(flags.calls.split(",")), set(flags.errors.split(","))
        cases += cases_of(name, operations, calls, errors, flags.each)
    if flags.cases:
        cases = drawn(cases, flags.cases, random.Random(flags.seed))
    outcomes: collections.Counter = collections.Counter()
    reached = 0
    for case in cases:
        if flags.minutes and time.monotonic() > begin + 60 * flags.minutes:
            break
        report = swept.case(case)
        outcomes[report["outcome"]] += 1
        reached += report["failed"] > 0
        print(json.dumps(report), flush=True)
    bad = sum(n for outcome, n in outcomes.items() if outcome not in GOOD)
    minutes = round((time.monotonic() - begin) / 60, 1)
    report = {
        "cases": outcomes.total(),
        "reached": reached,
        "outcomes": outcomes,
        "minutes": minutes,
    }
    print(json.dumps(report))
    return 1 if bad else 0


def main() -> int:
    """Runs the sweep in a process that preloads the library; returns the exit code."""
    parser = argparse.ArgumentParser("tests.helpers.fault_sweep", description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="a new one")
    parser.add_argument("--calls", default=USUAL_CALLS)
    parser.add_argument("--errors", default=USUAL_ERRORS)
    parser.add_argument("--each", type=int, default=1)
    parser.add_argument("--cases", type=int, default=0, help="0 for all")
    parser.add_argument("--minutes", type=float, default=0, help="0 for no limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO")
    flags = parser.parse_args()
    folder = flags.folder.absolute()
    started = os.environ.get("FAULT_FOLDERS") == str(folder / "work")
    folder.mkdir(parents=True, exist_ok=started)
    faults = Faults(folder, [folder / "work"])
    if not started:
        cache = {
            "VARJAX_CACHE": str(folder / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_NUM_CPU_DEVICES": "1",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", QUICK_COMPILATION),
        }
        command = [sys.executable, "-m", "tests.helpers.fault_sweep", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | cache | faults.environment())
    return sweep(flags, faults)


if __name__ == "__main__":
    sys.exit(main())
