"""The training loop: input and output around a task's pure functions."""

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from varjax.errors import InputError, traceback_file
from varjax.runtime.distributed import check_shared_file, on_first_process
from varjax.storage import folders
from varjax.storage.buckets import as_path
from varjax.training.checkpoint import Checkpoints
from varjax.training.evaluate import Evaluator
from varjax.training.experiment import BatchLoader, Experiment
from varjax.training.frozen_weights import frozen_weights
from varjax.training.goodput import FirstCall, Goodput
from varjax.training.loop_state import LoopState, parse_keep_best
from varjax.training.metric_writers import MetricWriter, flatten_metrics
from varjax.training.preemption import PreemptionGuard
from varjax.training.prefetch import Prefetcher
from varjax.training.progress import ProgressReporter
from varjax.training.run_dir import check_or_write_config, check_or_write_data, check_same_data
from varjax.training.sample_quality import SampleQuality
from varjax.training.sharding import (
    check_batch_size,
    make_mesh,
    on_mesh,
    put,
    replicated,
    replicated_parameters_note,
    rows_of_process,
    shardings,
)
from varjax.training.step_profiler import StepProfiler
from varjax.training.task import Plan, Task, TrainState, check_latents
from varjax.training.throughput import ThroughputMeter
from varjax.training.train_step import SKIPPED, skip_nonfinite_updates
from varjax.training.warm_start import forked_state, warm_start_state
from varjax.training.watchdog import Watchdog


class NonFiniteMetricError(InputError, FloatingPointError):
    """Reports training that diverged; the user can choose other settings."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """Holds what a run consists of, all of it checked, before anything is computed.

    Attributes:
        task: task to train.
        plan: length of the run.
        loader: loader of this process's rows.
        mesh: mesh of all devices.
    """

    task: Task
    plan: Plan
    loader: BatchLoader
    mesh: Mesh


def set_up(experiment: Experiment) -> Setup:
    """Lays out the mesh and opens the data of a run; writes nothing but notes on stderr.

    Raises InputError for settings that make no sense or do not fit one another.
    """
    experiment.check()
    mesh = make_mesh(experiment.mesh)
    rows = rows_of_process(mesh, experiment.batch_size).tolist()
    loader = experiment.data.make(experiment.batch_size, experiment.seed, rows)
    check_same_data(experiment, len(loader.train_source))
    plan = experiment.plan(len(loader.train_source))
    task = experiment.task
    task.check(experiment.data.image_shape, experiment.data.classes)
    check_batch_size(mesh, experiment.batch_size, task.accumulate)
    for note in task.notes(plan) if jax.process_index() == 0 else ():
        print(f"note: {note}", file=sys.stderr)
    return Setup(task, plan, loader, mesh)


def jit_train_step(
    task: Task, plan: Plan, mesh: Mesh, placement: TrainState, skip_nonfinite: bool = False
) -> Callable[..., Any]:
    """Jits a task's step so that the state keeps its sharding and is updated in place.

    Args:
        task: task of the run.
        plan: length of the run.
        mesh: mesh of all devices.
        placement: a sharding for each array of the state.
        skip_nonfinite: whether to skip updates as `skip_nonfinite_updates` does.
    """
    step = functools.partial(task.train_step, plan=plan)
    if skip_nonfinite:
        step = skip_nonfinite_updates(step)
    return jax.jit(
        on_mesh(step, mesh),
        out_shardings=(placement, replicated(mesh)),
        donate_argnums=0,
    )


def train(experiment: Experiment, profile: str = "") -> dict[str, float]:
    """Trains, or continues what is in `run_dir`.

    The same command continues a run after any kind of end, and then takes exactly the steps that
    an uninterrupted run takes. SIGINT and SIGTERM (with several processes only SIGTERM) save at
    once and exit with 128 + the signal's number; an evaluation that was due is made up for. The
    traceback of an unexpected error is also written to <run_dir>/error.txt. A run without progress
    for `stalled_minutes` ends the process (`Watchdog`).

    Args:
        experiment: settings of the run.
        profile: steps to trace, for `StepProfiler`; "" for none.

    Returns:
        The metrics of the last evaluation.

    Raises:
        InputError: settings that make no sense or differ from the run's.
        NonFiniteMetricError: a metric is not finite, and not in a step that `skip_nonfinite` leaves
            out; nothing of that step is saved.
        StorageError: the run's files cannot be written.
    """
    goodput = Goodput()
    setup = set_up(experiment)
    run_dir = as_path(experiment.run_dir)
    profiler = StepProfiler(profile, run_dir)
    plan = setup.plan
    with contextlib.ExitStack() as held:
        on_first_process(lambda: held.enter_context(folders.lock_folder(run_dir)))
        on_first_process(lambda: check_or_write_config(experiment, plan))
        check_shared_file(run_dir / "config.json")
        on_first_process(lambda: check_or_write_data(experiment))
        index = jax.process_index()
        report = run_dir / (f"error-{index}.txt" if index else "error.txt")
        held.enter_context(traceback_file(report))
        watchdog = held.enter_context(Watchdog(experiment.stalled_minutes, report))
        checkpoints = held.enter_context(
            Checkpoints(run_dir / "checkpoints", experiment.keep, experiment.keep_every)
        )
        if (found := finished_state(checkpoints, experiment, plan.steps)) is not None:
            if index == 0:
                print(f"{run_dir} is finished; its results:", found.metrics, file=sys.stderr)
            return found.metrics
        held.enter_context(profiler)
        return _train(experiment, setup, checkpoints, profiler, goodput, watchdog)


def finished_state(
    checkpoints: Checkpoints, experiment: Experiment, steps: int
) -> LoopState | None:
    """Reads the last loop state of a run that came to its end; None for one that did not.

    Args:
        checkpoints: checkpoints of the run.
        experiment: current settings of the run.
        steps: length of the run in these settings.
    """
    saved = checkpoints.steps()
    if not saved:
        return None
    try:
        state = LoopState.from_meta(checkpoints.meta(saved[-1]), experiment.keep_best)
    except InputError:  # half a checkpoint; restoring falls back
        return None
    return state if state.is_finished(saved[-1], steps, experiment.patience) else None


def _train(
    e: Experiment,
    setup: Setup,
    checkpoints: Checkpoints,
    profiler: StepProfiler,
    goodput: Goodput,
    watchdog: Watchdog,
) -> dict[str, float]:
    @contextlib.contextmanager
    def compiling() -> Iterator[None]:
        with goodput.measure("compile"), watchdog.paused():
            yield

    task, loader, mesh = setup.task, setup.loader, setup.mesh
    run_dir, steps, main = as_path(e.run_dir), setup.plan.steps, jax.process_index() == 0
    init_key, train_key = jax.random.split(jax.random.key(e.seed))

    abstract = jax.eval_shape(task.init, init_key)
    placement = shardings(abstract, mesh)
    if main and (note := replicated_parameters_note(abstract.params, mesh)):
        print(note, file=sys.stderr)
    frozen = frozen_weights(task, run_dir)
    check_latents(task, frozen, loader.tokenizer_identity)
    frozen = put(frozen, shardings(frozen, mesh))
    evaluator = Evaluator(task, loader, frozen, mesh, e.batch_size, compiling)
    quality = None
    if e.fid.every:
        on_latents = loader.tokenizer_identity is not None
        quality = SampleQuality(
            e.fid, task, e.data, frozen, mesh, e.batch_size, run_dir, on_latents, compiling
        )
    if e.keep_best:
        names = evaluator.metric_names(abstract)
        if quality is not None and e.fid.every == e.eval_every:
            names += quality.metric_names(abstract)
        if parse_keep_best(e.keep_best)[0] not in names:
            raise InputError(f"keep_best is {e.keep_best!r}, but an evaluation gives {names}")

    loop_state = LoopState(e.keep_best)
    if (restored := checkpoints.restore(abstract, placement)) is not None:
        state, loop_state = restored[0], LoopState.from_meta(restored[1], e.keep_best)
    elif e.fork_from:
        state = forked_state(e.fork_from, abstract, placement)
    else:
        state = warm_start_state(task, e.init_from, init_key, placement)
    start = step = int(state.step)
    if step > steps:
        raise InputError(f"fork_from={e.fork_from}: has {step} steps, but this run ends at {steps}")
    jitted = jit_train_step(task, setup.plan, mesh, placement, e.skip_nonfinite > 0)
    train_step = FirstCall(jitted, compiling)
    batches = Prefetcher(loader.train(start), mesh, e.batch_size)
    throughput = ThroughputMeter(e.batch_size)

    with (
        Checkpoints(run_dir / "best", keep=1) as best,
        MetricWriter(run_dir, start, not loop_state.evaluation_due, main, e.wandb) as writer,
        ProgressReporter(start, steps, active=main) as progress,
        PreemptionGuard() as preemption,
    ):

        def log(step: int, metrics: dict[str, jax.Array]) -> None:
            numbers = flatten_metrics(jax.device_get(metrics))
            watchdog.progress()
            checkpoints.check()
            loop_state.count_step(skipped=numbers.pop(SKIPPED, 0.0) > 0)
            if loop_state.skipped_in_row == 1:
                progress.say(f"step {step} is left out, for its gradient is not finite")
            if not 0 < loop_state.skipped_in_row <= e.skip_nonfinite:
                _check_finite(step, numbers, checkpoints)
            if e.skip_nonfinite:
                numbers["skipped_steps"] = loop_state.skipped_steps
            if step == start + 1:
                progress.say(f"step {step} is done: loss {numbers.get('loss', math.nan):.4g}")
            if step % e.log_every == 0 or step == steps:
                numbers |= throughput.measure(step, batches.waited)
                writer.write(step, numbers | goodput.metrics())
                progress.show(step, numbers)
            elif step == start + 1:  # what the start took, should a kill come soon
                writer.write(step, goodput.metrics())

        def should_stop() -> bool:
            watchdog.progress()  # a batch was evaluated
            return preemption.should_stop()

        def due(every: int) -> bool:
            return every > 0 and step % every == 0

        def finished() -> bool:
            return loop_state.is_finished(step, steps, e.patience)

        def evaluate() -> bool:
            """Evaluates and previews where this step is due; returns whether it came to the end."""
            found: dict[str, float] = {}
            if evaluating := step == steps or due(e.eval_every):
                if (metrics := evaluator.metrics(state, should_stop)) is None:
                    return False
                found |= metrics
            if quality is not None and (step == steps or due(e.fid.every)):
                if (metrics := quality.metrics(state, should_stop)) is None:
                    return False
                found |= metrics
            if found:
                writer.write(step, found | goodput.metrics())
            if evaluating:
                if loop_state.update(found):
                    weights = dataclasses.replace(state, opt_state=None)
                    best.save(step, weights, {"keep_best": e.keep_best})
            if due(e.preview_every):
                preview()
            return True

        def preview() -> None:
            watchdog.progress()
            try:
                pictures = evaluator.preview(state)
            except OSError as error:  # only for watching, so that the run needs none
                progress.say(f"note: no preview after step {step}: {error}")
                return
            for name, images in pictures.items():
                writer.images(step, name, images)

        if start:
            progress.say(f"continuing {run_dir} after step {start}")
        progress.say(
            f"{len(loader.train_source):,} examples of {e.data.classes} classes, {steps:,} steps; "
            "the first one compiles the program, which may take minutes"
        )
        goodput.add(writer.earlier_goodput)
        if writer.earlier_goodput:  # those of lines that were dropped
            writer.write(start, goodput.metrics())
        watchdog.progress()
        goodput.begin("evaluate")
        if loop_state.evaluation_due and evaluate():  # made up for, after a signal
            loop_state.evaluation_due = False
            best.wait()
            writer.sync()
            checkpoints.rewrite_meta(step, loop_state.to_meta())
        goodput.begin("step")
        unlogged, stop = None, preemption.signalled()
        while not (stop or finished()):
            step += 1
            profiler.begin_step()
            with goodput.measure("data"):
                batch = next(batches)
            state, metrics = train_step(state, frozen, batch, train_key)
            profiler.end_step(metrics)
            if not throughput.step_flops:  # counted while the devices work
                throughput.step_flops = task.train_flops(abstract, frozen, batch)
            if unlogged:  # one step late, so that the devices are never without work
                log(*unlogged)
            unlogged = step, metrics

            stop = preemption.should_stop()
            evaluating = step == steps or any(
                due(every) for every in (e.eval_every, e.preview_every, e.fid.every)
            )
            saving = due(e.save_every) or due(e.keep_every)
            if not (stop or evaluating or saving):
                continue
            log(*unlogged)  # raises before anything that is not finite can be saved
            unlogged = None
            with throughput.paused(), goodput.measure("evaluate"):
                loop_state.evaluation_due = evaluating and (stop or not evaluate())
            watchdog.progress()
            stop = preemption.signalled()
            if stop or saving or finished():
                with throughput.paused(), goodput.measure("save"):
                    # What a checkpoint knows of must be there before it: lines, and a best one.
                    writer.sync()
                    best.wait()
                    checkpoints.save(step, state, loop_state.to_meta())
                watchdog.progress()
        if not finished():
            checkpoints.wait()
            progress.say(f"saved after step {step}; the same command continues from there")
            raise SystemExit(128 + (preemption.signum or 0))
        progress.say(f"finished {run_dir} at step {step}")
    return loop_state.metrics


def _check_finite(step: int, numbers: dict[str, float], checkpoints: Checkpoints) -> None:
    if bad := [name for name, number in numbers.items() if not math.isfinite(number)]:
        saved = checkpoints.steps()
        after = f"the checkpoint of step {saved[-1]} is good" if saved else "nothing was saved yet"
        raise NonFiniteMetricError(
            f"after step {step}, {bad} are not finite; {after}. "
            "Try a lower learning rate, a longer warm-up or stronger clipping in a new run_dir; "
            "where single steps do this, skip_nonfinite leaves them out"
        )
