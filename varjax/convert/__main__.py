"""Converts weights: official PyTorch files <-> varjax, training runs, LPIPS, FID's Inception.

varjax convert --tokenizer=vae_ch160v4096z32.pth --var=var_d16.pth --out=weights/d16
varjax convert --mar=checkpoint-last.pth --kl=kl16.ckpt --out=weights/mar_b
varjax convert --repo=FoundationVision/var --tokenizer=… --var=… --out=weights/d16
varjax convert --run=runs/x --out=weights/x
varjax convert --to_torch --weights=weights/x --out=for_pytorch [--layout=diffusers]
varjax convert --lpips_vgg=vgg16.pth --lpips_heads=vgg.pth --out=weights/lpips
varjax convert --inception=classify_image_graph_def.pb --out=weights/inception
"""

import argparse
import sys
from typing import get_args

from varjax.convert import (
    ConvertOptions,
    convert,
    convert_inception,
    convert_lpips,
)
from varjax.convert.from_torch import KINDS
from varjax.convert.pretrained import download
from varjax.errors import InputError
from varjax.export import Layout, export_run, export_torch
from varjax.runtime.commands import command_parser, run_command
from varjax.tokenizers.vq.pyramid import Scale


def main(arguments: list[str]) -> int:
    """Returns 0, 1 with one message for what cannot be done, 2 for a wrong command line."""
    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    flags = parser.parse_args(arguments)
    return run_command("varjax convert", lambda: _run(flags), flags.debug)


def _run(flags: argparse.Namespace) -> None:
    files = {flag: getattr(flags, flag) for flag in KINDS if getattr(flags, flag) is not None}
    lpips = flags.lpips_vgg is not None or flags.lpips_heads is not None
    inception = flags.inception is not None
    if [bool(files), flags.run is not None, flags.to_torch, lpips, inception].count(True) != 1:
        official = ", ".join(f"--{flag}" for flag in KINDS)
        raise InputError(
            f"give some of {official}; or --run, or --to_torch, or --lpips_vgg, or --inception"
        )
    if flags.to_torch != (flags.weights is not None):
        raise InputError("--to_torch and --weights=DIRECTORY_OR_RUN belong together")
    if flags.to_torch:
        export_torch(flags.weights, flags.out, flags.ema, flags.layout)
    elif flags.run:
        export_run(flags.run, flags.out, flags.ema)
    elif inception:
        convert_inception(flags.out, flags.inception)
    elif lpips:
        if not (flags.lpips_vgg and flags.lpips_heads):
            raise InputError("--lpips_vgg and --lpips_heads belong together: LPIPS is made of both")
        convert_lpips(flags.out, flags.lpips_vgg, flags.lpips_heads)
    else:
        if flags.repo:
            files = {
                flag: download(flags.repo, file, flags.revision) for flag, file in files.items()
            }
        options = ConvertOptions(
            scales=_parse_scales(flags.scales),
            heads=flags.heads,
            groups=flags.groups,
            phi_ratio=flags.phi_ratio,
            cosine_codes=flags.cosine_codes,
            latent_channels=flags.latent_channels,
            image_size=_parse_size(flags.image_size),
            latent_scale=flags.latent_scale,
            latent_shift=flags.latent_shift,
            mar_heads=_parse_heads(flags.mar_heads),
            ema=flags.ema,
        )
        for part, config in convert(flags.out, options, **files).items():
            print(f"{part}: {config}")
    print(f"{flags.out} is written")


def _parse_scales(text: str | None) -> tuple[Scale, ...] | None:
    """ "1,2,2x4" -> (1, 2, (2, 4))."""
    if text is None:
        return None
    try:
        return tuple(_parse_side(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"scales={text}: give side lengths like 1,2,4 or 1x1,2x4") from None


def _parse_size(text: str | None) -> Scale | None:
    """ "256" -> 256; "256x384" -> (256, 384)."""
    if text is None:
        return None
    try:
        return _parse_side(text)
    except ValueError:
        raise InputError(f"image_size={text}: give pixels like 256, or 256x384") from None


def _parse_heads(text: str | None) -> tuple[int, int] | None:
    """ "12,16" -> (12, 16)."""
    if text is None:
        return None
    try:
        encoder, decoder = map(int, text.split(","))
    except ValueError:
        raise InputError(f"mar_heads={text}: give the encoder's and decoder's, 12,12") from None
    return encoder, decoder


def _parse_side(text: str) -> Scale:
    if "x" not in text:
        return int(text)
    h, w = map(int, text.split("x"))
    return h, w


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("varjax convert", __doc__)
    add = parser.add_argument
    add("--out", required=True, help="directory to write")
    for flag, kind in KINDS.items():
        add(f"--{flag}", metavar="FILE", help=f"official weights of {kind.description}")
    add("--repo", help="Hugging Face repository to download the files from")
    add("--revision", help="branch, tag or commit of the repository (the known commit, else main)")
    add("--scales", help="side lengths 1,2,3 or 1x1,2x4 (the file's, else those of 256 px)")
    add("--heads", type=int, help="attention heads, if attention is not cosine (width / 64)")
    add("--groups", type=int, default=32, help="groups in each group norm of the tokenizer (32)")
    add("--phi_ratio", type=float, default=0.5, help="weight of the φ convolutions (0.5)")
    add("--cosine_codes", action="store_true", help="look up codes by angle")
    add("--image_size", help="pixels of KL or MAR images: 512 or 256x384 (the file's)")
    add("--latent_channels", type=int, help="channels of MAR's KL tokenizer (the file's, else 16)")
    add("--mar_heads", metavar="E,D", help="attention heads of a MAR's encoder and decoder")
    add(
        "--latent_scale",
        type=float,
        help="factor on a KL tokenizer's latents (the file's; 0.2325 for kl16.ckpt)",
    )
    add(
        "--latent_shift",
        type=float,
        help="number subtracted from the latents first (the file's, else 0)",
    )
    add("--run", help="training run to write as a directory of weights")
    add("--to_torch", action="store_true", help="write --weights as files for the official code")
    add(
        "--layout",
        choices=get_args(Layout),
        default="official",
        help="names in a KL tokenizer's file (official)",
    )
    add("--weights", help="converted directory, training run, or published model: var_d16 …")
    add(
        "--inception", metavar="FILE", help="Inception-v3 for FID, .pth or .pb (docs/evaluation.md)"
    )
    add("--lpips_vgg", help="vgg16 of torchvision, for the perceptual loss of a tokenizer")
    add("--lpips_heads", help="heads of the lpips package for vgg16, weights/v0.1/vgg.pth")
    add(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="use the averaged weights of a run or checkpoint (default: if it has any)",
    )
    add("--debug", action="store_true", help="show mistakes with their traceback, too")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
