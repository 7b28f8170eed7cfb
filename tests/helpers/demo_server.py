"""Serves the demo for tests: it cannot connect to other machines, and logs what it computes.

python -m tests.helpers.demo_server LOG --weights=DIR --port=PORT

While `slow_file(LOG)` exists, each part of a drawing takes two seconds longer.
"""

import pathlib
import sys
import time

from varjax.demo import __main__, drawing

LOCAL = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "")


def forbid_other_machines(log: pathlib.Path) -> None:
    """Refuses every connection to another machine, and logs it."""

    def hook(event, arguments):
        if event == "socket.getaddrinfo":
            host = arguments[0]
        elif event in ("socket.connect", "socket.sendto", "socket.gethostbyname"):
            address = arguments[-1]
            host = address[0] if isinstance(address, tuple) else None  # None: a Unix socket
        else:
            return
        host = host.decode() if isinstance(host, bytes) else host
        if host is not None and host not in LOCAL:
            write(log, f"elsewhere {event} {host}")
            raise OSError(f"{event} {host} is forbidden")

    sys.addaudithook(hook)


def slow_file(log: pathlib.Path) -> pathlib.Path:
    return log.with_suffix(".slow")


def write(log: pathlib.Path, line: str) -> None:
    with open(log, "a") as file:
        file.write(line + "\n")


def watch_parts(log: pathlib.Path) -> None:
    """Logs the start of each part of a drawing, and slows parts down on demand."""
    sample_parts = drawing.sample_parts

    def watched_parts(*arguments):
        write(log, "part")
        time.sleep(2 * slow_file(log).exists())
        yield from sample_parts(*arguments)

    drawing.sample_parts = watched_parts


if __name__ == "__main__":
    log = pathlib.Path(sys.argv[1])
    forbid_other_machines(log)
    watch_parts(log)
    sys.exit(__main__.main(sys.argv[2:]))
