"""Official PyTorch weights <-> varjax, training runs -> directories of weights, and LPIPS.

python -m varjax.convert --tokenizer=vae_ch160v4096z32.pth --var=var_d16.pth --out=weights/d16
python -m varjax.convert --repo=FoundationVision/var --tokenizer=… --var=… --out=weights/d16
python -m varjax.convert --run=runs/x --out=weights/x
python -m varjax.convert --to_torch --weights=weights/x --out=for_pytorch
python -m varjax.convert --lpips_vgg=vgg16.pth --lpips_heads=vgg.pth --out=weights/lpips
"""

import argparse
import sys

from varjax.convert import Choices, convert, convert_lpips, export_run, export_torch
from varjax.convert.hub import download
from varjax.core.errors import InputError
from varjax.tokenizers.vq.pyramid import Scale


def main(arguments: list[str]) -> int:
    """Exit code 0, 1 with one message for what cannot be done, 2 for a wrong command line."""
    flags = _parser().parse_args(arguments)
    try:
        _run(flags)
    except (ValueError, OSError) as error:
        print(f"varjax.convert: {error}", file=sys.stderr)
        return 1
    print(f"{flags.out} is written")
    return 0


def _run(flags: argparse.Namespace) -> None:
    official = flags.tokenizer is not None or flags.var is not None
    lpips = flags.lpips_vgg is not None or flags.lpips_heads is not None
    if [official, flags.run is not None, flags.to_torch, lpips].count(True) != 1:
        raise InputError("give --tokenizer and/or --var, or --run, or --to_torch, or --lpips_vgg")
    if flags.to_torch != (flags.weights is not None):
        raise InputError("--to_torch and --weights=DIRECTORY_OR_RUN belong together")
    if flags.to_torch:
        export_torch(flags.weights, flags.out, flags.ema)
    elif flags.run:
        export_run(flags.run, flags.out, flags.ema)
    elif lpips:
        if not (flags.lpips_vgg and flags.lpips_heads):
            raise InputError("--lpips_vgg and --lpips_heads belong together: LPIPS is made of both")
        convert_lpips(flags.out, flags.lpips_vgg, flags.lpips_heads)
    else:
        sources = {"tokenizer": flags.tokenizer, "var": flags.var}
        if flags.repo:
            sources = {k: v and download(flags.repo, v, flags.revision) for k, v in sources.items()}
        choices = Choices(
            _scales(flags.scales), flags.heads, flags.groups, flags.phi_ratio, flags.cosine_codes
        )
        for name, config in convert(flags.out, **sources, choices=choices).items():
            print(f"{name}: {config}")


def _scales(text: str | None) -> tuple[Scale, ...] | None:
    """ "1,2,2x4" -> (1, 2, (2, 4))."""
    if text is None:
        return None
    try:
        sides = [tuple(map(int, part.split("x"))) for part in text.split(",")]
        return tuple(side[0] if len(side) == 1 else (side[0], side[1]) for side in sides)
    except ValueError:
        raise InputError(f"scales={text}: give side lengths like 1,2,4 or 1x1,2x4") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m varjax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", required=True, help="the directory to write")
    add("--tokenizer", help="the official tokenizer, .pth or .safetensors")
    add("--var", help="the official transformer, or a checkpoint of the official trainer")
    add("--repo", help="download both from this Hugging Face repository")
    add("--revision", default="main", help="branch, tag or commit there (main)")
    add("--scales", help="side lengths 1,2,3 or 1x1,2x4 (default: as in the file, else 256 px)")
    add("--heads", type=int, help="of attention without cosine (width / 64)")
    add("--groups", type=int, default=32, help="of the tokenizer's group norms (32)")
    add("--phi_ratio", type=float, default=0.5, help="weight of the φ convolutions (0.5)")
    add("--cosine_codes", action="store_true", help="codes are looked up by angle")
    add("--run", help="a training run, to be written as a directory of weights")
    add("--to_torch", action="store_true", help="write --weights for the official code")
    add("--weights", help="a converted directory or a training run")
    add("--lpips_vgg", help="torchvision's vgg16, for the perceptual loss of a tokenizer")
    add("--lpips_heads", help="the lpips package's heads for it, weights/v0.1/vgg.pth")
    add(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="averaged weights of a run, or not (default: averaged if it has them)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
