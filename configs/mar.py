"""MAR on ImageNet at 256 pixels, with the hyper-parameters of the official models.

    python train.py --config=configs/mar.py:b

after the colon: b, l or h, and where the images are, as in configs/var.py:

    configs/mar.py:l,data=folder:/data/imagenet     folders train/<class>/… and val/<class>/…
    configs/mar.py:l,data=latents:/data/latents     what python -m varjax.data.cache_latents wrote
    configs/mar.py:l,data=random                    noise, to try the recipe and its speed

Images become latents by the released KL tokenizer, which is converted once (docs/convert.md):

    python -m varjax.convert --kl=kl16.ckpt --out=weights/kl16

or by any other of the same sizes: --config.task.tokenizer_weights=runs/kl_tokenizer_256. As each
epoch samples the posterior anew, the cache holds its moments, of both flips of each image:

    python -m varjax.data.cache_latents --config=configs/mar.py:b --augmentations=2 \
        --dtype=float16 --out=/data/latents

What the authors published for these settings (800 epochs, 50,000 samples, 256 steps, cfg linear):

    model  parameters  cfg   FID    without guidance, temperature 0.95
    b        208 M     2.9   2.31   3.48
    l        478 M     3.0   1.78   2.60
    h        942 M     3.2   1.55   2.35

Hardware: 16 GPUs or TPU chips and more. Whoever trains on fewer devices keeps the batch and sets
--config.task.accumulate. On NVIDIA GPUs, fused attention has no dropout of its weights: with
--config.task.attention_dropout=0, another recipe, it is used.
"""

import dataclasses

from varjax.data.sources import TFDS, Folder, parse_dataset
from varjax.mar.model import MARConfig
from varjax.mar.options import MAROptions
from varjax.mar.task import MARTask
from varjax.nn.compute import Compute
from varjax.tokenizers.kl.model import KLConfig
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW
from varjax.training.sharding import MeshShape

from ._arguments import read_argument

GUIDANCE = {"b": 2.9, "l": 3.0, "h": 3.2}
EPOCHS, WARMUP_EPOCHS = 800, 100


def get_config(arg: str = "b") -> Experiment:
    size, where, _ = read_argument(arg, GUIDANCE)
    tokenizer = KLConfig()
    data = parse_dataset(where, tokenizer.image_shape[0])
    if isinstance(data, Folder | TFDS):
        data = dataclasses.replace(data, crop="center", flip=True)
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
            model=MARConfig.preset(f"mar_{size}"),
            tokenizer=tokenizer,
            tokenizer_weights="weights/kl16",
            optimizer=optimizer,
            compute=Compute(remat="dots" if size == "b" else "block"),
            sampling=MAROptions(cfg=GUIDANCE[size]),
        ),
        data=data,
        run_dir=f"runs/mar_{size}",
        batch_size=2048,
        epochs=EPOCHS,
        mesh=MeshShape(fsdp=0) if size == "h" else MeshShape(),
        log_every=50,
        eval_every=5000,
        save_every=1000,
        preview_every=5000,
    )
