"""Sets up a run: checks and data first, then weights and state, then everything that writes."""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import Mesh

from varjax.checkpoints.class_names import ClassNames, known_class_names
from varjax.config import config_tree
from varjax.data.loader import Loader
from varjax.data.sources import Folder
from varjax.errors import InputError
from varjax.runtime.distributed import on_first_process
from varjax.runtime.first_call import FirstCall, announce_compilation
from varjax.runtime.messages import say
from varjax.storage.buckets import as_path
from varjax.training.checkpoint import Checkpoints
from varjax.training.evaluator import Evaluator
from varjax.training.experiment import Due, Experiment
from varjax.training.fid_evaluation import FIDEvaluator
from varjax.training.goodput import Goodput, ThroughputMeter
from varjax.training.initial_weights import (
    first_frozen_weights,
    forked_state,
    frozen_weights,
    warm_start_state,
)
from varjax.training.loop_state import LoopState, check_keep_best
from varjax.training.metric_writers import MetricWriter
from varjax.training.preemption import PreemptionGuard
from varjax.training.progress import ProgressReporter
from varjax.training.reporter import StepReporter
from varjax.training.run_dir import check_same_data, is_bound, write_config
from varjax.training.sharding import (
    Prefetcher,
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
from varjax.training.train_step import StepFn, skip_nonfinite_updates
from varjax.training.watchdog import Watchdog
from varjax.trees import PyTree

MANY_PASSES = 200  # over the training images
# Published recipes make 200 to 800 passes over ImageNet's 1.28 million images.
MANY_IMAGES = 1_000_000


@dataclasses.dataclass(frozen=True)
class Setup:
    """Holds the parts of a run, after all checks that need no computation.

    Attributes:
        experiment: settings of the run, on the tokenizer of `init_from` where that applies.
        plan: length of the run.
        loader: loader of this process's rows.
        mesh: mesh of all devices.
    """

    experiment: Experiment
    plan: Plan
    loader: Loader
    mesh: Mesh


def set_up(experiment: Experiment) -> Setup:
    """Makes the mesh and opens the data of a run; writes nothing but notes on stderr.

    Raises InputError for settings that are invalid or do not fit together.
    """
    experiment.check()
    experiment = with_starting_tokenizer(experiment)
    if isinstance(experiment.data, Folder):
        experiment.data.check_outside("run_dir", as_path(experiment.run_dir))
    mesh = make_mesh(experiment.mesh)
    rows = rows_of_process(mesh, experiment.batch_size).tolist()
    loader = experiment.data.make(experiment.batch_size, experiment.seed, rows)
    loader = dataclasses.replace(loader, held_out_images=experiment.eval_images)
    check_same_data(experiment, len(loader.train_source))
    plan = experiment.plan(len(loader.train_source))
    task = experiment.task
    task.check(experiment.data.image_shape, experiment.data.classes)
    check_batch_size(mesh, experiment.batch_size, task.accumulate)
    ema = getattr(task, "ema_decay", 0.0) > 0
    notes = list(task.notes(plan))
    if not experiment.patience:
        adversarial = getattr(task, "gan", None) is not None
        notes += passes_notes(plan, len(loader.train_source), ema, adversarial)
    for note in notes if jax.process_index() == 0 else ():
        say(f"note: {note}")
    return Setup(experiment, plan, loader, mesh)


def with_starting_tokenizer(experiment: Experiment) -> Experiment:
    """Returns `Experiment.with_init_tokenizer`, and prints which tokenizer a new run trains on.

    Raises InputError as that does, but not for a run with a checkpoint, which has its own copy.
    """
    if not (start := experiment.init_from):
        return experiment
    bound = on_first_process(lambda: is_bound(as_path(experiment.run_dir)))
    try:
        changed = experiment.with_init_tokenizer()
    except InputError:
        if bound:
            return experiment
        raise
    named, used = (
        config_tree.to_dict(e.task).get("tokenizer_weights") for e in (experiment, changed)
    )
    if bound or not named or jax.process_index():
        return changed
    if used != named:
        say(
            f"the tokenizer is that of init_from={start}, not {named}; to train on the latter, set "
            "init_tokenizer=false"
        )
    elif not experiment.init_tokenizer:
        say(
            f"note: the tokenizer is {named}, because init_tokenizer is false; unless "
            f"init_from={start} was trained on it, the model has to learn other tokens"
        )
    elif used != start:
        say(f"the tokenizer is {named}; init_from={start} has the same one, or none")
    return changed


def passes_notes(
    plan: Plan, images: int, ema: bool = False, adversarial: bool = False
) -> list[str]:
    """Returns a note if a run sees the same few images hundreds of times.

    Args:
        plan: length of the run.
        images: number of training images.
        ema: whether the run keeps EMA weights, which samples come from.
        adversarial: whether the task trains a discriminator, whose loss an evaluation lacks.
    """
    passes = plan.steps * plan.batch_size / images
    if passes < MANY_PASSES or images >= MANY_IMAGES:
        return []
    steps = math.ceil(MANY_PASSES / 4 * images / plan.batch_size)
    every = max(1, min(500, plan.steps // 10))  # patience counts evaluations, so it needs several
    loss = "eval_ema/loss" if ema else "eval/loss"
    best = (
        f" keep_best={loss} patience=5 keeps the best weights and ends the run when they no "
        "longer improve"
    )
    # A discriminator makes the other losses worse, so the best would be from before its start.
    end = "" if adversarial else best
    return [
        f"the run has {passes:,.0f} epochs of {images:,} training images, so the model may "
        f"memorize them. Compare the loss with that of held-out images: eval_every={every}{end}. "
        f"{MANY_PASSES // 4} epochs are {steps:,} steps"
    ]


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
        on_mesh(step, mesh), out_shardings=(placement, replicated(mesh)), donate_argnums=0
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """Holds everything that the steps of a run need, and what observes them.

    Attributes:
        experiment: settings of the run.
        steps: length of the run in updates.
        train_step: compiled step: (state, frozen, batch, key) -> (state, metrics).
        train_key: random key of all steps.
        frozen: pretrained weights of the task, on the mesh.
        batches: training batches, on the mesh.
        evaluator: evaluation on held-out images, and previews.
        fid: FID of samples; None if it is not measured.
        class_names: names of the classes, for pictures.
        loop_state: best and last evaluation; the only part that changes from step to step.
        checkpoints: checkpoints of the run.
        best: weights of the best evaluation.
        writer: writer of metrics and pictures.
        reporter: reports each step.
        progress: progress on the terminal.
        preemption: signals that ask the run to stop.
        goodput: measures what the time is spent on.
        watchdog: ends a run without progress.
        report: file of the error of an earlier start, which is outdated once something is saved.
    """

    experiment: Experiment
    steps: int
    train_step: StepFn
    train_key: jax.Array
    frozen: PyTree
    batches: Prefetcher
    evaluator: Evaluator
    fid: FIDEvaluator | None
    class_names: ClassNames
    loop_state: LoopState
    checkpoints: Checkpoints
    best: Checkpoints
    writer: MetricWriter
    reporter: StepReporter
    progress: ProgressReporter
    preemption: PreemptionGuard
    goodput: Goodput
    watchdog: Watchdog
    report: pathlib.Path

    def due(self, step: int) -> Due:
        """Returns what is due once `step` updates are done."""
        return self.experiment.due(step, self.steps)

    def is_finished(self, step: int) -> bool:
        """Returns whether the run ends with this step, with its evaluation done."""
        return self.loop_state.is_finished(step, self.steps, self.experiment.patience)

    def should_stop(self) -> bool:
        """Returns whether a signal asks the run to stop; the same in all processes."""
        self.watchdog.progress()
        return self.preemption.should_stop()

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Counts the time inside as `kind`; its end is progress."""
        with self.goodput.measure(kind):
            yield
        self.watchdog.progress()


def start_run(
    setup: Setup,
    stack: contextlib.ExitStack,
    checkpoints: Checkpoints,
    profiler: StepProfiler,
    goodput: Goodput,
    watchdog: Watchdog,
    report: pathlib.Path,
) -> tuple[Run, TrainState]:
    """Reads or makes the first state of this start, and opens everything that the run writes.

    Args:
        setup: settings, plan, data and mesh.
        stack: closes what is opened here.
        checkpoints: checkpoints of the run.
        profiler: traces some steps.
        goodput: measures what the time is spent on.
        watchdog: ends a run without progress.
        report: file of the errors of this process.
    """
    experiment, plan, loader, mesh = setup.experiment, setup.plan, setup.loader, setup.mesh
    task = experiment.task
    run_dir, main = as_path(experiment.run_dir), jax.process_index() == 0
    init_key, train_key = jax.random.split(jax.random.key(experiment.seed))

    @contextlib.contextmanager
    def compiling(program: str) -> Iterator[None]:
        with goodput.measure("compile"), watchdog.paused(), announce_compilation(program):
            yield

    # Shapes and shardings, before anything is allocated.
    abstract = jax.eval_shape(task.init, init_key)
    placement = shardings(abstract, mesh)
    if main and (note := replicated_parameters_note(abstract.params, mesh)):
        say(note)
    read = functools.partial(first_frozen_weights, experiment)
    frozen = frozen_weights(read, run_dir, bound=bool(checkpoints.steps()))
    check_latents(task, frozen, loader.tokenizer_identity)
    frozen = put(frozen, shardings(frozen, mesh))

    evaluator, fid = make_evaluators(setup, abstract, frozen, compiling)
    if fid is not None:
        fid.read_reference()

    # The state: the run's own, another run's, or a new one.
    best_settings = experiment.best_settings()
    loop_state = LoopState(experiment.keep_best, measured_with=best_settings)
    if (restored := checkpoints.restore(abstract, placement)) is not None:
        state, meta = restored
        loop_state = LoopState.from_meta(meta, experiment.keep_best, best_settings)
    else:
        state = first_state(setup, abstract, init_key, placement)
    start = int(state.step)
    on_first_process(lambda: write_config(experiment, plan))

    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    throughput = ThroughputMeter(experiment.batch_size, parameters)
    compiled = FirstCall(
        jit_train_step(task, plan, mesh, placement, experiment.skip_nonfinite > 0),
        lambda: compiling("the training step"),
    )

    def train_step(state: TrainState, frozen: PyTree, batch: Any, key: jax.Array) -> Any:
        profiler.begin_step()
        state, metrics = compiled(state, frozen, batch, key)
        profiler.end_step(metrics)
        if not throughput.step_flops:  # counted while the devices work
            throughput.step_flops = task.train_flops(abstract, frozen, batch)
        return state, metrics

    # What writes.
    best = stack.enter_context(Checkpoints(run_dir / "best", keep=1))
    writer = stack.enter_context(
        MetricWriter(run_dir, start, not loop_state.evaluation_due, main, experiment.wandb)
    )
    progress = stack.enter_context(ProgressReporter(start, plan.steps, active=main))
    preemption = stack.enter_context(PreemptionGuard())
    if start:
        progress.say(f"continuing {run_dir} after step {start}")
    progress.say(
        f"{len(loader.train_source):,} examples of {experiment.data.classes} classes, "
        f"{plan.steps:,} steps, on {mesh.size} × {mesh.devices.flat[0].device_kind}"
    )
    goodput.add(writer.earlier_goodput)
    if writer.earlier_goodput:  # sums of lines that were dropped
        writer.write(start, goodput.metrics())
    reporter = StepReporter(
        start=start,
        steps=plan.steps,
        log_every=experiment.log_every,
        skip_nonfinite=experiment.skip_nonfinite,
        loop_state=loop_state,
        checkpoints=checkpoints,
        writer=writer,
        progress=progress,
        throughput=throughput,
        goodput=goodput,
        watchdog=watchdog,
    )
    run = Run(
        experiment=experiment,
        steps=plan.steps,
        train_step=train_step,
        train_key=train_key,
        frozen=frozen,
        batches=Prefetcher(loader.train(start), mesh, experiment.batch_size),
        evaluator=evaluator,
        fid=fid,
        class_names=known_class_names(experiment.data.describe()["class_names"] if main else ()),
        loop_state=loop_state,
        checkpoints=checkpoints,
        best=best,
        writer=writer,
        reporter=reporter,
        progress=progress,
        preemption=preemption,
        goodput=goodput,
        watchdog=watchdog,
        report=report,
    )
    return run, state


def make_evaluators(
    setup: Setup,
    abstract: TrainState,
    frozen: PyTree,
    compiling: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> tuple[Evaluator, FIDEvaluator | None]:
    """Makes what evaluates a run; FID's is None if the run does not measure it.

    Args:
        setup: settings, data and mesh.
        abstract: shapes of the train state.
        frozen: the task's pretrained weights, on the mesh.
        compiling: function of a computation's name that makes a context for its first use.

    Raises:
        InputError: FID cannot be measured, or `keep_best` names a metric that an evaluation lacks.
    """
    experiment, mesh = setup.experiment, setup.mesh
    task, batch_size = experiment.task, experiment.batch_size
    evaluator = Evaluator(task, setup.loader, frozen, mesh, batch_size, compiling)
    names, fid = evaluator.metric_names(abstract), None
    if experiment.fid.every:
        fid = FIDEvaluator(
            experiment.fid,
            task,
            experiment.data,
            frozen,
            mesh,
            batch_size,
            as_path(experiment.run_dir),
            on_latents=setup.loader.tokenizer_identity is not None,
            compiling=compiling,
        )
        if experiment.fid.every == experiment.eval_every:
            names += fid.metric_names(abstract)
    check_keep_best(experiment.keep_best, names)
    return evaluator, fid


def first_state(
    setup: Setup, abstract: TrainState, key: jax.Array, placement: TrainState
) -> TrainState:
    """Makes the state with which a run starts that has no checkpoint: another run's, or a new one.

    Args:
        setup: settings, with `fork_from` and `init_from`, and plan.
        abstract: shapes of the state.
        key: random key for new parameters.
        placement: a sharding for each array of the state.

    Raises:
        InputError: the other run's state or parameters cannot be used.
    """
    experiment = setup.experiment
    if not experiment.fork_from:
        return warm_start_state(experiment.task, experiment.init_from, key, placement)
    state = forked_state(experiment.fork_from, abstract, placement)
    if (start := int(state.step)) >= setup.plan.steps:
        raise InputError(
            f"fork_from={experiment.fork_from}: has {start} steps, and this run ends at "
            f"{setup.plan.steps}; make it longer"
        )
    return state
