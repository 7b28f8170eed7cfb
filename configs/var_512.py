"""VAR on ImageNet at 512 pixels: d36 with shared AdaLN, as the authors trained it.

    python train.py --config=configs/var_512.py

To train on images other than TFDS's ImageNet, name them as in configs/var.py
(configs/var_512.py:d36,data=…). The released tokenizer serves both sizes; convert it with the
scales for 512 pixels:

    varjax convert --repo=FoundationVision/var --tokenizer=vae_ch160v4096z32.pth \
        --scales=1,2,3,4,6,9,13,18,24,32 --out=weights/tokenizer_512

2.35 B parameters and 2,240 tokens per image. Hardware: 64 or more GPUs or TPU chips. Published: FID
2.63 after 350 epochs with batch size 768; no training time.
"""

from varjax.training.experiment import Experiment

from ._arguments import read_argument, split_argument
from .var import SPREAD, Recipe, experiment

RECIPES = {
    "d36": Recipe(
        batch_size=768,
        epochs=350,
        base_lr=8e-5,
        end=0.01,
        weight_decay_end=0.08,
        remat="block",
        mesh=SPREAD,
    )
}


def get_config(arg: str = "d36") -> Experiment:
    size, data, _ = read_argument(split_argument(arg), RECIPES)
    return experiment(size, RECIPES[size], data, tokenizer_weights="weights/tokenizer_512")
