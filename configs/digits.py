"""A transformer that draws handwritten digits of any class, over configs/digits_tokenizer.py.

    python train.py --config=configs/digits.py

The tokenizer must be trained first. Two CPU cores: 3 minutes, 1.5 GB. Expected at the end:
eval_ema/loss 3.31; `make demo` reports on the samples. Everything except the data follows from
the size of the images, as in configs/small.py; --help lists all settings.
"""

from varjax.data.sources import Digits
from varjax.training.experiment import Experiment

from . import digits_tokenizer
from ._small import small_var


def get_config() -> Experiment:
    data = Digits(shift=0.3, rotate=6.0, zoom=0.06)
    return small_var(data, digits_tokenizer.get_config(), run_dir="runs/digits")
