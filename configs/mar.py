"""MAR on ImageNet at 256 pixels, with the hyper-parameters of the official models.

    python train.py --config=configs/mar.py:b

After the colon: b, l or h, and where the images are, as in configs/var.py:

    configs/mar.py:l,data=folder:/data/imagenet     folders train/<class>/… and val/<class>/…
    configs/mar.py:l,data=latents:/data/latents     written by varjax cache-latents
    configs/mar.py:l,data=random                    noise, to try the recipe and its speed

Images become latents by the released KL tokenizer, which is converted once (docs/convert.md):

    varjax convert --kl=kl16.ckpt --out=weights/kl16

Another tokenizer of equal sizes needs --config.task.tokenizer_weights=runs/kl_tokenizer_256. One of
other sizes is named after the colon; a token then covers 16 pixels a side, or one latent if that is
more:

    configs/mar.py:b,tokenizer=kl_f8          weights/kl_f8: sizes of f8, and of Stable Diffusion
    configs/mar.py:b,tokenizer=weights/sdxl   a converted directory, or a run of a tokenizer

Names are kl16 (the default), kl_f4, kl_f8, kl_f16 and kl_f32; patch size, number of tokens and
--config.task.tokenizer_weights follow from them. Each epoch draws new samples from the posterior,
so the cache holds its mean and standard deviation, for both flips of each image:

    varjax cache-latents --config=configs/mar.py:b --augmentations=2 \
        --dtype=float16 --out=/data/latents

Published by the authors (800 epochs, 50,000 samples in 256 steps, linear guidance):

    model  parameters  guidance  FID    without guidance, temperature 0.95
    b        208 M     2.9       2.31   3.48
    l        478 M     3.0       1.78   2.60
    h        942 M     3.2       1.55   2.35

Hardware: 16 or more GPUs or TPU chips. To train on fewer devices, keep the batch size and set
--config.task.accumulate. On NVIDIA GPUs, fused attention does not support dropout of its weights.
It is used with --config.task.attention_dropout=0, which is another recipe.
"""

import dataclasses

from varjax.data.sources import TFDS, Folder, parse_dataset
from varjax.errors import InputError
from varjax.mar.model import MARConfig
from varjax.mar.sample import MAROptions
from varjax.mar.task import MARTask
from varjax.models import read_tokenizer_config
from varjax.nn.compute import ComputeConfig
from varjax.storage.buckets import as_path
from varjax.tokenizers.kl.model import PRESETS, KLConfig
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW
from varjax.training.sharding import MeshShape

from ._arguments import read_argument, split_words

GUIDANCE = {"b": 2.9, "l": 3.0, "h": 3.2}
EPOCHS, WARMUP_EPOCHS = 800, 100
TOKENIZER, IMAGE_SIZE = "tokenizer=", 256
TOKEN_PIXELS = 16  # a side, as MAR's with KL-16


def find_tokenizer(name: str) -> tuple[KLConfig, str]:
    """Finds (config, location of its weights) of a preset, or of a tokenizer at any path.

    Raises InputError where `name` is neither, or no KL tokenizer.
    """
    if name in PRESETS:
        return KLConfig.preset(name, IMAGE_SIZE), f"weights/{name}"
    if not as_path(name).exists():
        raise InputError(
            f"tokenizer={name}: no such directory, and none of {', '.join(PRESETS)}; convert it "
            "first, or train it"
        )
    tokenizer = read_tokenizer_config(name)
    if not isinstance(tokenizer, KLConfig):
        raise InputError(f"tokenizer={name}: is a {type(tokenizer).__name__}; give a KL tokenizer")
    return tokenizer, name


def fitted_model(model: MARConfig, tokenizer: KLConfig) -> MARConfig:
    """Returns the transformer for these latents: their channels, map, and patches of them."""
    h, w, channels = tokenizer.latent_shape
    patch = max(1, TOKEN_PIXELS // tokenizer.downsampling)
    head = dataclasses.replace(model.head, channels=channels, patch=patch)
    return dataclasses.replace(model, head=head, latent_map=(h, w))


def get_config(arg: str = "b") -> Experiment:
    words = split_words(arg)
    chosen = [word.removeprefix(TOKENIZER) for word in words if word.startswith(TOKENIZER)]
    others = [word for word in words if not word.startswith(TOKENIZER)]
    size, where, _ = read_argument(others, GUIDANCE)
    name = chosen[0] if chosen else "kl16"
    tokenizer, weights = find_tokenizer(name)
    data = parse_dataset(where, tokenizer.image_size)
    if isinstance(data, Folder | TFDS):
        data = dataclasses.replace(data, crop="center", flip=True)
    model = fitted_model(MARConfig.preset(f"mar_{size}"), tokenizer)
    optimizer = AdamW(
        base_lr=1e-4,
        b1=0.9,
        b2=0.95,
        weight_decay=0.02,
        clip=3.0,
        schedule="constant",
        warmup=WARMUP_EPOCHS / EPOCHS,
        warmup_start=0.0,
    )
    return Experiment(
        task=MARTask(
            model=model,
            tokenizer=tokenizer,
            tokenizer_weights=weights,
            optimizer=optimizer,
            compute=ComputeConfig(remat="dots" if size == "b" else "block"),
            sampling=MAROptions(
                guidance=GUIDANCE[size], steps=min(MAROptions().steps, model.length)
            ),
        ),
        data=data,
        run_dir=f"runs/mar_{size}",
        batch_size=2048,
        epochs=EPOCHS,
        init_tokenizer=name in PRESETS,  # another one is used even where init_from has its own
        mesh=MeshShape(fsdp=0) if size == "h" else MeshShape(),
        log_every=50,
        eval_every=5000,
        save_every=1000,
        preview_every=5000,
    )
