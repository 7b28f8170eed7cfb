"""Runs the commands of `varjax`, such as `varjax train`."""

import importlib
import sys

import varjax
from varjax.errors import did_you_mean
from varjax.runtime.commands import escape_unprintable

# A command's module is imported only when it runs: some need no JAX, and some set it up themselves.
COMMANDS = {
    "train": ("varjax.cli.train", "train what a config file describes, or continue a run"),
    "sample": ("varjax.cli.sample", "draw images from a trained or converted model"),
    "edit": ("varjax.cli.edit", "redraw parts of an image"),
    "vary": ("varjax.cli.vary", "draw variations of an image (VAR)"),
    "upscale": ("varjax.cli.upscale", "draw the details of a small picture (VAR)"),
    "demo": ("varjax.demo.__main__", "open a page that draws and edits images in a browser"),
    "info": ("varjax.cli.info", "describe a picture, samples, a run or weights"),
    "convert": (
        "varjax.convert.__main__",
        "convert official PyTorch weights to varjax's, and back",
    ),
    "export": ("varjax.export.__main__", "write a folder that samples with JAX, without varjax"),
    "models": ("varjax.convert.model_list", "list the published models, by name"),
    "evaluate": ("varjax.evaluation.__main__", "measure samples: FID, Inception Score, recall …"),
    "evaluate-tokenizer": ("varjax.evaluation.tokenizer", "measure a tokenizer's reconstructions"),
    "train-classifier": (
        "varjax.evaluation.train_classifier",
        "train a small classifier of a dataset, whose features measure samples",
    ),
    "prepare": ("varjax.cli.prepare", "pack a folder of images into a few large files"),
    "cache-latents": ("varjax.cli.cache_latents", "run a tokenizer over its images once"),
    "runs": (
        "varjax.analysis.runs",
        "list training runs: state, step, loss and speed",
    ),
    "plot": ("varjax.analysis.plot", "draw the curves of training runs"),
    "scaling": ("varjax.analysis.scaling", "fit scaling laws to runs of different sizes"),
    "benchmark": ("varjax.benchmark.__main__", "measure speed, memory and communication"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
        arguments: name of the command and its arguments; None for those of this process.

    Returns:
        0 on success, 1 after an error, 2 for a wrong command line, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else ""
    if name in COMMANDS:
        return importlib.import_module(COMMANDS[name][0]).main(arguments[1:])
    if name == "--version":
        print(f"varjax {varjax.__version__}")
        return 0
    escape_unprintable()
    if name in ("-h", "--help"):
        print(_usage(""))
        return 0
    if hint := did_you_mean(name, COMMANDS):
        print(f"varjax: there is no command {name!r}{hint} See varjax --help", file=sys.stderr)
    else:
        print(_usage(name), file=sys.stderr)
    return 2


def _usage(unknown: str) -> str:
    lines = [f"varjax: there is no command {unknown!r}"] if unknown else []
    lines += ["usage: varjax COMMAND --help", ""]
    lines += [f"  {name:<20}{about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(lines)
