"""A small multi-scale tokenizer for crops of two photographs, with options for its codebook.

    python train.py --config=configs/photos_tokenizer.py
    varjax evaluate-tokenizer --weights=runs/photos_tokenizer --data=photos

64 by 64 pixels become 341 tokens at 5 scales. After the colon, separated by commas, changes to the
plain recipe:

    cosine           the nearest code by angle
    normal, kmeans   how the codes start, instead of uniform ±1/V
    restart          dead codes are replaced by inputs of the quantizer
    scale_dropout    every tenth image keeps only 3 or 4 of the 5 scales
    entropy          a loss that is low where all codes are used
    adversarial      a discriminator from 30 % of the run on

docs/tokenizer.md describes what each of them does.
"""

from varjax.config import config_tree
from varjax.data.sources import Photos
from varjax.errors import InputError
from varjax.tokenizers.losses.gan import GANConfig
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.task import VQTask
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW

from ._arguments import exclusive_word

CHANGES = {
    "plain": "",
    "cosine": "task.model.cosine_codes=true",
    "normal": "task.codebook.init=normal",
    "kmeans": "task.codebook.init=kmeans",
    "restart": "task.codebook.restart_every=50",
    "scale_dropout": "task.codebook.scale_dropout=0.1",
    "entropy": "task.codebook.entropy=0.1",
    "adversarial": "",
}


def get_config(arg: str = "plain") -> Experiment:
    names = arg.split(",")
    if unknown := [name for name in names if name not in CHANGES]:
        raise InputError(f"cannot read {unknown}; allowed are {', '.join(CHANGES)}")
    exclusive_word(names, ("normal", "kmeans"))  # refuses both together
    model = VQConfig(
        scales=(1, 2, 4, 8, 16),
        width=16,
        channel_mult=(1, 2, 4),
        blocks=1,
        groups=8,
        vocab=512,
        code_channels=16,
    )
    gan = GANConfig(
        kind="patch",
        width=32,
        layers=2,
        weight=0.5,
        start=0.3,
        ramp=0.1,
        lecam=1e-3,
        diffaugment=("color", "translation", "cutout"),
        optimizer=AdamW(base_lr=4e-3, b1=0.5, b2=0.9, weight_decay=0.0, clip=1.0, schedule="cos"),
    )
    experiment = Experiment(
        task=VQTask(
            model=model,
            optimizer=AdamW(base_lr=2e-2, weight_decay=0.0, clip=1.0, schedule="cos", warmup=0.05),
            l1=0.2,
            l2=1.0,
            beta=0.25,
            ema_decay=0.98,
            gan=gan if "adversarial" in names else None,
        ),
        data=Photos(size=64, flip=True),
        run_dir="runs/photos_tokenizer" + "".join(f"_{name}" for name in names if name != "plain"),
        batch_size=8,
        steps=600,
        log_every=20,
        eval_every=200,
        save_every=200,
        preview_every=200,
    )
    return config_tree.override(experiment, [CHANGES[name] for name in names if CHANGES[name]])
