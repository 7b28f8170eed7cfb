"""VAR on ImageNet at 256 or 512 pixels, with the hyper-parameters of the official models.

    python train.py --config=configs/var.py:d16

After the colon: d16, d20, d24 or d30 (256 pixels) or d36 (512 pixels, shared AdaLN), and where the
images are (docs/data.md):

    configs/var.py:d16                                ImageNet as TFDS prepared it (imagenet2012)
    configs/var.py:d16,data=folder:/data/imagenet     folders train/<class>/… and val/<class>/…
    configs/var.py:d16,data=tfds:/data/packed         written by varjax prepare
    configs/var.py:d16,data=latents:/data/latents     written by varjax cache-latents
    configs/var.py:d16,data=random                    noise, to try the recipe and its speed

Images become tokens by the released tokenizer, which is converted once:

    varjax convert --repo=FoundationVision/var --tokenizer=vae_ch160v4096z32.pth \
        --out=weights/tokenizer

It serves both sizes; for d36, convert it with the scales of 512 pixels:

    varjax convert --repo=FoundationVision/var --tokenizer=vae_ch160v4096z32.pth \
        --scales=1,2,3,4,6,9,13,18,24,32 --out=weights/tokenizer_512

Another tokenizer of equal sizes needs --config.task.tokenizer_weights=runs/my_tokenizer.

Published by the authors for these settings (guidance 2.5 is the official cfg 1.5):

    model  parameters  batch  epochs   FID (50,000 samples, guidance 2.5, top-k 900, top-p 0.96)
    d16        310 M     768     200   3.55   loss 6.046 at the end, 5.345 at the last scale
    d20        600 M     768     250   2.95
    d24        1.0 B     768     350   2.33
    d30        2.0 B    1024     350   1.97
    d36        2.35 B    768     350   2.63   2,240 tokens per image instead of 680

Hardware: 8 or more GPUs or TPU chips, 64 or more for d36. The authors' code took 1.25 s a step for
d16 on 16 GPUs, 116 hours in all. To train on fewer devices, keep the batch size and set
--config.task.accumulate; a batch that the devices do not divide is refused, never changed.
docs/training.md says how to watch a run and continue it, and docs/finetuning.md how to start from
trained weights.

The "progressive training" of the official trainer (fewer scales at first) is left out; all released
recipes turn it off. They also turn off a moving average of the weights
(--config.task.ema_decay=0.9999 turns it on) and label smoothing (--config.task.label_smoothing).
"""

import dataclasses

from varjax.data.sources import parse_dataset
from varjax.nn.compute import ComputeConfig, Remat
from varjax.tokenizers.vq.model import VQConfig
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW
from varjax.training.sharding import MeshShape
from varjax.var.model import VARConfig
from varjax.var.task import VARTask

from ._arguments import read_argument, split_words


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Holds the settings that differ between sizes."""

    batch_size: int
    epochs: int
    base_lr: float  # for a batch of 256
    end: float  # of the learning rate, as a fraction of its peak
    weight_decay_end: float
    remat: Remat
    mesh: MeshShape  # large models are sharded over the devices, small ones replicated


EACH, SPREAD = MeshShape(), MeshShape(fsdp=0)
RECIPES = {
    "d16": Recipe(
        batch_size=768,
        epochs=200,
        base_lr=1e-4,
        end=0.1,
        weight_decay_end=0.05,
        remat="dots",
        mesh=EACH,
    ),
    "d20": Recipe(
        batch_size=768,
        epochs=250,
        base_lr=1e-4,
        end=0.1,
        weight_decay_end=0.05,
        remat="dots",
        mesh=EACH,
    ),
    "d24": Recipe(
        batch_size=768,
        epochs=350,
        base_lr=8e-5,
        end=0.01,
        weight_decay_end=0.05,
        remat="dots",
        mesh=SPREAD,
    ),
    "d30": Recipe(
        batch_size=1024,
        epochs=350,
        base_lr=8e-5,
        end=0.01,
        weight_decay_end=0.08,
        remat="block",
        mesh=SPREAD,
    ),
    "d36": Recipe(
        batch_size=768,
        epochs=350,
        base_lr=8e-5,
        end=0.01,
        weight_decay_end=0.08,
        remat="block",
        mesh=SPREAD,
    ),
}


def get_config(arg: str = "d16") -> Experiment:
    size, data, _ = read_argument(split_words(arg), RECIPES)
    weights = "weights/tokenizer_512" if size == "d36" else "weights/tokenizer"
    return experiment(size, RECIPES[size], data, weights)


def experiment(size: str, recipe: Recipe, data: str, tokenizer_weights: str) -> Experiment:
    """Plans the official recipe on the given data."""
    model = VARConfig.preset(size)
    tokenizer = VQConfig(scales=model.scales)
    optimizer = AdamW(
        base_lr=recipe.base_lr,
        b1=0.9,
        b2=0.95,
        weight_decay=0.05,
        weight_decay_end=recipe.weight_decay_end,
        clip=2.0,
        schedule="lin0",
        warmup=0.02,
        warmup_start=0.005,
        end=recipe.end,
    )
    return Experiment(
        task=VARTask(
            model=model,
            tokenizer=tokenizer,
            tokenizer_weights=tokenizer_weights,
            optimizer=optimizer,
            class_dropout=0.1,
            drop_path=0.1 * model.depth / 24,
            compute=ComputeConfig(remat=recipe.remat),
        ),
        data=parse_dataset(data, tokenizer.image_shape[0]),
        run_dir=f"runs/var_{size}",
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        mesh=recipe.mesh,
        log_every=50,
        eval_every=5000,
        save_every=1000,
        preview_every=5000,
    )
