"""Starts Python processes like subprocess does, with JAX and varjax already imported.

forked.run([sys.executable, "-m", "varjax", "sample", "--weights=runs/digits"], capture_output=True)

Importing JAX, Flax, Optax, Orbax and varjax takes 1.5 s of CPU time for each process that a test
starts. Here, a server imports them once and forks for each start.

Forking is safe because the server only imports. It makes no arrays, so JAX has no backend and no
threads yet (the server checks this before each fork), and XLA reads XLA_FLAGS in the new process.
OpenBLAS, which NumPy and SciPy load, restarts its threads after a fork. Variables that JAX reads
when it is imported are applied again in the new process.

Use subprocess where the start itself is tested: what is imported and when, LD_PRELOAD, and
environment variables that this file does not apply.
"""

import atexit
import ctypes
import faulthandler
import functools
import gc
import importlib
import inspect
import json
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import types

import jax
from jax._src import xla_bridge

from tests.helpers.paths import ROOT

PRELOADED = (
    "tests.helpers.tiny",
    "varjax.api",
    "varjax.cli.cache_latents",
    "varjax.cli.main",
    "varjax.cli.sample",
    "varjax.cli.train",
    "varjax.evaluation.evaluate",
    "varjax.training.loop",
)
PR_SET_CHILD_SUBREAPER = 36  # from linux/prctl.h
APPLIED = {"JAX_NUM_CPU_DEVICES": int, "JAX_PLATFORMS": str}
MAX_REQUEST_BYTES = 2**17


def run(command, *, check=False, capture_output=False, timeout=None, **options):
    """Runs a command to its end, like subprocess.run.

    A process that exceeds `timeout` prints its stack traces, which the error contains.
    """
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if timeout is not None:
        options["env"] = {**(options.get("env") or os.environ), "PYTHONFAULTHANDLER": "1"}
    with Popen(command, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # makes Python print its stack traces
            output, errors = process.communicate(timeout=10)
            raise AssertionError(f"{command} took over {timeout} s: {output} {errors}") from None
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


class Popen(subprocess.Popen):
    """Works like subprocess.Popen, but the server forks the process, which the caller adopts."""

    def _execute_child(self, *arguments):
        start = subprocess.Popen._execute_child  # pyright: ignore[reportAttributeAccessIssue]
        if sys.platform != "linux":  # only there can this process adopt the server's
            return start(self, *arguments)
        given = inspect.signature(start).bind(self, *arguments).arguments
        request = {
            "command": [os.fspath(part) for part in given["args"]],
            "cwd": os.fspath(given["cwd"] or os.getcwd()),
            "environment": dict(os.environ if given["env"] is None else given["env"]),
            "new_session": given["start_new_session"],
        }
        assert (
            request["command"][0] == sys.executable and "LD_PRELOAD" not in request["environment"]
        )
        pipes = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        pipes = [inherited if fd == -1 else fd for inherited, fd in enumerate(pipes)]
        self.pid = _start(request, pipes)
        self._child_created = True
        ends = "p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"
        self._close_pipe_fds(*(given[end] for end in ends))  # pyright: ignore


def _start(request: dict, pipes: list[int]) -> int:
    """Has the server start a process, and adopts it; returns its ID."""
    server, prctl = _server(), ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    socket.send_fds(server, [json.dumps(request).encode()], pipes)
    number = int(server.recv(100))
    prctl(PR_SET_CHILD_SUBREAPER, 0)  # do not adopt orphans of other processes
    return number


@functools.cache
def _server() -> socket.socket:
    """Starts the server of this process; returns the connection to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "tests.helpers.forked", str(theirs.fileno())]
        others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        process = subprocess.Popen(command, cwd=ROOT, env=others, pass_fds=[theirs.fileno()])
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


def serve(requests: socket.socket) -> dict:
    """Forks for each request; returns only in the new processes, with their request."""
    while True:
        text, pipes, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 3)
        if not text:
            os._exit(0)
        assert not xla_bridge.backends_are_initialized()
        reader, writer = os.pipe()
        if parent := os.fork():
            # Once its parent has ended, the new process becomes a child of the nearest ancestor
            # that adopts orphans, which is the process that requested it.
            os.waitpid(parent, 0)
            requests.send(os.read(reader, 100))
            for fd in (reader, writer, *pipes):
                os.close(fd)
        elif number := os.fork():
            os.write(writer, str(number).encode())
            os._exit(0)
        else:
            requests.close()
            for fd, pipe in enumerate(pipes):
                os.dup2(pipe, fd)
            for fd in (reader, writer, *pipes):
                os.close(fd)
            return json.loads(text)


def become(request: dict) -> None:
    """Sets up this process as `request` describes, and runs its command."""
    if request["new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    before, wanted = dict(os.environ), request["environment"]
    os.environ.clear()
    os.environ.update(wanted)
    for name in before.keys() | wanted.keys():
        if name.startswith("JAX_") and before.get(name) != wanted.get(name):
            jax.config.update(name.lower(), APPLIED[name](wanted[name]))
    if "PYTHONFAULTHANDLER" in wanted:
        faulthandler.enable()
    # The server has no PYTHONPATH. sys.path[0], the project's root, is replaced below.
    sys.path[1:1] = [path for path in wanted.get("PYTHONPATH", "").split(os.pathsep) if path]
    _, first, *rest = request["command"]
    if first == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[0], sys.argv = str(pathlib.Path(first).parent), [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # keeps garbage collection off what was imported
    # An exception or SystemExit ends the new process as it would end an interpreter.
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
