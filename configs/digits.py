"""A transformer that draws handwritten digits of any class, over configs/digits_tokenizer.py.

    python train.py --config=configs/digits.py

The tokenizer must be trained first. Two CPU cores: 3 minutes, 1.5 GB. Expected at the end:
eval_ema/loss 3.31; `make demo` reports on the samples.
"""

from varjax.data.sources import Digits
from varjax.nn.compute import Compute
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW
from varjax.var.model import VARConfig
from varjax.var.sample import VAROptions
from varjax.var.task import VARTask

from . import digits_tokenizer


def get_config() -> Experiment:
    tokenizer_run = digits_tokenizer.get_config()
    tokenizer = tokenizer_run.task.model
    model = VARConfig(
        depth=6,
        width=128,
        heads=4,
        classes=10,
        scales=tokenizer.scales,
        vocab=tokenizer.vocab,
        code_channels=tokenizer.code_channels,
        gate_init=1e-2,
    )
    return Experiment(
        task=VARTask(
            model=model,
            tokenizer=tokenizer,
            tokenizer_weights=tokenizer_run.run_dir,
            optimizer=AdamW(base_lr=8e-3, schedule="cos", warmup=0.05),
            ema=0.99,
            compute=Compute(unroll=True),
            sampling=VAROptions(cfg=0.25, top_k=0, top_p=0.0),
        ),
        data=Digits(shift=0.3, rotate=6.0, zoom=0.06),
        run_dir="runs/digits",
        batch_size=64,
        steps=1000,
        eval_every=100,
        save_every=200,
        preview_every=500,
        keep_best="eval_ema/loss",
    )
