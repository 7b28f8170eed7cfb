"""Serves a web page that samples and edits images, and shows them step by step.

varjax demo --weights=runs/digits
varjax demo --weights=runs/digits --also=runs/digits_mar --port=8000

The page is served to this machine only, and needs no connection to any other. It needs Gradio:
pip install ".[demo]" in the folder of varjax.
"""

import argparse
import importlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import get_args

from varjax.config.numbers import whole_number
from varjax.demo.drawing import DemoModel
from varjax.errors import InputError, needs_extra
from varjax.models import Dtype, family_of, load, open_model
from varjax.runtime.commands import command_parser, run_command
from varjax.tokenizers.losses.lpips import check_lpips_images, load_lpips
from varjax.trees import PyTree

HOST, PORT = "127.0.0.1", 7860
MOST_PORT = 65535


def open_demo(arguments: list[str]) -> None:
    """Reads the command line, loads the models and serves the page until Ctrl-C.

    Raises InputError, before any long work, if a flag is wrong or Gradio is not installed.
    """
    flags = _parser().parse_args(arguments)
    whole_number("port", flags.port, 1, MOST_PORT, allowed=f"1 … {MOST_PORT}")
    with tempfile.TemporaryDirectory(prefix="varjax_demo_") as folder:
        # Gradio reads these when it is imported.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        # Gradio asks for the page once before it serves it, which must not go through a proxy.
        bypassed = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1,localhost"]
        for name in ("no_proxy", "NO_PROXY"):
            os.environ[name] = ",".join([*filter(None, bypassed), flags.host])
        with needs_extra("demo", "gradio", "the page"):
            importlib.import_module("gradio")
        from varjax.demo.server import check_address, serve_page

        check_address(flags.host, flags.port)
        lpips = load_lpips(flags.lpips) if flags.lpips else None
        locations = [flags.weights, *([] if flags.also is None else [flags.also])]
        models = [open_demo_model(location, flags.dtype, lpips) for location in locations]
        check_same_images(models)
        serve_page(models, flags.host, flags.port, flags.share == "true", pathlib.Path(folder))


def open_demo_model(location: str, dtype: Dtype = "auto", lpips: PyTree | None = None) -> DemoModel:
    """Loads a model for the page.

    Args:
        location: training run, converted directory, or name of a published model.
        dtype: dtype of the model; see `varjax.load`.
        lpips: parameters of LPIPS, from `load_lpips`; None to leave it out.

    Raises:
        InputError: there is no such model, or LPIPS cannot compare its images.
    """
    weights = open_model(location)
    family = family_of(weights)
    sampler = load(weights, dtype)
    if lpips is not None:
        check_lpips_images(sampler.image_shape)
    return DemoModel(location, sampler, dtype, family.keeps_scales, lpips)


def check_same_images(models: Sequence[DemoModel]) -> None:
    """Raises InputError if models of a page have different classes or image shapes.

    The tabs share the choice of classes and the picture to edit between all models.
    """
    first = models[0]
    for model in models[1:]:
        for name, about in (("classes", "number of classes"), ("image_shape", "shape of images")):
            own, expected = (getattr(x.sampler, name) for x in (model, first))
            if own != expected:
                raise InputError(
                    f"also={model.location}: its {about} is {own}, and that of {first.location} is "
                    f"{expected}; give a model with the same one, or open a page for each"
                )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("varjax demo", __doc__)
    add = parser.add_argument
    about = (
        "training run (also RUN@STEP, RUN@best), converted weights, or published model: var_d16 …"
    )
    add("--weights", required=True, help=about)
    add("--also", help="second model, to compare with the first one")
    about = "converted weights of LPIPS, to compare reconstructions with their originals"
    add("--lpips", default="", metavar="DIR", help=about)
    add("--port", type=int, default=PORT, help="port of the page's address (%(default)s)")
    about = "address to listen on; 0.0.0.0 serves everyone who can reach this machine (%(default)s)"
    add("--host", default=HOST, help=about)
    about = "create a public link through Gradio's servers (%(default)s)"
    add("--share", choices=("true", "false"), default="false", help=about)
    about = "dtype of the matmuls (auto: float32 on a CPU, else bfloat16)"
    add("--dtype", choices=get_args(Dtype), default="auto", help=about)
    return parser


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    return run_command("varjax demo", lambda: open_demo(arguments), interrupted="stopped")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
