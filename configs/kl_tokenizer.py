"""The KL tokenizer of MAR and of latent diffusion (KL-16), trained by LDM's recipe.

    python train.py --config=configs/kl_tokenizer.py:256

After the colon, separated by commas: 256 or 512 (pixels), no_lpips, and where the images are, as in
configs/var.py:

    configs/kl_tokenizer.py:256,data=folder:/data/images  folders train/… and val/…
    configs/kl_tokenizer.py:512,no_lpips                   without the perceptual loss
    configs/kl_tokenizer.py:256,data=random                noise, to try the recipe and its speed

The perceptual loss needs two downloads (docs/convert.md); without them, use no_lpips. To start from
the released tokenizer, add --config.init_from=weights/kl16 (docs/convert.md). A run for 512 pixels
can start from a tokenizer for 256 pixels in this way.

MAR's authors never released their recipe. These numbers come from

    LDM's autoencoder_kl_16x16x16      L1 1, LPIPS 1, KL 1e-6; Adam (0.5, 0.9) at 4.5e-6 for each
                                       image of the batch, constant, no clipping; PatchGAN with the
                                       hinge loss, 64 channels, 3 layers, 0.5 × adaptive (at most
                                       0.05 at 256 px, as LDM's code bounds it), from update
                                       50,001 on: after 10 % of this run on ImageNet
    ours                               batch 96, 38 epochs (507,000 updates), EMA 0.999

Two things are left out: BatchNorm in the discriminator, and LDM's log variance, which LDM does not
optimize either (see `KLTask`).

66.5 M parameters, and 2.8 M in the discriminator. Convolutions are bfloat16 on accelerators; the
posterior, evaluation and all later uses of the tokenizer are float32. Training measures the
standard deviation of the latents, by which MAR divides them, and stores it with the weights
("latent_std" in metrics.jsonl).
"""

from varjax.data.sources import parse_dataset
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.kl.task import KLTask
from varjax.tokenizers.losses.gan import GANConfig
from varjax.tokenizers.losses.lpips import LPIPSConfig
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW

from ._arguments import read_argument, split_words


def get_config(arg: str = "256") -> Experiment:
    size, data, options = read_argument(split_words(arg), ("256", "512"), ("no_lpips",))
    model = KLConfig(image_size=int(size))
    optimizer = AdamW(
        base_lr=256 * 4.5e-6,  # for 256 images
        b1=0.5,
        b2=0.9,
        weight_decay=0.0,
        clip=0.0,
        schedule="constant",
        warmup=0.0,
    )
    gan = GANConfig(
        kind="patch", loss="hinge", weight=0.5, start=0.1, ramp=0.0, optimizer=optimizer
    )
    without = "_no_lpips" if "no_lpips" in options else ""
    return Experiment(
        task=KLTask(
            model=model,
            optimizer=optimizer,
            l1=1.0,
            kl=1e-6,
            perceptual=None if without else LPIPSConfig("weights/lpips", weight=1.0),
            gan=gan,
            dtype="auto",
            ema_decay=0.999,
        ),
        data=parse_dataset(data, model.image_shape[0]),
        run_dir=f"runs/kl_tokenizer_{size}{without}",
        batch_size=96,
        epochs=38,
        log_every=50,
        eval_every=5000,
        save_every=1000,
        preview_every=5000,
    )
