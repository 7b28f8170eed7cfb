"""Generates and edits images: `varjax sample`, `edit`, `vary` and `upscale`.

python sample.py --weights=runs/digits --labels=0,1,2 --count=8 --out=grid.png
python sample.py edit --weights=weights/d16 --image=photo.png --box=64,64,192,192 --out=edit.png
python sample.py vary --weights=weights/d16 --image=photo.png --keep_scales=5
python sample.py upscale --weights=weights/d16 --image=small.png
"""

import sys

from varjax.cli import edit, sample, upscale, vary

COMMANDS = {"edit": edit, "vary": vary, "upscale": upscale}


def main(arguments: list[str]) -> int:
    """Runs the command that the first argument names, else `varjax sample`."""
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]].main(arguments[1:])
    return sample.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
