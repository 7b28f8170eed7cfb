"""Converts weights of the official PyTorch models; `varjax.weight_files` writes them back.

varjax convert --tokenizer=vae_ch160v4096z32.pth --var=var_d16.pth --out=weights/d16
"""

from varjax.convert.from_torch import convert
from varjax.convert.inception import convert_inception
from varjax.convert.lpips import convert_lpips
from varjax.convert.pretrained import resolve_weights

__all__ = [
    "convert",
    "convert_inception",
    "convert_lpips",
    "resolve_weights",
]
