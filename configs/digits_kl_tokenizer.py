"""A KL tokenizer for handwritten digits: 8x8 images become 4x4 latents of 4 channels.

    python train.py --config=configs/digits_kl_tokenizer.py

Two CPU cores: 2 minutes, 1.1 GB. Expected at the end: eval_ema/psnr 30.0, eval/kl 199,
eval_ema/latent_std 1.13.

The weight of the KL divergence is far above LDM's 1e-6. With 1e-3, the latents have a standard
deviation near 1, and the posterior's standard deviation is about a twentieth of that.
"""

from varjax.data.sources import Digits
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.kl.task import KLTask
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW


def get_config() -> Experiment:
    model = KLConfig(
        image_size=8,
        image_channels=1,
        width=24,
        channel_mult=(1, 2),
        blocks=1,
        groups=8,
        latent_channels=4,
    )
    optimizer = AdamW(base_lr=8e-3, weight_decay=0.0, clip=1.0, schedule="cos", warmup=0.05)
    return Experiment(
        task=KLTask(model=model, optimizer=optimizer, l1=0.2, l2=1.0, kl=1e-3, ema_decay=0.99),
        data=Digits(shift=0.15, rotate=3.0, zoom=0.03),
        run_dir="runs/digits_kl_tokenizer",
        batch_size=64,
        steps=700,
        eval_every=350,
        eval_images=2000,  # more than there are
        save_every=250,
        preview_every=350,
    )
