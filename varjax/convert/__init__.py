"""Weights of the official PyTorch VAR: from there, and back.

python -m varjax.convert --tokenizer=vae_ch160v4096z32.pth --var=var_d16.pth --out=weights/d16
"""

from varjax.convert.from_torch import convert
from varjax.convert.infer_config import Choices
from varjax.convert.lpips import convert_lpips
from varjax.convert.to_torch import export_run, export_torch

__all__ = ["Choices", "convert", "convert_lpips", "export_run", "export_torch"]
