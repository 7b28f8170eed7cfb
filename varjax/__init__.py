"""Image generation by next-scale prediction (VAR, arXiv 2404.02905) in JAX.

    import varjax
    model = varjax.load("runs/digits")
    images = model.sample([3, 1, 4], seed=0)

The letters of array names, throughout: B batch, L tokens of all scales, l tokens of one scale,
K scales, C width, H heads, D head size, V vocabulary, Z code channels, N layers, h w token map,
H W image (in BHWC), P φ convolutions, E any wider layer; a digit is that length.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from varjax.core.image_io import read_image
    from varjax.nn.compute import Compute
    from varjax.tokenizers.vq.model import TokenizerConfig
    from varjax.tokenizers.vq.pyramid import SCALES_256, SCALES_512, SCALES_1024
    from varjax.var.load import load
    from varjax.var.model import VARConfig
    from varjax.var.pipeline import Pipeline
    from varjax.var.sample import Options

# Imported when asked for: processes that only read data then do without JAX (0.2 GB each).
_WHERE = {
    "SCALES_256": "tokenizers.vq.pyramid",
    "SCALES_512": "tokenizers.vq.pyramid",
    "SCALES_1024": "tokenizers.vq.pyramid",
    "Compute": "nn.compute",
    "Options": "var.sample",
    "Pipeline": "var.pipeline",
    "TokenizerConfig": "tokenizers.vq.model",
    "VARConfig": "var.model",
    "load": "var.load",
    "read_image": "core.image_io",
}

__all__ = [
    "SCALES_256",
    "SCALES_512",
    "SCALES_1024",
    "Compute",
    "Options",
    "Pipeline",
    "TokenizerConfig",
    "VARConfig",
    "load",
    "read_image",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"varjax.{_WHERE[name]}"), name)
