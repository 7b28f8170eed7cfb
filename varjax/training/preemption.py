"""Handles SIGINT and SIGTERM as a request to stop after the step."""

import os
import signal
import threading
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class PreemptionGuard:
    """Turns the first signal into a request to stop; a second one kills as usual.

        with PreemptionGuard() as preemption:
            while not preemption.should_stop():
                step()

    With several processes only SIGTERM is handled, even repeatedly; SIGINT kills as usual. A signal
    to any process stops all of them at the same call of `should_stop`.

    Attributes:
        signum: signal that asked the run to stop; None before.
    """

    def __init__(self):
        self.signum: int | None = None
        self._received = 0  # signal to this process, which the others may not know of yet
        self._exchange = _SignalExchange() if jax.process_count() > 1 else None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "PreemptionGuard":
        if threading.current_thread() is threading.main_thread():
            handled = (signal.SIGTERM,) if self._exchange else (signal.SIGINT, signal.SIGTERM)
            self._handlers = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def signalled(self) -> bool:
        """Returns whether to stop, as known at the last call of `should_stop`."""
        return self.signum is not None

    def should_stop(self) -> bool:
        """Returns whether to stop: the same in all processes, which must call it equally often."""
        if self._exchange and self.signum is None:
            self.signum = self._exchange.send(self._received)
        return self.signalled()

    def _handle(self, signum: int, _: Any) -> None:
        # os.write, not print: the signal may have come in the middle of one
        if self._exchange:
            self._received = signum
            os.write(2, b"stopping after the next step\n")
            return
        self.signum = signum
        for number in self._handlers:
            signal.signal(number, signal.SIG_DFL)
        os.write(2, b"stopping after this step; a second signal kills\n")


class _SignalExchange:
    """Informs all processes of a signal to any, by a collective that runs after the step before it.

    `multihost_utils.reached_preemption_sync_point` is not used: with JAX 0.10.2 a process that is
    one step ahead at the wrong moment does not stop with the others, and all hang.
    """

    def __init__(self):
        mesh = Mesh(np.array(jax.devices()), ("devices",))
        self._by_device = NamedSharding(mesh, P("devices"))
        self._largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))
        self._underway: jax.Array | None = None

    def send(self, signum: int) -> int | None:
        """Sends this process's signal, 0 for none; returns any that was sent at the last call.

        The answer comes one call late, so that no process waits for the step just dispatched.
        """
        shape, mine = (len(jax.devices()),), np.full(1, signum, np.int32)
        signals = jax.make_array_from_callback(shape, self._by_device, lambda _: mine)
        arrived, self._underway = self._underway, self._largest(signals)
        return None if arrived is None else int(arrived) or None
