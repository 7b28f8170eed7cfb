"""The training loop: input and output around a task's pure functions."""

import contextlib
import dataclasses
import math
import pathlib
import sys

import jax
from jax.sharding import Mesh

from varjax.core import files
from varjax.core.distributed import check_shared, from_first
from varjax.core.errors import InputError
from varjax.core.saved_steps import UNREADABLE
from varjax.core.trees import PyTree
from varjax.training.checkpoint import Checkpoints
from varjax.training.evaluate import Evaluator
from varjax.training.experiment import Experiment, Loader, record_config, record_data
from varjax.training.loop_state import Record
from varjax.training.metric_writers import MetricWriter, Progress, flatten
from varjax.training.preemption import Interrupt
from varjax.training.prefetch import Feed
from varjax.training.sharding import (
    left_whole,
    make_mesh,
    on_mesh,
    put,
    replicated,
    rows_of_process,
    shardings,
)
from varjax.training.task import Task, check_tokens
from varjax.training.throughput import Clock
from varjax.training.warm_start import initial_state


def run(experiment: Experiment) -> dict[str, float]:
    """Trains, or continues what is in `run_dir`; returns the metrics of the last evaluation.

    The same command continues a run after any kind of end, and then takes exactly the steps that
    an uninterrupted run takes. SIGINT and SIGTERM (with several processes only SIGTERM) save at
    once and exit with 128 + the signal's number; an evaluation that was due is made up for.
    Raises InputError for settings that make no sense or differ from the run's, and
    FloatingPointError, with nothing of it saved, when a metric is not finite.
    """
    experiment.check()
    run_dir = pathlib.Path(experiment.run_dir)
    mesh = make_mesh(experiment.mesh)
    rows = rows_of_process(mesh, experiment.batch_size)
    loader = experiment.data.make(experiment.batch_size, experiment.seed, rows)
    plan = experiment.plan(len(loader.train_source))
    task: Task = dataclasses.replace(experiment.task, plan=plan)  # type: ignore[type-var]
    task.check(experiment.data.image_shape, experiment.data.classes)
    from_first(lambda: record_config(experiment))
    check_shared(run_dir / "config.json")
    from_first(lambda: record_data(experiment))
    with contextlib.ExitStack() as held:
        from_first(lambda: held.enter_context(files.alone_in(run_dir)))
        checkpoints = held.enter_context(Checkpoints(run_dir / "checkpoints", experiment.keep))
        if (found := finished(checkpoints, experiment, plan.steps)) is not None:
            if jax.process_index() == 0:
                print(f"{run_dir} is finished; its results:", found.metrics, file=sys.stderr)
            return found.metrics
        return _train(experiment, task, loader, mesh, checkpoints)


def finished(checkpoints: Checkpoints, experiment: Experiment, steps: int) -> Record | None:
    """The record of a run that by these settings came to its end, else None."""
    saved = checkpoints.steps()
    if not saved:
        return None
    try:
        record = Record.of(checkpoints.meta(saved[-1]), experiment.keep_best)
    except UNREADABLE:  # half a checkpoint; restoring falls back
        return None
    return record if record.over(saved[-1], steps, experiment.patience) else None


def frozen_weights(task: Task, run_dir: pathlib.Path) -> PyTree:
    """The task's pretrained weights, in the run's own copy, which the first process makes once."""
    path = run_dir / "frozen.safetensors"

    def copy() -> None:
        if not path.exists() and jax.tree.leaves(tree := task.frozen()):
            files.write_tensors(path, tree, {})

    from_first(copy)
    return files.read_tensors(path)[0] if path.exists() else {}


def _train(
    e: Experiment, task: Task, loader: Loader, mesh: Mesh, checkpoints: Checkpoints
) -> dict[str, float]:
    run_dir, steps, main = pathlib.Path(e.run_dir), task.plan.steps, jax.process_index() == 0
    init_key, train_key = jax.random.split(jax.random.key(e.seed))

    abstract = jax.eval_shape(task.init, init_key)
    placement = shardings(abstract, mesh)
    if main and (note := left_whole(abstract.params, mesh)):
        print(note, file=sys.stderr)
    frozen = frozen_weights(task, run_dir)
    check_tokens(task, frozen, loader.tokenized_by)
    frozen = put(frozen, shardings(frozen, mesh))
    evaluator = Evaluator(task, loader, frozen, mesh, e.batch_size)
    if e.keep_best and e.keep_best not in (names := evaluator.names(abstract)):
        raise InputError(f"keep_best is {e.keep_best!r}, but an evaluation gives {names}")

    if (restored := checkpoints.restore(abstract, placement)) is None:
        state = initial_state(task, e.init_from, init_key, placement)
        record = Record(e.keep_best)
    else:
        state, record = restored[0], Record.of(restored[1], e.keep_best)
    start = step = int(state.step)
    train_step = jax.jit(
        on_mesh(task.train_step, mesh),
        out_shardings=(placement, replicated(mesh)),
        donate_argnums=0,
    )
    feed, clock = Feed(loader.train(start), mesh, e.batch_size), Clock(e.batch_size)

    with (
        Checkpoints(run_dir / "best", keep=1) as best,
        MetricWriter(run_dir, start, evaluated=not record.pending, active=main) as writer,
        Progress(start, steps, active=main) as progress,
        Interrupt() as interrupt,
    ):

        def log(step: int, metrics: dict[str, jax.Array]) -> None:
            numbers = flatten(jax.device_get(metrics))
            checkpoints.check()
            _check_finite(step, numbers, checkpoints)
            if step % e.log_every == 0 or step == steps:
                numbers |= clock.lap(step, feed.waited)
                writer.write(step, numbers)
                progress.show(step, numbers)

        def due(every: int) -> bool:
            return every > 0 and step % every == 0

        def look() -> bool:
            """Evaluates and previews, if this step is due for it; whether it came to the end."""
            if step == steps or due(e.eval_every):
                metrics = evaluator.metrics(state, interrupt.requested)
                if metrics is None:
                    return False
                writer.write(step, metrics)
                if record.improves(metrics):
                    weights = dataclasses.replace(state, opt_state=None)
                    best.save(step, weights, {"keep_best": e.keep_best})
            for name, images in evaluator.preview(state).items() if due(e.preview_every) else ():
                writer.images(step, name, images)
            return True

        if start:
            progress.say(f"continuing {run_dir} after step {start}")
        if record.pending:
            record.pending = not look()
        unlogged, stop = None, interrupt.noted()
        while not (stop or record.over(step, steps, e.patience)):
            step += 1
            state, metrics = train_step(state, frozen, batch := next(feed), train_key)
            if not clock.step_flops:  # counted while the devices work
                clock.step_flops = task.train_flops(abstract, frozen, batch)
            if unlogged:  # one step late, so that the devices are never without work
                log(*unlogged)
            unlogged = step, metrics

            stop = interrupt.requested()
            looking = step == steps or due(e.eval_every) or due(e.preview_every)
            if not (stop or looking or due(e.save_every)):
                continue
            log(*unlogged)  # raises before anything that is not finite can be saved
            unlogged = None
            with clock.paused():
                record.pending = looking and (stop or not look())
                stop = interrupt.noted()
                if stop or due(e.save_every) or record.over(step, steps, e.patience):
                    best.wait()  # a checkpoint that knows of a best one must not be there before it
                    checkpoints.save(step, state, dataclasses.asdict(record))
        if not record.over(step, steps, e.patience):
            checkpoints.wait()
            progress.say(f"saved after step {step}; the same command continues from there")
            raise SystemExit(128 + (interrupt.signum or 0))
        progress.say(f"finished {run_dir} at step {step}")
    return record.metrics


def _check_finite(step: int, numbers: dict[str, float], checkpoints: Checkpoints) -> None:
    if bad := [name for name, number in numbers.items() if not math.isfinite(number)]:
        saved = checkpoints.steps()
        after = f"the checkpoint of step {saved[-1]} is good" if saved else "nothing was saved yet"
        raise FloatingPointError(
            f"after step {step}, {bad} are not finite; {after}. "
            "Try a lower learning rate, a longer warm-up or stronger clipping in a new run_dir"
        )
