"""Fine-tunes configs/digits.py by condition contrastive alignment (CCA): no guidance afterwards.

    python train.py --config=configs/digits_cca.py

The runs of configs/digits_tokenizer.py and configs/digits.py must be finished first. Two CPU cores:
about a minute. docs/finetuning.md has the results.

β is larger and λ smaller than in configs/var_cca.py: an image has 30 tokens instead of 680, so its
log-ratios are smaller, and digits need little guidance.
"""

import dataclasses

from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW
from varjax.var.cca import CCAConfig
from varjax.var.sample import VAROptions
from varjax.var.task import VARTask

from . import digits


def get_config() -> Experiment:
    pretraining = digits.get_config()
    assert isinstance(pretraining.task, VARTask)
    start = pretraining.run_dir
    task = dataclasses.replace(
        pretraining.task,
        tokenizer_weights=start,
        optimizer=AdamW(base_lr=1.6e-3, schedule="lin0", end=0.1),
        ema_decay=0.0,
        sampling=VAROptions(guidance=1.0, top_k=0, top_p=0.0),
        cca=CCAConfig(reference=start, negative_weight=2.0, beta=0.5),
    )
    return dataclasses.replace(
        pretraining,
        task=task,
        run_dir="runs/digits_cca",
        init_from=start,
        steps=100,
        eval_every=0,
        save_every=100,
        preview_every=0,
        keep_best="",
    )
