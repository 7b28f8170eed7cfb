"""The rules by which configs for small images choose scales, widths and lengths of runs."""

import dataclasses
import itertools
import os
import re
from typing import Any

import numpy as np

from varjax.data.sources import TFDS, Folder, parse_dataset
from varjax.data.sources.folder import FolderSource
from varjax.errors import InputError
from varjax.nn.compute import ComputeConfig
from varjax.storage.image_files import BrokenImage
from varjax.tokenizers.vq.codebook import CodebookConfig
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.task import VQTask
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW
from varjax.var.model import VARConfig
from varjax.var.sample import VAROptions
from varjax.var.task import VARTask

from ._arguments import COMMA_HINT, split_argument

SMALLEST, LARGEST = 8, 64  # pixels of a side
SCALES = {  # by the side of the finest token map
    4: (1, 2, 3, 4),
    5: (1, 2, 3, 4, 5),
    6: (1, 2, 3, 4, 6),
    7: (1, 2, 3, 4, 5, 7),
    8: (1, 2, 3, 4, 6, 8),
}
GRAY_CHECK_IMAGES = 64  # number of images read to tell gray from color


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Holds the settings that differ between sizes.

    Attributes:
        vocab: number of codes.
        codebook: how codes start and stay in use.
        width: channels of the transformer.
        base_lr: peak learning rate of both stages, for each 256 images of a batch.
        tokenizer_steps: updates of the tokenizer's run, in batches of 64.
        steps: updates of the transformer's run.
        guidance: guidance scale when sampling.
    """

    vocab: int
    codebook: CodebookConfig
    width: int
    base_lr: float
    tokenizer_steps: int
    steps: int
    guidance: float


# Tuned on scikit-learn's digits (8 pixels), and on 4,500 handwritten digits of 28 pixels.
UP_TO_8 = Recipe(
    vocab=256,
    codebook=CodebookConfig(),
    width=128,
    base_lr=8e-3,
    tokenizer_steps=1000,
    steps=1000,
    guidance=1.25,
)
LARGER = Recipe(
    vocab=512,
    codebook=CodebookConfig(init="kmeans", restart_every=50),
    width=192,
    base_lr=6e-3,
    tokenizer_steps=1200,
    steps=1500,
    guidance=4.0,
)


def small_tokenizer(data: Any, run_dir: str) -> Experiment:
    """Plans the run of a tokenizer for square images of 8 to 64 pixels.

    Raises InputError for images of another size or shape.
    """
    recipe, channel_mult, finest = _choose(data.image_shape)
    model = VQConfig(
        scales=SCALES[finest],
        image_channels=data.image_shape[-1],
        width=32,
        channel_mult=channel_mult,
        blocks=1,
        groups=8,
        vocab=recipe.vocab,
        code_channels=16,
    )
    optimizer = AdamW(
        base_lr=recipe.base_lr, weight_decay=0.0, clip=1.0, schedule="cos", warmup=0.05
    )
    return Experiment(
        task=VQTask(model=model, optimizer=optimizer, codebook=recipe.codebook, ema_decay=0.99),
        data=data,
        run_dir=run_dir,
        batch_size=64,
        steps=recipe.tokenizer_steps,
        eval_every=250,
        save_every=250,
        preview_every=250,
    )


def small_var(data: Any, tokenizer_run: Experiment, run_dir: str) -> Experiment:
    """Plans the run of a transformer over the tokenizer that `small_tokenizer` planned."""
    recipe, _, _ = _choose(data.image_shape)
    assert isinstance(tokenizer_run.task, VQTask)
    tokenizer = tokenizer_run.task.model
    model = VARConfig(
        depth=6,
        width=recipe.width,
        heads=recipe.width // 32,
        classes=data.classes,
        scales=tokenizer.scales,
        vocab=tokenizer.vocab,
        code_channels=tokenizer.code_channels,
        gate_init=1e-2,
    )
    return Experiment(
        task=VARTask(
            model=model,
            tokenizer=tokenizer,
            tokenizer_weights=tokenizer_run.run_dir,
            optimizer=AdamW(base_lr=recipe.base_lr, schedule="cos", warmup=0.05),
            ema_decay=0.99,
            compute=ComputeConfig(unroll=True),
            sampling=VAROptions(guidance=recipe.guidance, top_k=0, top_p=0.0),
        ),
        data=data,
        run_dir=run_dir,
        batch_size=64,
        steps=recipe.steps,
        eval_every=100,
        save_every=200,
        preview_every=500,
        keep_best="eval_ema/loss",
    )


def small_dataset(arg: str) -> tuple[Any, str]:
    """Reads "data=WHERE,size=PIXELS" and optionally "held_out=FRACTION" (or the name of a split).

    Returns:
        The dataset, with one channel if its images are gray, and a name for its runs.

    Raises:
        InputError: anything else in `arg`, or a dataset that cannot be read.
    """
    settings: dict[str, str] = {}
    for word in filter(None, split_argument(arg)):
        name, _, settings[name] = word.partition("=")
    if settings.keys() - {"data", "size", "held_out"} or not settings.get("data"):
        problem = f"cannot read {arg!r}" if arg else "this config needs its data"
        hint = COMMA_HINT if "data" in settings else ""
        raise InputError(
            f"{problem}; give data=folder:DIR,size=28 after the colon, optionally with "
            f"held_out=0.1{hint}"
        )
    text = settings.get("size", "")
    if not text.isdigit():
        raise InputError(f"size is {text!r}; give the side of the images in pixels, as in size=28")
    size = int(text)
    _choose((size, size, 3))
    data = parse_dataset(settings["data"], size)
    if "held_out" in settings:
        data = _with_held_out(data, settings["held_out"])
    if isinstance(data, Folder | TFDS) and _is_gray(_unsplit_source(data)):
        data = dataclasses.replace(data, channels=1)
    location = os.path.normpath(settings["data"].partition(":")[2] or settings["data"])
    name = re.sub(r"\W+", "_", os.path.basename(location)).strip("_").lower()
    return data, f"{name or 'images'}_{size}"


def _choose(image_shape: tuple[int, int, int]) -> tuple[Recipe, tuple[int, ...], int]:
    """Returns the recipe, the channel_mult of the levels, and the side of the finest token map."""
    height, width, _ = image_shape
    if height != width or not SMALLEST <= height <= LARGEST:
        raise InputError(
            f"images of {height} by {width} pixels; these configs are for square ones of "
            f"{SMALLEST} to {LARGEST} pixels"
        )
    # The smallest number of halvings, at least one, that leaves at most 8 tokens a side.
    levels = next(n for n in itertools.count(1) if height <= 8 * 2**n)
    if height % 2**levels:
        below = height // 2**levels * 2**levels
        raise InputError(
            f"size={height}: must be a multiple of {2**levels}, such as {below} or "
            f"{below + 2**levels}; images are resized to it"
        )
    recipe = UP_TO_8 if height <= 8 else LARGER
    return recipe, (1, *[2] * levels), height // 2**levels


def _with_held_out(data: Any, text: str) -> Any:
    if not isinstance(data, Folder | TFDS):
        kind = type(data).__name__
        raise InputError(f"held_out={text}: {kind} always holds out the same images; leave it out")
    if isinstance(data, TFDS):
        return dataclasses.replace(data, held_out=text)
    try:
        return dataclasses.replace(data, held_out=float(text))
    except InputError:
        raise
    except ValueError:
        return dataclasses.replace(data, held_out=text)


def _unsplit_source(data: Folder | TFDS) -> Any:
    """Returns images without splitting them, because flags may still change what is held out."""
    if isinstance(data, Folder):
        return FolderSource(data.layout.training_folder(), data.channels)
    return data.source("train")


def _is_gray(source: Any) -> bool:
    """Returns whether some evenly spaced images contain only shades of gray."""
    any_read = False
    count = min(GRAY_CHECK_IMAGES, len(source))
    for index in np.linspace(0, len(source) - 1, count).astype(int).tolist():
        try:
            image_HWC = source[index]["image"]
        except BrokenImage:
            continue
        if (image_HWC != image_HWC[..., :1]).any():
            return False
        any_read = True
    return any_read
