"""A small multi-scale tokenizer for crops of two photographs, and what helps its code book.

    python train.py --config=configs/photos_tokenizer.py
    python -m varjax.tokenizer.evaluate --weights=runs/photos_tokenizer --data=photos

64 by 64 pixels become 130 tokens at 6 scales. After the colon one change to the plain recipe, or
several with commas between:

    configs/photos_tokenizer.py:cosine         the nearest code by angle
    configs/photos_tokenizer.py:adversarial    a discriminator from 30 % of the run on
"""

import dataclasses

from varjax.data.sources import Photos
from varjax.tokenizer.adversary import Adversary
from varjax.tokenizer.model import TokenizerConfig
from varjax.tokenizer.task import TokenizerTask
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW

OPTIMIZER = AdamW(base_lr=1e-2, weight_decay=0.0, clip=1.0, schedule="cos", warmup=0.05)
MODEL = TokenizerConfig(
    scales=(1, 2, 3, 4, 6, 8),
    width=16,
    multipliers=(1, 2, 4, 4),
    blocks=1,
    groups=8,
    vocab=512,
    code_channels=16,
)
ADVERSARY = Adversary(
    kind="patch",
    width=32,
    layers=2,
    weight=0.5,
    start=0.3,
    ramp=0.1,
    lecam=1e-3,
    diffaugment=("color", "translation", "cutout"),
    optimizer=AdamW(base_lr=2e-3, b1=0.5, b2=0.9, weight_decay=0.0, clip=1.0, schedule="cos"),
)
CHANGES = {
    "plain": {},
    "cosine": {"model": dataclasses.replace(MODEL, cosine_codes=True)},
    "adversarial": {"adversary": ADVERSARY},
}


def get_config(arg: str = "plain") -> Experiment:
    names = arg.split(",")
    if unknown := [name for name in names if name not in CHANGES]:
        raise ValueError(f"cannot read {unknown}; allowed are {', '.join(CHANGES)}")
    task = TokenizerTask(model=MODEL, optimizer=OPTIMIZER, l1=0.2, l2=1.0, beta=0.25, ema=0.99)
    for name in names:
        task = dataclasses.replace(task, **CHANGES[name])
    changed = "".join(f"_{name}" for name in names if name != "plain")
    return Experiment(
        task=task,
        data=Photos(size=64, flip=True),
        run_dir=f"runs/photos_tokenizer{changed}",
        batch_size=16,
        steps=1000,
        log_every=20,
        eval_every=250,
        save_every=250,
        preview_every=250,
    )
