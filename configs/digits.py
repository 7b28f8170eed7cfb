"""VAR on scikit-learn's digits (8x8 pixels), over configs/digits_tokenizer.py.

    python train.py --config=configs/digits.py

The tokenizer must be trained first. Two CPU cores: 3 minutes, 1.5 GB. Expected at the end:
eval_ema/loss 3.31; `make demo` reports on the samples. For your own small images, configs/small.py
derives these numbers from their size.
"""

from varjax.data.sources import Digits
from varjax.nn.compute import ComputeConfig
from varjax.tokenizers.vq.task import VQTask
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW
from varjax.var.model import VARConfig
from varjax.var.sample import VAROptions
from varjax.var.task import VARTask

from . import digits_tokenizer


def get_config() -> Experiment:
    tokenizer_run = digits_tokenizer.get_config()
    assert isinstance(tokenizer_run.task, VQTask)
    tokenizer = tokenizer_run.task.model
    model = VARConfig(
        depth=6,
        width=128,
        heads=4,
        classes=10,
        scales=tokenizer.scales,  # 30 tokens per image
        vocab=tokenizer.vocab,
        code_channels=tokenizer.code_channels,
        gate_init=1e-2,  # d16 has 1e-3
    )
    return Experiment(
        task=VARTask(
            model=model,
            tokenizer=tokenizer,
            tokenizer_weights=tokenizer_run.run_dir,
            optimizer=AdamW(
                base_lr=8e-3,  # for a batch of 256: the peak is 2e-3
                schedule="cos",
                warmup=0.05,  # of the run
            ),
            ema_decay=0.99,
            compute=ComputeConfig(unroll=True),  # faster at this size
            sampling=VAROptions(guidance=1.25, top_k=0, top_p=0.0),
        ),
        data=Digits(shift=0.3, rotate=6.0, zoom=0.06),
        run_dir="runs/digits",
        batch_size=64,
        steps=1000,
        eval_every=100,
        eval_images=2000,  # more than there are
        save_every=200,
        preview_every=500,
        keep_best="eval_ema/loss",
    )
