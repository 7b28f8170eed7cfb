"""The rules by which configs for small images choose scales, widths and lengths of VAR's runs."""

import dataclasses
from typing import Any

from varjax.nn.compute import ComputeConfig
from varjax.tokenizers.vq.codebook import CodebookConfig
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.task import VQTask
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW
from varjax.var.model import VARConfig
from varjax.var.sample import VAROptions
from varjax.var.task import VARTask

from ._small_data import Quality, downsampling_levels, training_images

SCALES = {  # by the side of the finest token map
    4: (1, 2, 3, 4),
    5: (1, 2, 3, 4, 5),
    6: (1, 2, 3, 4, 6),
    7: (1, 2, 3, 4, 5, 7),
    8: (1, 2, 3, 4, 6, 8),
}
BATCH_SIZE = 64
# Evaluations see at most this many held-out images. The loss of 2,000 images is known to 1 %, and
# 10,000 would take half of the run's time.
EVAL_IMAGES = 2000
# Passes over the training images after which such a transformer mostly memorizes them. Even
# a few images take FEWEST_STEPS until the loss stops falling quickly.
MOST_PASSES, FEWEST_STEPS = 50, 500


@dataclasses.dataclass(frozen=True)
class Length:
    """Says how long runs are at a quality, in multiples of the quick ones.

    Attributes:
        tokenizer: factor on the updates of a tokenizer.
        transformer: factor on the updates of a transformer.
        ema_decay: highest decay of the average of the weights, which covers less than the run.
    """

    tokenizer: int
    transformer: int
    ema_decay: float


# On two CPU cores, 28 pixels: a quick run takes about half an hour, the longest good one a night.
LENGTHS: dict[Quality, Length] = {"quick": Length(1, 1, 0.99), "good": Length(10, 20, 0.999)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Holds the settings that differ between sizes.

    Attributes:
        vocab: number of codes.
        codebook: how codes start and stay in use.
        width: channels of the transformer.
        base_lr: peak learning rate of both stages, for each 256 images of a batch.
        tokenizer_steps: updates of the tokenizer's quick run.
        steps: updates of the transformer's quick run.
        guidance: guidance scale when sampling.
        ema_warmup: whether the decay of the averages starts low, so that shorter runs may use them.
    """

    vocab: int
    codebook: CodebookConfig
    width: int
    base_lr: float
    tokenizer_steps: int
    steps: int
    guidance: float
    ema_warmup: bool


# Tuned on scikit-learn's digits (8 pixels), and on 4,500 handwritten digits of 28 pixels; guidance
# of the larger images on Fashion-MNIST (the sweep in docs/comparison.md).
UP_TO_8 = Recipe(
    vocab=256,
    codebook=CodebookConfig(),
    width=128,
    base_lr=8e-3,
    tokenizer_steps=1000,
    steps=1000,
    guidance=1.25,
    ema_warmup=False,
)
LARGER = Recipe(
    vocab=512,
    codebook=CodebookConfig(init="kmeans", restart_every=50),
    width=192,
    base_lr=6e-3,
    tokenizer_steps=1200,
    steps=1500,
    guidance=2.0,
    ema_warmup=True,
)


def small_tokenizer(
    data: Any, run_dir: str, quality: Quality = "quick", single_scale: bool = False
) -> Experiment:
    """Plans the run of a tokenizer for square images of 8 to 64 pixels.

    Args:
        data: dataset of the images.
        run_dir: directory of the run.
        quality: choice between a short and a long run.
        single_scale: whether an image is one token map, as a masked transformer over codes needs
            it, instead of a map for each scale.

    Raises:
        InputError: images of another size or shape.
    """
    levels = downsampling_levels(data.image_shape)
    recipe, finest = _recipe(data), data.image_shape[0] // 2**levels
    model = VQConfig(
        scales=(finest,) if single_scale else SCALES[finest],
        image_channels=data.image_shape[-1],
        width=32,
        channel_mult=(1, *[2] * levels),
        blocks=1,
        groups=8,
        vocab=recipe.vocab,
        code_channels=16,
    )
    optimizer = AdamW(
        base_lr=recipe.base_lr, weight_decay=0.0, clip=1.0, schedule="cos", warmup=0.05
    )
    length = LENGTHS[quality]
    steps = run_steps(recipe.tokenizer_steps * length.tokenizer, data, BATCH_SIZE, MOST_PASSES)
    return Experiment(
        task=VQTask(
            model=model,
            optimizer=optimizer,
            codebook=recipe.codebook,
            ema_decay=length.ema_decay,
            ema_warmup=recipe.ema_warmup,
        ),
        data=data,
        run_dir=run_dir,
        batch_size=BATCH_SIZE,
        steps=steps,
        eval_every=interval(250, steps),
        eval_images=EVAL_IMAGES,
        save_every=interval(250, steps),
        preview_every=interval(250, steps),
    )


def small_var(
    data: Any, tokenizer_run: Experiment, run_dir: str, quality: Quality = "quick"
) -> Experiment:
    """Plans the run of a transformer over the tokenizer that `small_tokenizer` planned."""
    recipe, length = _recipe(data), LENGTHS[quality]
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
    steps = run_steps(recipe.steps * length.transformer, data, BATCH_SIZE, MOST_PASSES)
    return Experiment(
        task=VARTask(
            model=model,
            tokenizer=tokenizer,
            tokenizer_weights=tokenizer_run.run_dir,
            optimizer=AdamW(base_lr=recipe.base_lr, schedule="cos", warmup=0.05),
            ema_decay=length.ema_decay,
            ema_warmup=recipe.ema_warmup,
            compute=ComputeConfig(unroll=True),
            sampling=VAROptions(guidance=recipe.guidance, top_k=0, top_p=0.0),
        ),
        data=data,
        run_dir=run_dir,
        batch_size=BATCH_SIZE,
        steps=steps,
        eval_every=interval(100, steps),
        eval_images=EVAL_IMAGES,
        save_every=interval(200, steps),
        preview_every=interval(500, steps),
        keep_best="eval_ema/loss",
    )


def run_steps(longest: int, data: Any, batch_size: int, most_passes: int) -> int:
    """Returns the updates of a run: as many as planned, but fewer where there are few images.

    Args:
        longest: updates with plenty of images, which is what a user waits for.
        data: dataset of the images.
        batch_size: images in an update.
        most_passes: passes over the training images that are of use.
    """
    useful = most_passes * training_images(data) // batch_size
    return min(longest, max(FEWEST_STEPS, useful))


def interval(shortest: int, steps: int) -> int:
    """Returns the steps between two evaluations or saves: a twentieth of a long run."""
    return max(shortest, steps // 20)


def _recipe(data: Any) -> Recipe:
    return UP_TO_8 if data.image_shape[0] <= 8 else LARGER
