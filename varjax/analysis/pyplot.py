"""Loads Matplotlib, which only pictures of numbers need, for files instead of a screen."""

from types import ModuleType

from varjax.errors import needs_extra


def load_pyplot() -> ModuleType:
    """Imports matplotlib.pyplot; commands call it before long work that ends in a picture.

    Raises InputError if Matplotlib is not installed.
    """
    with needs_extra("plot", "matplotlib", "drawing curves"):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    return pyplot
