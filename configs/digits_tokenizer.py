"""A multi-scale tokenizer for handwritten digits: 8x8 images become 30 tokens at 4 scales.

    python train.py --config=configs/digits_tokenizer.py

Append `:single_scale` for a single map of 16 tokens, which configs/digits_mar.py:codes needs.

Two CPU cores: 1.5 minutes, 1 GB. Expected at the end: eval/psnr 27, eval/usage/3 0.99. For your own
small images, configs/small_tokenizer.py derives these numbers from their size.
"""

from varjax.data.sources import Digits
from varjax.errors import InputError
from varjax.tokenizers.vq.codebook import CodebookConfig
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.task import VQTask
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW


def get_config(arg: str = "") -> Experiment:
    if arg not in ("", "single_scale"):
        raise InputError(f"cannot read {arg!r}; allowed is single_scale")
    model = VQConfig(
        scales=(4,) if arg else (1, 2, 3, 4),  # token maps of 1x1 to 4x4
        image_channels=1,
        width=32,
        channel_mult=(1, 2),  # two levels: 8x8 pixels become 4x4 features
        blocks=1,
        groups=8,
        vocab=256,
        code_channels=16,
    )
    optimizer = AdamW(
        base_lr=8e-3,  # for a batch of 256: the peak is 2e-3
        weight_decay=0.0,
        clip=1.0,
        schedule="cos",
        warmup=0.05,  # of the run
    )
    return Experiment(
        task=VQTask(model=model, optimizer=optimizer, codebook=CodebookConfig(), ema_decay=0.99),
        data=Digits(shift=0.15, rotate=3.0, zoom=0.03),
        run_dir="runs/digits_tokenizer" + ("_single_scale" if arg else ""),
        batch_size=64,
        steps=1000,
        eval_every=250,
        eval_images=2000,  # more than there are
        save_every=250,
        preview_every=250,
    )
