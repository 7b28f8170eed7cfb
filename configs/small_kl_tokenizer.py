"""A KL tokenizer for your own small images, 8 to 64 pixels, for configs/small_mar.py.

    python train.py --config=configs/small_kl_tokenizer.py:data=idx:DIR
    python train.py --config=configs/small_mar.py:data=idx:DIR    # then: the transformer

The text after the colon is that of configs/small_tokenizer.py, without single_scale. 28 pixels
become a map of 7x7 latents of 8 numbers. The rules are in configs/_small_mar.py.

Two CPU cores, 28 pixels: about 20 minutes, 2 GB.
"""

from varjax.training.experiment import Experiment

from ._small_data import read_small_run
from ._small_mar import small_kl_tokenizer


def get_config(arg: str = "") -> Experiment:
    run = read_small_run(arg)
    return small_kl_tokenizer(run.data, f"runs/{run.name}_kl_tokenizer", run.quality)
