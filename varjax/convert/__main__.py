"""Converts weights: official PyTorch files <-> varjax, training runs, LPIPS, FID's Inception.

varjax convert --tokenizer=vae_ch160v4096z32.pth --var=var_d16.pth --out=weights/d16
varjax convert --mar=checkpoint-last.pth --kl=kl16.ckpt --out=weights/mar_b
varjax convert --repo=FoundationVision/var --tokenizer=… --var=… --out=weights/d16
varjax convert --run=runs/x --out=weights/x
varjax convert --to_torch --weights=weights/x --out=for_pytorch [--layout=diffusers]
varjax convert --lpips_vgg=vgg16.pth --lpips_heads=vgg.pth --out=weights/lpips
varjax convert --inception=classify_image_graph_def.pb --out=weights/inception
varjax convert --resnet=resnet101-63fe2227.pth --out=weights/resnet101
"""

import argparse
import sys
from collections.abc import Mapping
from typing import Any, get_args

from varjax.convert import (
    convert,
    convert_inception,
    convert_lpips,
)
from varjax.convert.from_torch import check_request
from varjax.convert.name_maps import kinds, option_fields
from varjax.convert.pretrained import download
from varjax.errors import InputError
from varjax.runtime.commands import command_parser, run_command
from varjax.storage.buckets import as_path
from varjax.weight_files import Layout, convert_run, convert_to_torch


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error) or 2 (wrong usage)."""
    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    flags = parser.parse_args(arguments)
    return run_command("varjax convert", lambda: _run(flags), flags.debug)


def _run(flags: argparse.Namespace) -> None:
    _check_flags(flags)
    if flags.to_torch:
        convert_to_torch(flags.weights, flags.out, flags.ema, flags.layout or "official")
    elif flags.run is not None:
        convert_run(flags.run, flags.out, flags.ema)
    elif flags.inception is not None:
        convert_inception(flags.out, flags.inception)
    elif flags.lpips_vgg is not None:
        convert_lpips(flags.out, flags.lpips_vgg, flags.lpips_heads)
    else:
        files = {flag: file for flag in kinds() if (file := getattr(flags, flag)) is not None}
        options = _options(flags)
        if flags.repo:
            check_request(as_path(flags.out), files)  # before gigabytes are downloaded
            files = {
                flag: download(flags.repo, file, flags.revision) for flag, file in files.items()
            }
        for part, config in convert(flags.out, options, flags.ema, **files).items():
            print(f"{part}: {config}")
    print(f"{flags.out} is written")


def _check_flags(flags: argparse.Namespace) -> None:
    """Raises InputError unless the flags choose one job, and all of them are used in it."""
    given = {name for name, value in vars(flags).items() if value is not None} - {"out", "debug"}
    jobs = (  # the flags that choose a job, and those that it also takes
        ({*kinds()}, {"repo", "revision", "ema", *_option_flags()}),
        ({"run"}, {"ema"}),
        ({"to_torch"}, {"weights", "layout", "ema"}),
        ({"lpips_vgg", "lpips_heads"}, set()),
        ({"inception"}, set()),
    )
    chosen = [(needed & given, needed | others) for needed, others in jobs if needed & given]
    if len(chosen) != 1:
        official = ", ".join(f"--{flag}" for flag in kinds())
        raise InputError(
            f"give files ({official}), or --run, or --to_torch, or --lpips_vgg, or --inception"
        )
    ((job, allowed),) = chosen
    if unused := sorted(given - allowed):
        names = ", ".join(f"--{'no-' * (getattr(flags, name) is False)}{name}" for name in unused)
        raise InputError(f"{names}: not used with --{', --'.join(sorted(job))}; leave it out")
    for first, second in (("to_torch", "weights"), ("lpips_vgg", "lpips_heads")):
        if (first in given) != (second in given):
            raise InputError(f"--{first} and --{second} belong together; give both")
    if "revision" in given and "repo" not in given:
        raise InputError("--revision is that of a repository; give --repo as well")


def _option_flags() -> dict[str, Mapping[str, Any]]:
    """Returns the metadata of the options that are flags, by name."""
    return {name: about for name, about in option_fields().items() if "help" in about}


def _options(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the options on the command line, by name."""
    options = {}
    for name, about in _option_flags().items():
        if (value := getattr(flags, name)) is not None:
            try:
                options[name] = about["parse"](value) if about["parse"] else value
            except ValueError:
                raise InputError(f"{name}={value}: give {about['form']}") from None
    return options


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("varjax convert", __doc__)
    add = parser.add_argument
    add("--out", required=True, help="directory to write")
    for flag, kind in kinds().items():
        add(f"--{flag}", metavar="FILE", help=f"official weights of {kind.description}")
    add("--repo", help="Hugging Face repository to download the files from")
    add("--revision", help="branch, tag or commit of the repository (the known commit, else main)")
    for name, about in _option_flags().items():
        if about["parse"] is None:
            add(f"--{name}", action="store_true", default=None, help=about["help"])
        else:
            number = about["parse"] if about["parse"] in (int, float) else str
            add(f"--{name}", type=number, help=about["help"])
    add("--run", help="training run (also RUN@STEP, RUN@best) to write as weights")
    about = "write --weights as files for the official code"
    add("--to_torch", action="store_true", default=None, help=about)
    add(
        "--layout",
        choices=get_args(Layout),
        help="whose tensor names a KL tokenizer's file gets (official)",
    )
    add("--weights", help="converted weights, training run, or published model: var_d16 …")
    add(
        "--inception", metavar="FILE", help="Inception-v3 for FID, .pth or .pb (docs/evaluation.md)"
    )
    add("--lpips_vgg", help="vgg16 of torchvision, for the perceptual loss of a tokenizer")
    add("--lpips_heads", help="heads of the lpips package for vgg16, weights/v0.1/vgg.pth")
    add(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="use the EMA weights of a run or checkpoint (default: if it has any, unless the "
        "others were the run's best); --no-ema uses the others",
    )
    add("--debug", action="store_true", help="print tracebacks of input errors, too")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
