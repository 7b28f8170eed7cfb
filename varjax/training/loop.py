"""The training loop: input and output around a task's pure functions."""

import dataclasses
import math
import pathlib
import sys

import jax
from jax.sharding import Mesh

from varjax import files
from varjax.training.checkpoint import Checkpoints
from varjax.training.evaluate import Evaluator
from varjax.training.experiment import Experiment, Loader, record_config
from varjax.training.feed import Feed
from varjax.training.interrupt import Interrupt
from varjax.training.metrics import Clock, MetricWriter, Progress, flatten
from varjax.training.sharding import make_mesh, over_batch, replicated, shardings
from varjax.training.task import PyTree, Task


@dataclasses.dataclass
class Record:
    """What the loop itself remembers over a restart, stored as a checkpoint's `meta`."""

    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # the last evaluation
    best: float | None = None
    stale: int = 0  # evaluations since the best one
    done: bool = False

    def improves(self, metrics: dict[str, float], name: str) -> bool:
        """Takes note of an evaluation; whether its `name` is the lowest so far."""
        if name not in metrics:
            raise ValueError(f"keep_best is {name!r}, but an evaluation gives {sorted(metrics)}")
        value = metrics[name]
        better = math.isfinite(value) and (self.best is None or value < self.best)
        self.best, self.stale = (value, 0) if better else (self.best, self.stale + 1)
        return better


def run(experiment: Experiment) -> dict[str, float]:
    """Trains, or continues what is in `run_dir`; returns the metrics of the last evaluation.

    The same command continues a run after any kind of end, and then takes exactly the steps that
    an uninterrupted run takes. SIGINT and SIGTERM save and exit with 128 + the signal's number.
    Raises ValueError for settings that make no sense or differ from the run's, and
    FloatingPointError, with nothing of it saved, when a metric is not finite.
    """
    experiment.check()
    run_dir = pathlib.Path(experiment.run_dir)
    loader = experiment.data.make(
        experiment.batch_size, experiment.seed, jax.process_index(), jax.process_count()
    )
    plan = experiment.plan(len(loader.train_source))
    task: Task = dataclasses.replace(experiment.task, plan=plan)  # type: ignore[type-var]
    mesh = make_mesh(experiment.mesh)
    if experiment.batch_size % (parts := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ValueError(
            f"batch_size {experiment.batch_size} does not divide over {parts} devices"
            f" ({experiment.mesh}); choose a multiple"
        )
    record_config(experiment, write=jax.process_index() == 0)
    with Checkpoints(run_dir / "checkpoints", experiment.keep) as checkpoints:
        if (found := finished(checkpoints)) is not None:
            print(f"{run_dir} is finished; its results:", found.metrics, file=sys.stderr)
            return found.metrics
        return _train(experiment, task, loader, mesh, checkpoints)


def finished(checkpoints: Checkpoints) -> Record | None:
    """The record of a run that came to its end, else None."""
    steps = checkpoints.steps()
    try:
        record = Record(**checkpoints.meta(steps[-1])) if steps else Record()
    except (ValueError, KeyError, OSError):  # half a checkpoint; restoring falls back
        return None
    return record if record.done else None


def frozen_weights(task: Task, run_dir: pathlib.Path) -> PyTree:
    """The task's pretrained weights: from the task at first, then from the run's own copy."""
    path = run_dir / "frozen.safetensors"
    if path.exists():
        return files.read_tensors(path)[0]
    tree = task.frozen()
    if jax.tree.leaves(tree) and jax.process_index() == 0:
        files.write_tensors(path, tree, {})
    return tree


def _train(
    e: Experiment, task: Task, loader: Loader, mesh: Mesh, checkpoints: Checkpoints
) -> dict[str, float]:
    run_dir, steps, main = pathlib.Path(e.run_dir), task.plan.steps, jax.process_index() == 0
    init_key, train_key, preview_key = jax.random.split(jax.random.key(e.seed), 3)

    abstract = jax.eval_shape(task.init, init_key)
    placement = shardings(abstract, mesh)
    restored = checkpoints.restore(abstract, placement)
    if restored is None:
        state = jax.jit(task.init, out_shardings=placement)(init_key)
        start, record = 0, Record()
    else:
        state, start, record = restored[0], restored[1]["position"], Record(**restored[2])

    frozen = frozen_weights(task, run_dir)
    frozen = jax.device_put(frozen, shardings(frozen, mesh))
    train_step = jax.jit(
        task.train_step, out_shardings=(placement, replicated(mesh)), donate_argnums=0
    )
    evaluator = Evaluator(task, loader, frozen, mesh)
    feed = Feed(loader.train(start), over_batch(mesh), start)
    clock = Clock(e.batch_size)

    with (
        Checkpoints(run_dir / "best", keep=1) as best,
        MetricWriter(run_dir, start, active=main) as writer,
        Progress(start, steps, active=main) as progress,
        Interrupt() as interrupt,
    ):

        def log(step: int, metrics: dict[str, jax.Array]) -> None:
            numbers = flatten(jax.device_get(metrics))
            _check_finite(step, numbers, checkpoints)
            if step % e.log_every == 0 or step == steps:
                numbers |= clock.lap(step, feed.waited)
                writer.write(step, numbers)
                progress.show(step, numbers)

        if start:
            progress.say(f"continuing {run_dir} after step {start}")
        pending = None
        for step in range(start + 1, steps + 1):
            state, metrics = train_step(state, frozen, next(feed), train_key)
            if pending:  # one step late, so that the devices are never without work
                log(*pending)
            pending = step, metrics

            last, stop = step == steps, interrupt.requested(step)
            evaluating, previewing, saving = (
                every > 0 and step % every == 0
                for every in (e.eval_every, e.preview_every, e.save_every)
            )
            if not (last or stop or evaluating or previewing or saving):
                continue
            log(*pending)  # raises before anything that is not finite can be saved
            pending = None
            with clock.paused():
                if evaluating or last:
                    record.metrics = evaluator.metrics(state)
                    writer.write(step, record.metrics)
                    if e.keep_best and record.improves(record.metrics, e.keep_best):
                        best.save(step, state, meta=dataclasses.asdict(record))
                record.done = last or 0 < e.patience <= record.stale
                if previewing:
                    for name, images in evaluator.preview(state, preview_key).items():
                        writer.images(step, name, images)
                if saving or stop or record.done:
                    data, meta = {"position": feed.position}, dataclasses.asdict(record)
                    checkpoints.save(step, state, data, meta)
            if record.done:
                progress.say(f"finished {run_dir} at step {step}")
                break
            if stop:
                checkpoints.wait()
                progress.say(f"saved after step {step}; the same command continues from there")
                raise SystemExit(128 + (interrupt.signum or 0))
    return record.metrics


def _check_finite(step: int, numbers: dict[str, float], checkpoints: Checkpoints) -> None:
    if bad := [name for name, number in numbers.items() if not math.isfinite(number)]:
        saved = checkpoints.steps()
        after = f"the checkpoint of step {saved[-1]} is good" if saved else "nothing was saved yet"
        raise FloatingPointError(
            f"after step {step}, {bad} are not finite; {after}. "
            "Try a lower learning rate, a longer warm-up or stronger clipping in a new run_dir"
        )
