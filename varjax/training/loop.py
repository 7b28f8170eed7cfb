"""The training loop: input and output around a task's pure functions."""

import contextlib
import dataclasses

import jax

from varjax.errors import InputError, error_file
from varjax.runtime.distributed import check_shared_file, on_first_process
from varjax.runtime.messages import say
from varjax.storage import files, folders
from varjax.storage.buckets import as_path
from varjax.training.checkpoint import Checkpoints
from varjax.training.experiment import Due, Experiment
from varjax.training.goodput import Goodput
from varjax.training.loop_state import LoopState, check_keep_best
from varjax.training.previews import preview_captions
from varjax.training.results import results_line, results_table
from varjax.training.run_dir import (
    check_config,
    check_or_write_data,
    forget_start,
    is_bound,
    write_config,
)
from varjax.training.run_writers import preview_path
from varjax.training.setup import Run, set_up, start_run
from varjax.training.step_profiler import StepProfiler
from varjax.training.task import TrainState
from varjax.training.watchdog import Watchdog


def train(experiment: Experiment, profile: str = "") -> dict[str, float]:
    """Trains, or continues the run in `run_dir`.

    A run is bound to its settings and data from its first checkpoint on; before, they may change.
    The same command continues a run that ended in any way, and then takes exactly the steps that an
    uninterrupted run takes. SIGINT and SIGTERM (with several processes only SIGTERM) save at once
    and exit with 128 + the signal's number; the next start makes up for an evaluation that was due.
    The error of a start whose settings and data were accepted is also written to
    <run_dir>/error.txt, with the traceback if it was unexpected, until a later start saves. A run
    without progress for `stalled_minutes` ends the process (`Watchdog`).

    Args:
        experiment: settings of the run.
        profile: steps to trace, for `StepProfiler`; "" for none.

    Returns:
        The metrics of the last evaluation.

    Raises:
        InputError: settings that are invalid or differ from the run's.
        NonFiniteMetricError: a metric is not finite, in a step that `skip_nonfinite` does not skip;
            nothing of that step is saved.
        StorageError: the run's files cannot be written.
    """
    goodput = Goodput()
    setup = set_up(experiment)
    experiment = setup.experiment
    run_dir = as_path(experiment.run_dir)
    profiler = StepProfiler(profile, run_dir)
    with contextlib.ExitStack() as stack:
        on_first_process(lambda: stack.enter_context(folders.lock_folder(run_dir)))
        if on_first_process(lambda: is_bound(run_dir) and files.exists(run_dir / "config.json")):
            # `start_run` writes the settings, once nothing can refuse them any more.
            on_first_process(lambda: check_config(experiment))
        else:
            on_first_process(lambda: forget_start(experiment))
            on_first_process(lambda: write_config(experiment, setup.plan))
        check_shared_file(run_dir / "config.json")
        on_first_process(lambda: check_or_write_data(experiment))
        index = jax.process_index()
        report = run_dir / (f"error-{index}.txt" if index else "error.txt")
        stack.enter_context(error_file(report))
        watchdog = stack.enter_context(Watchdog(experiment.stalled_minutes, report))
        checkpoints = stack.enter_context(
            Checkpoints(run_dir / "checkpoints", experiment.keep, experiment.keep_every)
        )
        finished = finished_state(checkpoints, experiment, setup.plan.steps)
        if finished is not None:
            check_keep_best(experiment.keep_best, finished.metrics)
            on_first_process(lambda: write_config(experiment, setup.plan))
            if index == 0:
                say(f"{run_dir} is finished\n{results_table(finished.metrics)}")
            return finished.metrics
        stack.enter_context(profiler)
        run, state = start_run(setup, stack, checkpoints, profiler, goodput, watchdog, report)
        return take_steps(run, state)


def take_steps(run: Run, state: TrainState) -> dict[str, float]:
    """Takes the steps that are left; returns the metrics of the last evaluation.

    Raises SystemExit if a signal stopped the run, once its state is saved.
    """
    step, loop_state, preemption = int(state.step), run.loop_state, run.preemption
    run.watchdog.progress()
    run.goodput.begin("step")
    if loop_state.evaluation_due:
        make_up_evaluation(run, step, state)
    stop = preemption.signalled()
    while not (stop or run.is_finished(step)):
        step += 1
        with run.goodput.measure("data"):
            batch = next(run.batches)
        state, metrics = run.train_step(state, run.frozen, batch, run.train_key)
        run.reporter.push(step, metrics)  # reports the step before
        stop = preemption.should_stop()
        due = run.due(step)
        if not (stop or due.evaluation or due.save):
            continue
        run.reporter.flush()  # raises before a state that is not finite can be saved
        with run.measure("evaluate"):
            done = not stop and evaluate_state(run, step, state, due)
            loop_state.evaluation_due = due.evaluation and not done
        stop = preemption.signalled()
        if stop or due.save or run.is_finished(step):
            with run.measure("save"):
                save_step(run, step, state)
    if not run.is_finished(step):
        run.checkpoints.wait()
        run.progress.say(f"saved after step {step}; the same command continues from there")
        raise SystemExit(128 + (preemption.signum or 0))
    run.progress.say(f"finished {run.experiment.run_dir} at step {step:,}")
    run.progress.say(results_table(loop_state.metrics))
    return loop_state.metrics


def make_up_evaluation(run: Run, step: int, state: TrainState) -> None:
    """Makes up for an evaluation that a signal prevented, and completes the checkpoint with it."""
    with run.measure("evaluate"):
        if evaluate_state(run, step, state, run.due(step)):
            run.loop_state.evaluation_due = False
            run.best.wait()
            run.writer.sync()
            run.checkpoints.rewrite_meta(step, run.loop_state.to_meta())


def evaluate_state(run: Run, step: int, state: TrainState, due: Due) -> bool:
    """Evaluates and previews what is due; returns False if a signal interrupted it."""
    metrics: dict[str, float] = {}
    for wanted, evaluator in ((due.metrics, run.evaluator), (due.fid, run.fid)):
        if wanted and evaluator is not None:
            part = evaluator.metrics(state, run.should_stop)
            if part is None:
                return False
            metrics |= part
    if metrics:
        run.writer.write(step, metrics | run.goodput.metrics())
    best = due.metrics and run.loop_state.update(metrics)
    if metrics:
        words = results_line(metrics, run.reporter.last_loss)
        run.progress.say(f"evaluation after step {step:,}: {words}{'; the best so far' * best}")
    if best:
        weights = dataclasses.replace(state, opt_state=None)
        # Orbax numbers the writes of a process, of whichever directory, and processes wait for one
        # another by that number. So one write ends before the next begins.
        run.checkpoints.wait()
        run.best.save(step, weights, {"keep_best": run.experiment.keep_best})
    if due.preview:
        preview(run, step, state)
    return True


def preview(run: Run, step: int, state: TrainState) -> None:
    """Writes previews; only prints a note if images cannot be read."""
    run.watchdog.progress()
    try:
        pictures = run.evaluator.preview(state)
    except OSError as error:
        run.progress.say(f"note: no preview after step {step}: {error}")
        return
    for name, images in pictures.items():
        captions = preview_captions(
            run.experiment.run_dir, step, name, images.shape, run.class_names
        )
        run.writer.images(step, name, images, captions)
    run.progress.say(f"pictures: {preview_path(as_path(run.experiment.run_dir), step, '*')}")


def save_step(run: Run, step: int, state: TrainState) -> None:
    """Saves a checkpoint, after the lines and best weights that it refers to."""
    run.writer.sync()
    run.best.wait()
    run.checkpoints.save(step, state, run.loop_state.to_meta())
    remove_reports(run)


def remove_reports(run: Run) -> None:
    """Removes the errors of an earlier start, also of processes that no longer exist."""
    run.report.unlink(missing_ok=True)
    if jax.process_index() == 0:
        for path in run.report.parent.glob("error-*.txt"):
            number = path.stem.removeprefix("error-")
            if number.isdecimal() and int(number) >= jax.process_count():
                path.unlink(missing_ok=True)


def finished_state(
    checkpoints: Checkpoints, experiment: Experiment, steps: int
) -> LoopState | None:
    """Reads the last loop state of a finished run; None if the run is not finished.

    Args:
        checkpoints: checkpoints of the run.
        experiment: current settings of the run.
        steps: length of the run in these settings.
    """
    saved = checkpoints.steps()
    if not saved:
        return None
    try:
        meta = checkpoints.meta(saved[-1])
        state = LoopState.from_meta(meta, experiment.keep_best, experiment.best_settings())
    except InputError:  # a damaged checkpoint; restoring falls back to an older one
        return None
    return state if state.is_finished(saved[-1], steps, experiment.patience) else None
