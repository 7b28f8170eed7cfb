"""Estimates a training step's memory and communication on many devices, without the devices.

varjax benchmark partitioning --preset=d16 --devices=8

--devices=8,64 simulates 8 and 64 CPU devices. The communication is read from XLA's partitioned
program, which does not depend on the hardware. Temporary memory is that of a CPU, which computes
bfloat16 in float32 and fuses operations differently. --topology=v5e:2x4,v5e:8x8 compiles for these
TPUs with their compiler (`pip install libtpu`); "fits" is false if the program needs more memory
than they have.
"""

import dataclasses
import functools
import math
import pathlib
import tempfile
import time
from typing import Any, get_args

import jax
import jax.numpy as jnp

from varjax.benchmark.collectives import count_traffic
from varjax.benchmark.measure import print_figures, tpu_devices
from varjax.config.numbers import whole_number
from varjax.models import benchmark_of
from varjax.nn.compute import ComputeConfig, Remat
from varjax.runtime.commands import command_parser
from varjax.training import sharding
from varjax.training.task import Plan


def main(arguments: list[str]) -> None:
    """Reads the command line and prints a line for each number of devices; raises InputError."""
    parser = command_parser("varjax benchmark partitioning", __doc__)
    add = parser.add_argument
    add("--preset", default="d16", help="published size, such as d16 or mar_b (d16)")
    add(
        "--devices", type=_numbers, default="8", help="numbers of CPU devices to simulate: 8,64 (8)"
    )
    add("--topology", default="", help="compile for these TPUs instead: v5e:2x4,v5e:8x8")
    add(
        "--fsdp",
        type=int,
        default=0,
        help="size of this mesh axis (largest that divides the width)",
    )
    add("--tensor", type=int, default=1, help="size of this mesh axis (1)")
    add("--batch_size", type=int, default=0, help="images in a batch (the official number)")
    add("--accumulate", type=int, default=1, help="microbatches in a step (1)")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="format of products")
    add("--remat", choices=get_args(Remat), default="block", help="what to recompute (block)")
    add("--ema", type=float, default=0.0, help="decay of averaged weights, 0 for none (0)")
    add(
        "--sizes_only",
        action="store_true",
        help="compile nothing; print only the sizes of stored arrays",
    )
    flags = parser.parse_args(arguments)
    for name, low in (("fsdp", 0), ("tensor", 1), ("batch_size", 0), ("accumulate", 1)):
        whole_number(name, getattr(flags, name), low)
    for count in flags.devices:
        whole_number("devices", count, 1)
    benchmark = benchmark_of(flags.preset)
    counts = [] if flags.topology else flags.devices
    jax.config.update("jax_platforms", "cpu")
    # At least two, because on a single CPU device the model is computed in another way.
    jax.config.update("jax_num_cpu_devices", max([2, *counts]))
    for target in flags.topology.split(",") if flags.topology else counts:
        compute = ComputeConfig(
            dtype=flags.dtype,
            attention_impl="xla",
            remat=flags.remat,
            platform="tpu" if flags.topology else "auto",
        )
        task = dataclasses.replace(
            benchmark.training_task(flags.preset, compute),
            ema_decay=flags.ema,
            accumulate=flags.accumulate,
        )
        devices = jax.devices()[:target] if isinstance(target, int) else tpu_devices(target)
        left = len(devices) // flags.tensor or 1
        shape = sharding.MeshShape(
            fsdp=flags.fsdp or math.gcd(left, task.model.width),
            tensor=flags.tensor,
        )
        mesh = sharding.make_mesh(shape, devices)
        plan = Plan(1000, flags.batch_size or benchmark.BATCH_SIZES[flags.preset])
        figures = measure_step(task, plan, mesh, flags.sizes_only)
        print_figures(benchmark="partitioning", preset=flags.preset, **figures)


def measure_step(task: Any, plan: Plan, mesh: Any, sizes_only: bool = False) -> dict[str, Any]:
    """Compiles one training step and measures what each device holds and sends, in 1e9 bytes.

    Args:
        task: training task to measure.
        plan: length of the run, with the batch size.
        mesh: mesh of devices, which need not exist on this machine.
        sizes_only: True only adds up the arrays held between steps; False also compiles the step.

    Returns:
        state_gb and frozen_gb, held between steps; arguments_gb, which adds the batch;
        temporaries_gb, the additional memory of a step; sent, which maps each kind of collective to
        (calls, gigabytes); and the settings.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = _placed(jax.eval_shape(task.init, key), mesh)
    frozen = _placed(jax.eval_shape(task.tokenizer.init, key), mesh)
    rows = sharding.batch_sharding(mesh)
    B = plan.batch_size
    sharding.check_batch_size(mesh, B, task.accumulate)
    figures = {
        "compiled_for": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        **mesh.shape,
        "batch_size": B,
        "accumulate": task.accumulate,
        "dtype": str(task.compute.jax_dtype),
        "remat": task.compute.remat,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "state_gb": _held_gb(state),
        "frozen_gb": _held_gb(frozen),
    }
    if sizes_only:
        return figures
    batch = {
        "image_BHWC": _abstract((B, *task.tokenizer.image_shape), jnp.uint8, rows),
        "label_B": _abstract((B,), jnp.int32, rows),
    }
    step = jax.jit(
        sharding.on_mesh(functools.partial(task.train_step, plan=plan), mesh),
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)),
        donate_argnums=0,
    )
    begin = time.perf_counter()
    lowered = step.lower(state, frozen, batch, _abstract((), key.dtype, sharding.replicated(mesh)))
    compiled, hlo = _compile(lowered)
    figures["compile_seconds"] = time.perf_counter() - begin
    if isinstance(compiled, str):
        return figures | {"fits": False, "refused": compiled}
    memory = compiled.memory_analysis()
    sent = count_traffic(hlo)
    return figures | {
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
        "sent_gb": sum(kind.bytes for kind in sent.values()) / 1e9,
        "sent": {name: [kind.calls, round(kind.bytes / 1e9, 4)] for name, kind in sent.items()},
    }


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _placed(tree: Any, mesh: Any) -> Any:
    specs = sharding.shardings(tree, mesh)
    return jax.tree.map(lambda x, s: _abstract(x.shape, x.dtype, s), tree, specs)


def _abstract(shape: tuple[int, ...], dtype: Any, placement: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placement)


def _held_gb(tree: Any) -> float:
    """Adds up abstract arrays on each device, in 1e9 bytes."""
    return sharding.bytes_on_device(tree, jax.tree.map(lambda x: x.sharding, tree)) / 1e9


def _compile(lowered: Any) -> tuple[Any, str]:
    """Returns the program, or the compiler's message if it does not fit, and its HLO text."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("RESOURCE_EXHAUSTED"):
                raise
            return str(error).splitlines()[0], ""
        (text,) = pathlib.Path(folder).glob("*after_spmd-partitioning*")
        return compiled, text.read_text()
