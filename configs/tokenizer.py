"""The multi-scale tokenizer of VAR, trained with every loss of the paper (its eq. 5).

    python train.py --config=configs/tokenizer.py:256

After the colon, separated by commas: 256 or 512 (pixels), no_lpips, and where the images are, as in
configs/var.py:

    configs/tokenizer.py:256,data=folder:/data/images     folders train/… and val/…
    configs/tokenizer.py:512,no_lpips                      without the perceptual loss
    configs/tokenizer.py:256,data=random                   noise, to try the recipe and its speed

The perceptual loss needs two downloads (docs/convert.md); without them, use no_lpips. To start from
the released tokenizer, add --config.init_from=weights/tokenizer. A run for 512 pixels can start
from a tokenizer for 256 pixels in this way: only the scales differ.

The authors never released their recipe. These numbers come from

    their single-scale trainer      L1 0.2, L2 1, LPIPS 1, β 0.25; AdamW (0.5, 0.9) at 3e-4 for a
                                    batch of 768, 250 epochs, EMA 0.9999; the discriminator from
                                    20 % of the run on, over 2 %
    XQ-GAN                          adversarial weight 0.5 × adaptive, LeCam 0.001, DiffAugment
    taming-transformers             PatchGAN with the hinge loss, 64 channels, 3 layers
    ours                            schedule (warm-up 1 %, then half a cosine to 1 %), clip 1, no
                                    weight decay, the discriminator's optimizer like the tokenizer's

Both sources use a discriminator over frozen DINO features, which is not implemented here. Published
for multi-scale codes of this size: rFID 0.80 (XQ-GAN), 0.92 (the released VAR tokenizer).

109 M parameters, and 2.8 M in the discriminator. Convolutions are bfloat16 on accelerators; the
quantizer, evaluation and all later uses of the tokenizer are float32. To train on fewer devices,
keep the batch size and set --config.task.accumulate: the result does not change.
"""

from varjax.data.sources import parse_dataset
from varjax.tokenizers.losses.gan import GANConfig
from varjax.tokenizers.losses.lpips import LPIPSConfig
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.pyramid import SCALES_256, SCALES_512
from varjax.tokenizers.vq.task import VQTask
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW

from ._arguments import read_argument, split_words

SCALES = {"256": SCALES_256, "512": SCALES_512}


def get_config(arg: str = "256") -> Experiment:
    size, data, options = read_argument(split_words(arg), SCALES, ("no_lpips",))
    model = VQConfig(scales=SCALES[size])
    optimizer = AdamW(
        base_lr=1e-4,  # for 256 images
        b1=0.5,
        b2=0.9,
        weight_decay=0.0,
        clip=1.0,
        schedule="cos",
        warmup=0.01,
        end=0.01,
    )
    gan = GANConfig(
        kind="patch",
        loss="hinge",
        weight=0.5,
        start=0.2,
        ramp=0.02,
        lecam=1e-3,
        diffaugment=("color", "translation", "cutout"),
        optimizer=optimizer,
    )
    without = "_no_lpips" if "no_lpips" in options else ""
    return Experiment(
        task=VQTask(
            model=model,
            optimizer=optimizer,
            l1=0.2,
            l2=1.0,
            beta=0.25,
            perceptual=None if without else LPIPSConfig("weights/lpips", weight=1.0),
            gan=gan,
            dtype="auto",
            ema_decay=0.9999,
        ),
        data=parse_dataset(data, model.image_shape[0]),
        run_dir=f"runs/tokenizer_{size}{without}",
        batch_size=768,
        epochs=250,
        log_every=50,
        eval_every=5000,
        save_every=1000,
        preview_every=5000,
    )
