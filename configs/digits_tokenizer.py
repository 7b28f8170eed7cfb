"""A multi-scale tokenizer for handwritten digits: 8x8 images become 30 tokens at 4 scales.

    python train.py --config=configs/digits_tokenizer.py

Append `:single_scale` for a single map of 16 tokens, which configs/digits_mar.py:codes needs.

Two CPU cores: 1.5 minutes, 1 GB. Expected at the end: eval/psnr 27, eval/usage/3 0.99. Everything
except the data follows from the size of the images, as in configs/small_tokenizer.py; --help lists
all settings.
"""

import dataclasses

from varjax.data.sources import Digits
from varjax.errors import InputError
from varjax.tokenizers.vq.task import VQTask
from varjax.training.experiment import Experiment

from ._small import small_tokenizer


def get_config(arg: str = "") -> Experiment:
    if arg not in ("", "single_scale"):
        raise InputError(f"cannot read {arg!r}; allowed is single_scale")
    data = Digits(shift=0.15, rotate=3.0, zoom=0.03)
    experiment = small_tokenizer(data, run_dir="runs/digits_tokenizer")
    if arg:
        assert isinstance(experiment.task, VQTask)
        model = dataclasses.replace(experiment.task.model, scales=(4,))
        task = dataclasses.replace(experiment.task, model=model)
        return dataclasses.replace(experiment, task=task, run_dir=f"{experiment.run_dir}_{arg}")
    return experiment
