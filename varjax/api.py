"""The public names of `varjax`, listed once: `varjax.load` is the `load` of this module."""

import importlib
from typing import TYPE_CHECKING

from varjax.mar.model import MARConfig as MARConfig
from varjax.mar.pipeline import MARPipeline as MARPipeline
from varjax.mar.sample import MAROptions as MAROptions
from varjax.models import load as load
from varjax.models import load_tokenizer as load_tokenizer
from varjax.nn.compute import ComputeConfig as ComputeConfig
from varjax.sampling.paste import paste as paste
from varjax.sampling.pictures import save as save
from varjax.sampling.pictures import show as show
from varjax.sampling.sampler import image_keys as image_keys
from varjax.storage.image_io import read_image as read_image
from varjax.tokenizers.kl.model import KLConfig as KLConfig
from varjax.tokenizers.vq.model import VQConfig as VQConfig
from varjax.tokenizers.vq.pyramid import SCALES_256 as SCALES_256
from varjax.tokenizers.vq.pyramid import SCALES_512 as SCALES_512
from varjax.tokenizers.vq.pyramid import SCALES_1024 as SCALES_1024
from varjax.var.model import VARConfig as VARConfig
from varjax.var.pipeline import VARPipeline as VARPipeline
from varjax.var.sample import VAROptions as VAROptions

# These are imported when they are used, because their modules need much that sampling does not: the
# training loop, datasets, readers of PyTorch's files.
LATER = {
    "Features": ("varjax.evaluation.in_python", "Features"),
    "convert_weights": ("varjax.convert.from_torch", "convert"),
    "evaluate": ("varjax.evaluation.in_python", "evaluate_samples"),
    "fid": ("varjax.evaluation.in_python", "fid"),
    "list_models": ("varjax.convert.model_list", "list_models"),
    "export_model": ("varjax.export.folder", "export_model"),
    "load_exported": ("varjax.export.sampler", "load_exported"),
    "load_config": ("varjax.config.config_flags", "load_config"),
    "train": ("varjax.cli.train", "train_experiment"),
}

if TYPE_CHECKING:
    from varjax.cli.train import train_experiment
    from varjax.config.config_flags import load_config as load_config
    from varjax.convert.from_torch import convert
    from varjax.convert.model_list import list_models as list_models
    from varjax.evaluation.in_python import Features as Features
    from varjax.evaluation.in_python import evaluate_samples
    from varjax.evaluation.in_python import fid as fid
    from varjax.export.folder import export_model as export_model
    from varjax.export.sampler import load_exported as load_exported

    convert_weights, evaluate, train = convert, evaluate_samples, train_experiment
else:

    def __getattr__(name):
        if name not in LATER:
            raise AttributeError(f"module 'varjax' has no attribute {name!r}")
        module, attribute = LATER[name]
        return getattr(importlib.import_module(module), attribute)

    def __dir__():
        names = globals().keys() - {"importlib", "TYPE_CHECKING", "LATER"} | LATER.keys()
        return sorted(name for name in names if not name.startswith("_"))
