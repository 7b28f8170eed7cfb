"""The rules by which configs for small images choose sizes and lengths of MAR's runs."""

import dataclasses
from typing import Any, Literal

from varjax.mar.heads import CategoricalHead, DiffusionHead
from varjax.mar.model import MARConfig
from varjax.mar.sample import MAROptions
from varjax.mar.task import MARTask
from varjax.nn.compute import ComputeConfig
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.kl.task import KLTask
from varjax.tokenizers.vq.task import VQTask
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW

from ._small import EVAL_IMAGES, LENGTHS, MOST_PASSES, interval, run_steps
from ._small_data import Quality, downsampling_levels

Order = Literal["masked", "random", "raster"]
ORDERS: dict[Order, dict[str, Any]] = {
    "masked": {},
    "random": {"causal": True},
    "raster": {"causal": True, "order": "raster"},
}
TOKENS = "continuous", "codes"
TOKENIZER_BATCH_SIZE = 64
# Each pass masks different tokens in a different order, so a transformer learns more from an image
# than one that always sees the same sequence.
MOST_MAR_PASSES = 4 * MOST_PASSES


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Holds the settings that differ between sizes.

    Attributes:
        tokenizer_width: channels of the tokenizer's first level.
        latent_channels: channels of the latents, which are the numbers of a token.
        tokenizer_steps: updates of the tokenizer's quick run.
        width: channels of the transformer.
        depth: layers of the encoder, and as many of the decoder.
        codes_depth: layers of the encoder, and of the decoder, over codes, whose head is smaller.
        heads: attention heads in each layer.
        head_depth: residual blocks of the denoising MLP.
        head_width: channels of the denoising MLP.
        base_lr: peak learning rate of the transformer, for each 256 images of a batch.
        batch_size: images in an update of the transformer.
        steps: updates of the transformer's quick run.
        sampling: options that suit the model.
        ema_warmup: whether the decay of the averages starts low, so that shorter runs may use them.
    """

    tokenizer_width: int
    latent_channels: int
    tokenizer_steps: int
    width: int
    depth: int
    codes_depth: int
    heads: int
    head_depth: int
    head_width: int
    base_lr: float
    batch_size: int
    steps: int
    sampling: MAROptions
    ema_warmup: bool


# Tuned on scikit-learn's digits.
UP_TO_8 = Recipe(
    tokenizer_width=24,
    latent_channels=4,
    tokenizer_steps=700,
    width=96,
    depth=1,
    codes_depth=1,
    heads=4,
    head_depth=2,
    head_width=128,
    base_lr=4e-3,
    batch_size=128,
    steps=1500,
    sampling=MAROptions(
        guidance=1.5, temperature=1.1, steps=8, diffusion_steps="100", clip_denoised=4.0
    ),
    ema_warmup=False,
)
# As many parameters as VAR has for these images, within 10 %.
LARGER = Recipe(
    tokenizer_width=32,
    latent_channels=8,
    tokenizer_steps=1200,
    width=192,
    depth=3,
    codes_depth=4,
    heads=6,
    head_depth=3,
    head_width=256,
    base_lr=6e-3,
    batch_size=64,
    steps=1500,
    sampling=MAROptions(
        guidance=2.0, temperature=1.0, steps=16, diffusion_steps="50:25", clip_denoised=4.0
    ),
    ema_warmup=True,
)


def small_kl_tokenizer(data: Any, run_dir: str, quality: Quality = "quick") -> Experiment:
    """Plans the run of a KL tokenizer for square images of 8 to 64 pixels.

    Raises InputError for images of another size or shape.
    """
    levels = downsampling_levels(data.image_shape)
    recipe, length = _recipe(data), LENGTHS[quality]
    model = KLConfig(
        image_size=data.image_shape[0],
        image_channels=data.image_shape[-1],
        width=recipe.tokenizer_width,
        channel_mult=(1, *[2] * levels),
        blocks=1,
        groups=8,
        latent_channels=recipe.latent_channels,
    )
    optimizer = AdamW(base_lr=8e-3, weight_decay=0.0, clip=1.0, schedule="cos", warmup=0.05)
    longest = recipe.tokenizer_steps * length.tokenizer
    steps = run_steps(longest, data, TOKENIZER_BATCH_SIZE, MOST_PASSES)
    return Experiment(
        # With LDM's kl of 1e-6, the latents of a small model spread without bounds. With 1e-3,
        # their standard deviation is near 1, and the posterior's about a twentieth of that.
        task=KLTask(
            model=model,
            optimizer=optimizer,
            l1=0.2,
            l2=1.0,
            kl=1e-3,
            ema_decay=length.ema_decay,
            ema_warmup=recipe.ema_warmup,
        ),
        data=data,
        run_dir=run_dir,
        batch_size=TOKENIZER_BATCH_SIZE,
        steps=steps,
        eval_every=interval(350, steps),
        eval_images=EVAL_IMAGES,
        save_every=interval(250, steps),
        preview_every=interval(350, steps),
    )


def small_mar(
    data: Any,
    tokenizer_run: Experiment,
    run_dir: str,
    order: Order = "masked",
    quality: Quality = "quick",
) -> Experiment:
    """Plans the run of a transformer over a KL tokenizer, or over codes of a VQ tokenizer.

    Args:
        data: dataset of the images.
        tokenizer_run: run that `small_kl_tokenizer` planned, or `small_tokenizer` with one scale.
        run_dir: directory of the run.
        order: "masked" draws several tokens a step (MAR); "random" and "raster" draw one after
            another, with causal attention.
        quality: choice between a short and a long run.
    """
    recipe, length = _recipe(data), LENGTHS[quality]
    task, sampling = tokenizer_run.task, recipe.sampling
    assert isinstance(task, KLTask | VQTask)
    if isinstance(task, KLTask):
        *latent_map, channels = task.model.latent_shape
        head = DiffusionHead(channels=channels, depth=recipe.head_depth, width=recipe.head_width)
        depth = recipe.depth
    else:
        latent_map, head = task.model.pyramid.finest, CategoricalHead(task.model.vocab)
        depth = recipe.codes_depth
        sampling = dataclasses.replace(sampling, temperature=1.0)
    height, width = latent_map
    model = MARConfig(
        width=recipe.width,
        encoder_depth=depth,
        decoder_depth=depth,
        encoder_heads=recipe.heads,
        decoder_heads=recipe.heads,
        head=head,
        classes=data.classes,
        latent_map=(height, width),
        buffer_size=height * width // 4,
        embed_init=0.5,  # positions must not be faint in a short run
        **ORDERS[order],
    )
    optimizer = AdamW(
        base_lr=recipe.base_lr, weight_decay=0.02, clip=3.0, schedule="cos", warmup=0.05
    )
    steps = run_steps(recipe.steps * length.transformer, data, recipe.batch_size, MOST_MAR_PASSES)
    return Experiment(
        task=MARTask(
            model=model,
            tokenizer=task.model,
            tokenizer_weights=tokenizer_run.run_dir,
            optimizer=optimizer,
            attention_dropout=0.0,
            dropout=0.0,
            min_mask_ratio=0.1,
            diffusion_batch_mul=2,
            ema_decay=length.ema_decay,
            ema_warmup=recipe.ema_warmup,
            compute=ComputeConfig(attention_impl="xla", unroll=True),
            sampling=sampling,
        ),
        data=data,
        run_dir=run_dir,
        batch_size=recipe.batch_size,
        steps=steps,
        eval_every=interval(500, steps),
        eval_images=EVAL_IMAGES,
        save_every=interval(500, steps),
        preview_every=interval(750, steps),
    )


def _recipe(data: Any) -> Recipe:
    return UP_TO_8 if data.image_shape[0] <= 8 else LARGER
