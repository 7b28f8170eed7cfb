"""Trains a small classifier of the images of a dataset, in about two minutes on two CPU cores.

varjax train-classifier --data=idx:/usr/share/datasets/fashion-mnist --out=weights/fashion
varjax train-classifier --data=folder:/data/flowers --size=32 --out=weights/flowers

The directory serves two purposes: `varjax evaluate --features=DIR` measures samples in its
features and checks their labels, and `--classifier=DIR` chooses the best samples. If the command
has finished before, running it again only prints the result. See docs/evaluation.md.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from varjax import trees
from varjax.config.numbers import seed_number, whole_number
from varjax.convert.weights_dir import check_weights_dir, write_weights
from varjax.data.loader import make_loader
from varjax.data.sources import dataset_of_command
from varjax.data.stream import ImageDataset
from varjax.errors import InputError
from varjax.evaluation.image_crop import CROPS, describe_crop
from varjax.metrics.classifier_weights import PART, TYPE
from varjax.metrics.convnet import LARGEST, SMALLEST, ConvNetConfig
from varjax.runtime.commands import command_parser, run_command
from varjax.runtime.compilation_cache import use_compilation_cache
from varjax.runtime.first_call import announce_compilation
from varjax.storage import files, folders
from varjax.storage.buckets import as_path
from varjax.training.optimizer import AdamW
from varjax.training.progress import ProgressReporter
from varjax.training.task import Plan
from varjax.trees import PyTree

OPTIMIZER = AdamW(base_lr=4e-3, b2=0.999, weight_decay=0.02, clip=1.0, schedule="cos", warmup=0.05)
ACCURACY, REQUEST = "held_out_accuracy", "training"  # in config.json
INIT, DROPOUT = 0, 1  # what a key is for


@dataclasses.dataclass(frozen=True)
class ClassifierTraining:
    """Configures the training of a classifier.

    Attributes:
        steps: length of the training in updates.
        batch_size: images in an update.
        seed: random seed of the parameters, the dropout and the order of the images.
    """

    steps: int = 4000
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            whole_number(name, getattr(self, name), 1)
        seed_number("seed", self.seed)


def train_classifier(
    data: ImageDataset, training: ClassifierTraining
) -> tuple[ConvNetConfig, PyTree, float]:
    """Trains on the training images of a dataset, augmented as it says; shows the progress.

    Args:
        data: dataset with two or more classes, and images of 8 to 256 pixels.
        training: settings of the training.

    Returns:
        (config, parameters, accuracy on the held-out images).

    Raises:
        InputError: data with one class or other sizes, or a training that diverged.
    """
    config = _choose_config(data)
    key = jax.random.key(training.seed)
    params = jax.jit(config.init)(jax.random.fold_in(key, INIT))
    transformation = OPTIMIZER.make(Plan(training.steps, training.batch_size))
    opt_state = transformation.init(params)
    update = _make_update(config, transformation, jax.random.fold_in(key, DROPOUT))
    loader = make_loader(data, training.batch_size, training.seed)
    batches = loader.train()
    with announce_compilation("the training step"):
        params, opt_state, loss = update(params, opt_state, 0, next(batches))
    jax.block_until_ready(loss)
    begin = time.monotonic()
    with ProgressReporter(1, training.steps) as progress:
        for step in range(1, training.steps):
            last_loss = float(loss)  # of the step before: the device works on, unlike with this one
            params, opt_state, loss = update(params, opt_state, step, next(batches))
            speed = step * training.batch_size / (time.monotonic() - begin)
            progress.show(step + 1, {"loss": last_loss, "images_per_second": speed})
    if not np.isfinite(loss):
        raise InputError(
            f"the loss is {float(loss)} after {training.steps} steps; train with another seed"
        )
    predict = jax.jit(lambda image_BHWC: config.outputs(params, _rgb(image_BHWC))["logits_BV"])
    right, count = 0, 0
    for batch in loader.held_out():
        valid_B = batch["valid_B"]
        class_B = np.asarray(predict(batch["image_BHWC"])).argmax(axis=1)
        right += int(np.sum((class_B == batch["label_B"]) & valid_B))
        count += int(np.sum(valid_B))
    return config, jax.device_get(params), right / max(count, 1)


def write_classifier(
    data: ImageDataset, training: ClassifierTraining, name: str, out: pathlib.Path
) -> str:
    """Trains a classifier and writes its directory, completely or not at all.

    Args:
        data: dataset of the images.
        training: settings of the training.
        name: the dataset as on the command line, for config.json.
        out: directory that is absent or empty, or was written by an equal call.

    Returns:
        A summary in one line.

    Raises:
        InputError: `out` has other content or cannot be written, or as `train_classifier` does.
    """
    image_size = _choose_config(data).image_size
    request = {"data": name, **dataclasses.asdict(training), **data.describe()}
    if (written := out / "config.json").exists():
        about = files.read_json(written)
        existing, written_config = about.get(REQUEST), about.get(PART)
        if not isinstance(existing, dict) or not isinstance(written_config, dict):
            raise InputError(f"{out} holds other weights; choose another folder, or remove it")
        existing |= {"image_size": written_config.get("image_size")}
        folders.check_same_request(out, existing, request | {"image_size": image_size})
    else:
        check_weights_dir(out)
        folders.check_writable(out.parent)
        config, params, accuracy = train_classifier(data, training)
        settings = {TYPE: type(config).__name__, **dataclasses.asdict(config)}
        about = {PART: settings, ACCURACY: accuracy, REQUEST: request}
        write_weights(out, about, {PART: trees.paths(params)}, sources={})
    return f"{out}: the class of {about[ACCURACY]:.4f} of the held-out images is recognized"


def _choose_config(data: ImageDataset) -> ConvNetConfig:
    """Returns the config for a dataset; raises InputError if it cannot be classified."""
    H, W, channels = data.image_shape
    if data.classes < 2:
        raise InputError(
            "the data have one class, so there is nothing to tell apart; give images with labels, "
            "such as a folder with a subfolder for each class"
        )
    if not all(SMALLEST <= side <= LARGEST for side in (H, W)):
        raise InputError(
            f"the images have {H}x{W} pixels; allowed are sides from {SMALLEST} to {LARGEST}"
        )
    if channels not in (1, 3):
        raise InputError(f"the images have {channels} channels; allowed are 1 (gray) and 3 (RGB)")
    return ConvNetConfig.for_images((H, W), data.classes)


def _make_update(
    config: ConvNetConfig, transformation: optax.GradientTransformation, key: jax.Array
) -> Callable[..., tuple[PyTree, optax.OptState, jax.Array]]:
    """Makes the compiled update: (params, opt_state, step, batch) -> (params, opt_state, loss)."""

    def update(params: PyTree, opt_state: optax.OptState, step: Any, batch: Mapping[str, Any]):
        def mean_loss(params: PyTree) -> jax.Array:
            dropout_key = jax.random.fold_in(key, step)
            logits_BV = config.outputs(params, _rgb(batch["image_BHWC"]), dropout_key)["logits_BV"]
            label_B = batch["label_B"]
            return optax.softmax_cross_entropy_with_integer_labels(logits_BV, label_B).mean()

        loss, gradients = jax.value_and_grad(mean_loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
            updates, opt_state = transformation.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(update, donate_argnums=(0, 1))


def _rgb(image_BHWC: Any) -> jax.Array:
    return jnp.broadcast_to(image_BHWC, (*image_BHWC.shape[:3], 3))


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = command_parser("varjax train-classifier", __doc__)
    add, defaults = parser.add_argument, ClassifierTraining()
    add("--data", required=True, help="dataset: idx:DIR, folder:DIR[,held_out=0.1] …")
    add("--out", required=True, metavar="DIR", help="new directory for the classifier")
    add("--size", type=int, help="side of the images in pixels, for data of any size")
    add("--crop", default="var", choices=CROPS, help="crop of photographs, var or adm (var)")
    for name, about in (
        ("steps", "length of the training in updates"),
        ("batch_size", "images in an update"),
        ("seed", "random seed of parameters, dropout and order"),
    ):
        default = getattr(defaults, name)
        add(f"--{name}", type=int, default=default, help=f"{about} ({default})")
    flags = parser.parse_args(arguments)

    def action() -> None:
        data = dataset_of_command(flags.data, flags.size, 3, CROPS[flags.crop])
        training = ClassifierTraining(flags.steps, flags.batch_size, flags.seed)
        name = " ".join(filter(None, (flags.data, describe_crop(flags.data, CROPS[flags.crop]))))
        use_compilation_cache()
        print(write_classifier(data, training, name, as_path(flags.out)))

    return run_command("varjax train-classifier", action)
