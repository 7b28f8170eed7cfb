"""Image generation in JAX: VAR and MAR (arXiv 2404.02905 and 2406.11838).

    import varjax
    model = varjax.load("runs/digits")
    images = model.sample([3, 1, 4], seed=0)

An array's name ends in its shape, in the same letters throughout: B batch, N items, L tokens of
an image, l those of one scale, n known ones, m new ones, K scales, C width or channels, A attention
heads, D head size, S stacked layers, U draws (augmentations, noise levels), V vocabulary, Z latent
channels, h w token map, H W image height and width, J diffusion steps, P φ convolutions, E any
wider layer, F frequencies. A digit is that length.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":  # it lacks modules of Python that lock files and count memory
    raise ImportError(
        "varjax does not run on Windows itself; use it in WSL (https://learn.microsoft.com/windows/wsl)"
    )

if TYPE_CHECKING:
    from varjax.families import load
    from varjax.mar.model import MARConfig
    from varjax.mar.options import MAROptions
    from varjax.mar.pipeline import MARPipeline
    from varjax.nn.compute import ComputeConfig
    from varjax.storage.image_io import read_image
    from varjax.tokenizers.kl.model import KLConfig
    from varjax.tokenizers.load import load_tokenizer
    from varjax.tokenizers.vq.model import VQConfig
    from varjax.tokenizers.vq.pyramid import SCALES_256, SCALES_512, SCALES_1024
    from varjax.var.model import VARConfig
    from varjax.var.pipeline import VARPipeline
    from varjax.var.sample import VAROptions

__version__ = "0.1.0"

# Imported when asked for: processes that only read data then do without JAX (0.2 GB each).
_WHERE = {
    "SCALES_256": "tokenizers.vq.pyramid",
    "SCALES_512": "tokenizers.vq.pyramid",
    "SCALES_1024": "tokenizers.vq.pyramid",
    "ComputeConfig": "nn.compute",
    "MARConfig": "mar.model",
    "MAROptions": "mar.options",
    "MARPipeline": "mar.pipeline",
    "KLConfig": "tokenizers.kl.model",
    "VAROptions": "var.sample",
    "VARPipeline": "var.pipeline",
    "VARConfig": "var.model",
    "VQConfig": "tokenizers.vq.model",
    "load": "families",
    "load_tokenizer": "tokenizers.load",
    "read_image": "storage.image_io",
}

__all__ = [
    "SCALES_256",
    "SCALES_512",
    "SCALES_1024",
    "ComputeConfig",
    "KLConfig",
    "MARConfig",
    "MAROptions",
    "MARPipeline",
    "VAROptions",
    "VARPipeline",
    "VARConfig",
    "VQConfig",
    "load",
    "load_tokenizer",
    "read_image",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"varjax.{_WHERE[name]}"), name)
