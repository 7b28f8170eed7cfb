"""Provides fake devices of clusters, with the attributes that a mesh layout needs."""

import dataclasses
import itertools
import math


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int
    slice_index: int
    platform: str
    device_kind: str
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def tpu_slices(kind: str, chips: tuple[int, int, int], host: tuple[int, int, int], slices: int = 1):
    """Returns TPU chips, one device each, host by host as JAX lists them.

    Args:
        kind: device kind.
        chips: sides of one slice, in chips.
        host: sides of the block of chips that belongs to one process.
        slices: number of slices.
    """
    blocks = [range(0, side, step) for side, step in zip(chips, host, strict=True)]
    devices = []
    for slice_index in range(slices):
        for process, corner in enumerate(itertools.product(*reversed(blocks))):
            process += slice_index * math.prod(chips) // math.prod(host)
            for offset in itertools.product(*(range(side) for side in reversed(host))):
                coords = tuple(a + b for a, b in zip(corner, offset, strict=True))[::-1]
                devices.append(Device(len(devices), process, slice_index, "tpu", kind, coords))
    return devices


def gpus(processes: int, a_machine: int = 8):
    """Returns GPUs with one process each, as Slurm starts them."""
    kind = "NVIDIA H100 80GB HBM3"
    return [Device(i, i, i // a_machine, "gpu", kind) for i in range(processes)]


CLUSTERS = {
    "v4-32": tpu_slices("TPU v4", (2, 2, 4), (2, 2, 1)),
    "v4-128": tpu_slices("TPU v4", (4, 4, 4), (2, 2, 1)),
    "v4-512": tpu_slices("TPU v4", (4, 8, 8), (2, 2, 1)),
    "v5p-128": tpu_slices("TPU v5", (4, 4, 4), (2, 2, 1)),
    "v5e-8": tpu_slices("TPU v5 lite", (2, 4, 1), (2, 4, 1)),
    "v5e-64": tpu_slices("TPU v5 lite", (8, 8, 1), (2, 2, 1)),
    "v5e-256": tpu_slices("TPU v5 lite", (16, 16, 1), (2, 2, 1)),
    "v6e-64": tpu_slices("TPU v6 lite", (8, 8, 1), (2, 2, 1)),
    "v6e-256": tpu_slices("TPU v6 lite", (16, 16, 1), (2, 2, 1)),
    "two v5e-64": tpu_slices("TPU v5 lite", (8, 8, 1), (2, 2, 1), slices=2),
    "two v4-128": tpu_slices("TPU v4", (4, 4, 4), (2, 2, 1), slices=2),
    "8 GPUs": gpus(8),
    "16 GPUs": gpus(16),
    "32 GPUs": gpus(32),
}
