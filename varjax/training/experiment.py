"""The settings of a training run, and what is due after each of its steps."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from varjax.config import config_tree
from varjax.config.numbers import finite_number, seed_number, whole_number
from varjax.data.loader import Loader
from varjax.data.sources import replaced_dataset
from varjax.data.stream import Dataset
from varjax.errors import InputError
from varjax.storage.buckets import in_bucket
from varjax.training.fid_evaluation import FID_METRICS, HELD_OUT, FIDConfig
from varjax.training.loop_state import parse_keep_best
from varjax.training.run_writers import check_wandb
from varjax.training.sharding import MeshShape
from varjax.training.task import Plan, Task
from varjax.training.train_step import check_microbatches


class LoadableDataset(Dataset, Protocol):
    """A dataset that makes the loader of its batches."""

    def make(self, batch_size: int, seed: int, rows: Sequence[int] | None = None) -> Loader:
        """Makes the loader, as `varjax.data.loader.make_loader` does."""
        ...


class Due(NamedTuple):
    """Names what is due after a step.

    Attributes:
        metrics: evaluation on held-out images.
        fid: FID of samples.
        preview: pictures of the model's output.
        save: a checkpoint of the run.
    """

    metrics: bool
    fid: bool
    preview: bool
    save: bool

    @property
    def evaluation(self) -> bool:
        """Returns whether an evaluation or a preview is due."""
        return self.metrics or self.fid or self.preview


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Configures a training run.

        loop.train(Experiment(task, data, "runs/first", batch_size=256, epochs=10))

    Fields named `*_every` are in steps; 0 means never (log_every is at least 1). The run also
    evaluates and saves at its end.

    Attributes:
        task: task to train, with its model and optimizer.
        data: dataset to train on; on the command line folder:DIR, idx:DIR, tfds:NAME …, and fields
            of it after commas, such as folder:DIR,held_out=0.1.
        run_dir: folder for everything that the run writes.
        batch_size: images in a step, over all devices.
        steps: length of the run in updates; 0 if `epochs` gives it.
        epochs: length of the run in passes over the training images; 0 if `steps` gives it.
        seed: random seed of parameters, data order, augmentation and dropout.
        init_from: run or converted directory whose parameters initialize this run, as far as they
            fit (`warm_start_state`); "" for random parameters. Ignored once the run has a
            checkpoint.
        init_tokenizer: whether a transformer that starts from init_from also takes the tokenizer
            that init_from was trained on, instead of task.tokenizer_weights.
        fork_from: RUN or RUN@STEP whose whole state, with optimizer and step, this run continues
            (`forked_state`), to make it longer or to change the batch size, data or learning rate.
            "" for none. Ignored once the run has a checkpoint.
        mesh: how arrays and batches are sharded over the devices.
        log_every: steps between two lines of training metrics.
        eval_every: steps between two evaluations on held-out images.
        eval_images: largest number of held-out images in an evaluation, always the same ones,
            spread over the classes; 0 for all.
        save_every: steps between two checkpoints.
        preview_every: steps between two previews, which are pictures of the model's output.
        keep: number of most recent checkpoints to keep.
        keep_every: steps between two checkpoints that are kept for good, in addition to `keep`; 0
            for none.
        keep_best: evaluation metric such as "eval/loss" or "eval_ema/loss"; the weights with its
            best value are kept in <run_dir>/best. Lower is better, except for accuracy, psnr, ssim,
            inception_score, usage and perplexity (of codes); "max:NAME" or "min:NAME" sets the
            direction for any metric. "" for none.
        patience: number of evaluations in a row without improvement that end the run; 0 for never.
        fid: FID and Inception Score of samples, measured during training.
        wandb: project of Weights & Biases, NAME or ENTITY/NAME, that also gets the run's logs; ""
            for none. Requires the package wandb.
        stalled_minutes: minutes without progress (a step, a batch of an evaluation, a save) after
            which the process exits with code 75, so that a scheduler starts it again; 0 for never.
            Compiling does not count.
        skip_nonfinite: number of updates in a row that may be skipped because a gradient is not
            finite; one more ends the run. 0 skips none.
    """

    task: Task
    data: LoadableDataset = dataclasses.field(metadata={"parse": replaced_dataset})
    run_dir: str
    batch_size: int
    steps: int = 0
    epochs: float = 0.0
    seed: int = 0
    init_from: str = ""
    init_tokenizer: bool = True
    fork_from: str = ""
    mesh: MeshShape = MeshShape()
    log_every: int = 50
    eval_every: int = 0
    eval_images: int = 0
    save_every: int = 1000
    preview_every: int = 0
    keep: int = 2
    keep_every: int = 0
    keep_best: str = ""
    patience: int = 0
    fid: FIDConfig = FIDConfig()
    wandb: str = ""
    stalled_minutes: float = 30.0
    skip_nonfinite: int = 0

    def check(self) -> None:
        """Raises InputError for the first invalid field, of the task and the data as well."""
        config_tree.check_types(self)
        if (self.steps > 0) == (self.epochs > 0) or min(self.steps, self.epochs) < 0:
            raise InputError(
                f"give the length as steps or as epochs, one of them above 0 and the other 0; "
                f"steps is {self.steps}, epochs {self.epochs}"
            )
        seed_number("seed", self.seed)
        whole_number("steps", self.steps, 0)
        for name, lowest in MIN_VALUES.items():
            whole_number(name, getattr(self, name), lowest)
        finite_number("stalled_minutes", self.stalled_minutes, 0)
        if not self.run_dir:
            raise InputError("run_dir is empty; name a directory for this run, say runs/first")
        if in_bucket(self.run_dir) and not self.run_dir.startswith("gs:"):
            raise InputError(
                f"run_dir is {self.run_dir}: Orbax writes checkpoints only to disks and gs://; "
                "mount the bucket and name the folder"
            )
        if self.init_from and self.fork_from:
            raise InputError(
                f"init_from is {self.init_from} and fork_from {self.fork_from}: give one of them"
            )
        if (self.keep_best or self.patience) and not self.eval_every:
            raise InputError("keep_best and patience need evaluations; set eval_every above 0")
        if self.patience and not self.keep_best:
            raise InputError(f"patience is {self.patience}, but keep_best names no metric")
        self.fid.check()
        check_wandb(self.wandb)
        check_microbatches(self.batch_size, self.task.accumulate)

    def with_init_tokenizer(self) -> "Experiment":
        """Returns these settings on the tokenizer that `init_from` was trained on, if it asks so.

        Raises InputError if that tokenizer does not fit the task (`Task.with_tokenizer_of`).
        """
        if not (self.init_from and self.init_tokenizer):
            return self
        return dataclasses.replace(self, task=self.task.with_tokenizer_of(self.init_from))

    def best_settings(self) -> dict[str, Any]:
        """Returns what may change, of settings and data, and the metric `keep_best` depends on."""
        metric = parse_keep_best(self.keep_best)[0].rpartition("/")[2]
        if not metric:
            return {}
        held_out = {HELD_OUT: self.data.describe()[HELD_OUT]}
        if metric not in FID_METRICS:
            return {"eval_images": self.eval_images} | held_out
        fid = config_tree.to_dict(self.fid)
        measured = {name: fid[name] for name in ("images", "reference", "features", "seed")}
        measured |= {"sampling": config_tree.to_dict(self.task).get("sampling")}
        return measured | held_out if self.fid.reference == HELD_OUT else measured

    def plan(self, train_size: int) -> Plan:
        """Returns the length of the run for a number of training images."""
        steps = self.steps or math.ceil(self.epochs * train_size / self.batch_size)
        return Plan(whole_number("steps", steps, 1), self.batch_size)

    def due(self, step: int, steps: int) -> Due:
        """Returns what is due once `step` updates of the run's `steps` are done.

        After the last one, metrics are due, and FID if it is measured at all. Patience may end the
        run earlier, at an evaluation that is due without FID.
        """

        def every(interval: int) -> bool:
            return interval > 0 and step % interval == 0

        last = step == steps
        return Due(
            metrics=last or every(self.eval_every),
            fid=every(self.fid.every) or (last and self.fid.every > 0),
            preview=every(self.preview_every),
            save=every(self.save_every) or every(self.keep_every),
        )


MIN_VALUES = {
    "batch_size": 1,
    "log_every": 1,
    "eval_every": 0,
    "eval_images": 0,
    "save_every": 0,
    "preview_every": 0,
    "keep": 1,
    "keep_every": 0,
    "patience": 0,
    "skip_nonfinite": 0,
}
