"""A transformer that draws your own small images by class, over configs/small_tokenizer.py.

    python train.py --config=configs/small.py:data=folder:DIR,size=28
    python sample.py --weights=runs/DIR_28 --labels=all

The tokenizer must be trained first, with the same text after the colon; `,tokenizer=RUN` names a
run elsewhere. A run that starts from another one (--config.init_from=RUN) needs no tokenizer: it
uses RUN's, unless `tokenizer=` names one. The transformer has 6 layers of width 192 (128 for 8
pixels); the runs are named after the folder.

Two CPU cores, 28 pixels: 20 to 40 minutes, 3 GB. On Fashion-MNIST, a classifier assigns 95 % of
the samples to the requested class (docs/comparison.md). With `,quality=good` it trains up to 20
times as long: a night, by estimate.
"""

import dataclasses

from varjax.training.experiment import Experiment

from ._small import small_tokenizer, small_var
from ._small_data import read_small_run


def get_config(arg: str = "") -> Experiment:
    run = read_small_run(arg)
    tokenizer_run = small_tokenizer(run.data, run.tokenizer_run())
    experiment = small_var(run.data, tokenizer_run, f"runs/{run.name}", run.quality)
    # A tokenizer that is named here is used also where init_from has another one.
    return dataclasses.replace(experiment, init_tokenizer=not run.tokenizer)
