"""Draws images, or redraws parts of one: `varjax sample` and `varjax edit`, from a clone.

python sample.py --weights=runs/digits --labels=0,1,2 --count=8 --out=grid.png
python sample.py edit --weights=weights/d16 --image=photo.png --box=64,64,192,192 --out=edit.png
"""

import sys

from varjax.cli import edit, sample


def main(arguments: list[str]) -> int:
    """Runs `varjax edit` where the first argument says so, else `varjax sample`."""
    if arguments[:1] == ["edit"]:
        return edit.main(arguments[1:])
    return sample.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
