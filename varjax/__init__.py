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
import importlib.util
import sys
from typing import TYPE_CHECKING

if sys.platform == "win32":  # it lacks modules of Python that lock files and count memory
    raise ImportError(
        "varjax does not run on Windows itself; use it in WSL (https://learn.microsoft.com/windows/wsl)"
    )

__version__ = "0.1.0"

if TYPE_CHECKING:
    from varjax.api import *  # noqa: F403
else:

    def __getattr__(name):
        # The public names are imported when one is used: processes that only read data then do
        # without JAX (0.2 GB each). Modules of the package are no such names.
        if name.startswith("_") or importlib.util.find_spec(f"varjax.{name}"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("varjax.api"), name)

    def __dir__():
        return [*globals(), *dir(importlib.import_module("varjax.api"))]
