"""A multi-scale tokenizer for handwritten digits: 8x8 images become 30 tokens at 4 scales.

    python train.py --config=configs/digits_tokenizer.py

Two CPU cores: 1.5 minutes, 1 GB. Expected at the end: eval/psnr 27, eval/usage/3 0.99. All but the
data follows from the size of the images, as in configs/small_tokenizer.py; --help lists it.
"""

from varjax.data.sources import Digits
from varjax.training.experiment import Experiment

from ._small import small_tokenizer


def get_config() -> Experiment:
    data = Digits(shift=0.15, rotate=3.0, zoom=0.03)
    return small_tokenizer(data, run_dir="runs/digits_tokenizer")
