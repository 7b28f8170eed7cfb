"""The command line of sample.py: new images."""

import argparse
import dataclasses
import typing
from typing import Any, TypeVar

import jax
import numpy as np

from varjax.core.errors import InputError
from varjax.sampling import job
from varjax.sampling.options import add_option_flags, given_options
from varjax.sampling.outputs import check_out, open_output
from varjax.var.load import Dtype, load
from varjax.var.sample import Options

OPTIONS = (Options,)  # of every family: which of them a model takes is known once it is loaded
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Common:
    """What drawing and editing are both asked; `options` are those that the user named."""

    weights: str
    count: int
    options: dict[str, Any]
    seed: int
    batch_size: int
    dtype: Dtype
    out: str

    def check(self) -> None:
        """Raises InputError for a number out of range."""
        for name in ("count", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be 1 or more")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed={self.seed}: must lie in 0 … {2**31 - 1}")


@dataclasses.dataclass(frozen=True)
class Request(Common):
    """New images: `count` of each of `labels`."""

    labels: str | None
    distributed: bool


def common_parser(usage: str, description: str, out: str, out_help: str) -> argparse.ArgumentParser:
    """Reads the fields of Common."""
    parser = argparse.ArgumentParser(usage, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--weights", required=True, help="a training run, or what varjax.convert wrote")
    add("--count", type=int, default=4, help="images of each class, or variations (4)")
    add_option_flags(parser, OPTIONS)
    add("--seed", type=int, default=0, help="another seed, other images (0)")
    add("--batch_size", type=int, default=32, help="images at a time on each device (32)")
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--out", default=out, help=out_help)
    return parser


def read_request(kind: type[T], flags: argparse.Namespace) -> T:
    """Returns the flags as a request of this kind, the sampling options gathered."""
    names = {field.name for field in dataclasses.fields(typing.cast(Any, kind))} - {"options"}
    fields = {name: getattr(flags, name) for name in names}
    return typing.cast(Any, kind)(options=given_options(flags, OPTIONS), **fields)


def parse(arguments: list[str]) -> Request:
    """Reads the command line; exits with its usage if it cannot be read."""
    parser = common_parser(
        "sample.py",
        "Draws images from a transformer. sample.py edit --help: changes parts of an image.",
        "samples.png",
        "FILE.png (a grid), FILE.npz or FOLDER (both go on where they were killed)",
    )
    parser.add_argument("--labels", help="classes, 0,1,2 or all (default: some, evenly spread)")
    parser.add_argument("--distributed", action="store_true", help="one of several processes")
    return read_request(Request, parser.parse_args(arguments))


def run(request: Request) -> None:
    """Samples and writes; raises InputError before any long work for what cannot be done."""
    request.check()
    check_out(request.out)
    if request.distributed:
        jax.distributed.initialize()
    model = load(request.weights, request.dtype)
    labels = choose_labels(request.labels, model.classes)
    options = model.options(**request.options)
    batch_size = min(request.batch_size, len(labels) * request.count)
    wanted = job.Job(labels, request.count, request.seed, options, batch_size)
    columns = request.count if request.count > 1 else None
    output = open_output(request.out, wanted.label_N, columns, wanted.seed, wanted.request(model))
    if message := job.run(model, wanted, output):
        print(message)


def choose_labels(text: str | None, classes: int) -> tuple[int, ...]:
    """The classes of "0,1,2" or "all"; without text up to ten, evenly spread."""
    if text is None:
        spread = np.linspace(0, classes - 1, min(classes, 10)).astype(int)
        return tuple(spread.tolist())
    if text == "all":
        return tuple(range(classes))
    try:
        labels = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"labels={text}: give numbers like 0,1,2, or all") from None
    if bad := [label for label in labels if not 0 <= label < classes]:
        raise InputError(f"labels {bad}: allowed are 0 … {classes - 1}")
    return labels
