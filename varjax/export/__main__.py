"""Writes a folder that samples, edits, encodes and decodes with JAX, without varjax.

varjax export --weights=runs/digits --out=exported/digits
varjax export --weights=var_d16 --what=sample,decode --platforms=cuda --batch_size=1,8 --out=d16

python exported/digits/run.py --labels=3,1,4 --seed=0 --out=samples.png draws the images that
varjax sample draws. To write weights that varjax reads, use varjax convert --run=RUN.
"""

import argparse
import sys

import jax

from varjax.cli.sample import add_model_flags, companions
from varjax.errors import InputError
from varjax.export.exported_model import PROGRAM_PLATFORMS
from varjax.export.folder import PLATFORMS, export_model
from varjax.export.programs import KINDS
from varjax.models import option_classes
from varjax.runtime.commands import command_parser, run_command
from varjax.sampling.sampler import add_option_flags, given_options


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    flags = _parser().parse_args(arguments)
    return run_command("varjax export", lambda: _run(flags))


def _run(flags: argparse.Namespace) -> None:
    sizes = () if flags.batch_size == "any" else flags.batch_size.split(",")
    if bad := [size for size in sizes if not size.isdecimal()]:
        raise InputError(f"batch_size={','.join(bad)}: give numbers such as 1,8, or any")
    what, platforms = flags.what.split(","), flags.platforms.split(",")
    export_model(
        flags.weights,
        flags.out,
        what=what,
        batch_sizes=[int(size) for size in sizes],
        platforms=platforms,
        dtype=flags.dtype,
        options=given_options(flags, option_classes()),
        **companions(flags),
    )
    here = PROGRAM_PLATFORMS.get(jax.default_backend(), jax.default_backend())
    draws = "sample" in what and here in platforms
    print(f"{flags.out} is written" + f"; draw: python {flags.out}/run.py --labels=0" * draws)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("varjax export", __doc__)
    add = parser.add_argument
    add_model_flags(parser)
    add("--out", required=True, help="folder to write; an existing one must be empty")
    add("--what", default=",".join(KINDS), help="programs to export, of %(default)s (all)")
    about = "numbers of images to compile programs for, such as 1,8, or any (%(default)s)"
    add("--batch_size", default="any", help=about)
    about = "platforms to compile for, of %(default)s (all); no such device is needed"
    add("--platforms", default=",".join(PLATFORMS), help=about)
    about = "dtype: auto (float32 on a CPU, else bfloat16), float32 or bfloat16"
    add("--dtype", default="auto", help=about)
    about = "options of the model (numbers remain options of run.py, the others are fixed)"
    add_option_flags(parser.add_argument_group(about), option_classes())
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
