"""Passes the images after each step to a function while the later steps are computed."""

import concurrent.futures
import itertools
import math
import queue
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from varjax.errors import InputError
from varjax.sampling.sampler import SendImages, StepListener

# A callback of a CPU's program gets small arrays at once. JAX copies larger ones (100 KiB) in the
# threads that run the program, for which the callback would wait forever if there is only one.
CPU_PIECE = 2**14  # numbers of an array that is sent

_call_numbers = itertools.count()
_received: dict[int, queue.SimpleQueue[np.ndarray | None]] = {}  # by the number of the call


def sample_with_listener(
    program: Callable[[np.int32], jax.Array],
    listener: StepListener,
    shape: tuple[int, ...],
    devices: Sequence[Any],
) -> jax.Array:
    """Runs a program that sends images, and calls a listener with those of each step, in order.

    The listener runs in a thread for itself, so the program does not wait for it.

    Args:
        program: function of the number of this call, which `sender` takes; returns the finished
            images. These are the last step, which the program need not send.
        listener: function of a step's number and images.
        shape: (B, H, W, channels) of the images.
        devices: devices that compute the images.

    Returns:
        The finished images, after all calls of the listener.

    Raises:
        InputError: there are several devices.
        Exception: what the listener raised; it is not called again, but the images are computed.
    """
    if len(devices) > 1:
        raise InputError(
            f"every_step is a function, which takes the images of one device; this model has "
            f"{len(devices)}: load it with devices=jax.devices()[:1], or give every_step=True"
        )
    call = next(_call_numbers) % 2**31
    received = _received[call] = queue.SimpleQueue()
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        delivery = executor.submit(_deliver, received, listener, shape)
        try:
            images_BHWC = program(np.int32(call))
            jax.effects_barrier()
            received.put(np.asarray(images_BHWC).reshape(-1))
        finally:
            received.put(None)
            del _received[call]
    delivery.result()
    return images_BHWC


def sender(call: jax.Array, platform: str) -> SendImages:
    """Makes the function with which a traced program sends the images of a step.

    The program does not contain the listener, only the number of the call: so one program serves
    all listeners.

    Args:
        call: number of the call of `sample_with_listener`.
        platform: platform of the device that computes the program, such as "cpu".
    """

    def send(images_BHWC, x):
        flat_N = images_BHWC.reshape(-1)
        piece = min(CPU_PIECE, flat_N.size) if platform == "cpu" else flat_N.size
        pieces_PN = jnp.pad(flat_N, (0, -flat_N.size % piece)).reshape(-1, piece)

        def send_piece(sent, piece_N):
            shape = jax.ShapeDtypeStruct((), jnp.int32)
            return io_callback(_receive, shape, call, sent, piece_N), None

        sent, _ = jax.lax.scan(send_piece, jnp.int32(0), pieces_PN)
        # A compiler may put off what no later step needs. This is always x, but it cannot know.
        return jnp.where(sent > 0, x, jnp.zeros_like(x))

    return send


def _receive(call, sent, piece_N) -> np.int32:
    # A copy: the program reuses the memory of its arrays.
    _received[int(call)].put(np.array(piece_N))
    return np.int32(int(sent) + 1)


def _deliver(received, listener, shape) -> None:
    pieces, size = [], math.prod(shape)
    for step in itertools.count():
        while sum(map(len, pieces)) < size:
            if (piece_N := received.get()) is None:
                return
            pieces.append(piece_N)
        listener(step, np.concatenate(pieces)[:size].reshape(shape))
        pieces = []
