"""Tries a run without writing anything: its settings, data, memory, and two steps."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from varjax import trees
from varjax.runtime.distributed import on_first_process
from varjax.runtime.messages import duration
from varjax.storage.buckets import as_path
from varjax.training.experiment import Experiment
from varjax.training.fid_evaluation import HELD_OUT
from varjax.training.initial_weights import first_frozen_weights, own_frozen_weights
from varjax.training.metric_writers import flatten_metrics
from varjax.training.reporter import check_finite
from varjax.training.run_dir import check_config, check_data, check_holds_run, is_bound
from varjax.training.setup import first_state, jit_train_step, make_evaluators, set_up
from varjax.training.sharding import (
    bytes_on_device,
    put,
    put_batch,
    replicated_parameters_note,
    shardings,
)
from varjax.training.task import check_latents
from varjax.trees import PyTree


def dry_run(experiment: Experiment, say: Callable[[str], None] | None = None) -> None:
    """Checks a run up to the end of its second step, and reports the memory and time it takes.

    It checks the settings, also against those of an existing run in run_dir, makes the mesh, reads
    the first batch, compiles the step and the evaluation, reports their memory on a device, and
    takes two steps with the parameters of a first start. Nothing is written to run_dir.

    Args:
        experiment: settings of the run.
        say: function that gets each line; None prints them in the first process.

    Raises:
        InputError: if `train` would raise it, too.
        NonFiniteMetricError: a metric of the first step is not finite.
    """
    if say is None:
        say = print if jax.process_index() == 0 else lambda text: None
    setup = set_up(experiment)
    experiment, loader, mesh = setup.experiment, setup.loader, setup.mesh
    task = experiment.task
    run_dir, own_frozen = as_path(experiment.run_dir), None
    if on_first_process(lambda: is_bound(run_dir)):
        check_config(experiment)
        on_first_process(lambda: check_data(experiment))
        own_frozen = own_frozen_weights(run_dir)
        # Its next start reads its own checkpoint instead.
        experiment = dataclasses.replace(experiment, fork_from="", init_from="")
        setup = dataclasses.replace(setup, experiment=experiment)
    else:
        check_holds_run(run_dir)
    devices = f"{mesh.size} × {mesh.devices.flat[0].device_kind}"
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    say(f"mesh: {axes} on {devices}, {jax.process_count()} processes")
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = experiment.batch_size // parts
    say(
        f"batch: {experiment.batch_size:,} images, {rows:,} on a device, "
        f"{rows // task.accumulate:,} at a time"
    )
    steps, images = setup.plan.steps, len(loader.train_source)
    say(
        f"length: {steps:,} steps, {steps * experiment.batch_size / images:,.1f} epochs of "
        f"{images:,} images of {experiment.data.classes:,} classes"
    )

    begin = time.monotonic()
    rows_of_batch = next(loader.train(0))
    say(f"data: the first batch was read in {time.monotonic() - begin:.1f} s")
    init_key, train_key = jax.random.split(jax.random.key(experiment.seed))
    abstract = jax.eval_shape(task.init, init_key)
    placement = shardings(abstract, mesh)
    parameters = sum(x.size for x in jax.tree.leaves(abstract.params))
    say(f"state: {parameters:,} parameters; {_sizes(abstract, placement)}")
    if note := replicated_parameters_note(abstract.params, mesh):
        say(note)
    frozen = first_frozen_weights(experiment) if own_frozen is None else own_frozen
    check_latents(task, frozen, loader.tokenizer_identity)
    where = shardings(frozen, mesh)
    if jax.tree.leaves(frozen):
        say(f"pretrained weights: {_sizes(frozen, where)}")
    frozen = put(frozen, where)
    evaluator, fid = make_evaluators(setup, abstract, frozen)
    if fid is not None and experiment.fid.reference != HELD_OUT:
        fid.read_reference()

    state = first_state(setup, abstract, init_key, placement)
    batch = put_batch(rows_of_batch, mesh, experiment.batch_size)
    begin = time.monotonic()
    jitted = jit_train_step(task, setup.plan, mesh, placement, experiment.skip_nonfinite > 0)
    step = jitted.lower(state, frozen, batch, train_key).compile()
    say(f"step: compiled in {time.monotonic() - begin:.0f} s, {_needs(step, mesh)}")
    state, metrics = jax.block_until_ready(step(state, frozen, batch, train_key))
    numbers = flatten_metrics(jax.device_get(metrics))
    check_finite(1, numbers)
    loss = numbers.get("loss")
    # The first step also connects the devices and loads kernels, so the second one is timed.
    begin = time.monotonic()
    state, _ = jax.block_until_ready(step(state, frozen, batch, train_key))
    seconds = time.monotonic() - begin
    say(
        f"step: loss {loss:.4g}; the second in {seconds:.2f} s, "
        f"{experiment.batch_size / seconds:,.1f} images/s"
    )
    whole = seconds * steps
    say(
        f"whole run: about {duration(whole)} at this speed, {whole * mesh.size / 3600:,.1f} "
        "device-hours, without compiling, waiting for data, evaluations and saves"
    )
    begin = time.monotonic()
    program = evaluator.compile(state)
    say(f"evaluation: compiled in {time.monotonic() - begin:.0f} s, {_needs(program, mesh)}")
    say(f"everything works; nothing was written to {run_dir}")


def _sizes(tree: PyTree, placement: PyTree) -> str:
    whole = trees.nbytes(tree)
    return f"{_gb(whole)} in all, {_gb(bytes_on_device(tree, placement))} on a device"


def _needs(program: Any, mesh: Any) -> str:
    """Returns the memory that a compiled program needs on a device, and the device's own."""
    memory = program.memory_analysis()
    if memory is None:
        return "its memory is unknown"
    need = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    words = f"needs {_gb(need)} on a device ({_gb(memory.temp_size_in_bytes)} for temporaries)"
    statistics = mesh.local_devices[0].memory_stats() if mesh.local_devices else None
    if statistics and "bytes_limit" in statistics:
        words += f" of {_gb(statistics['bytes_limit'])}"
    return words


def _gb(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"
