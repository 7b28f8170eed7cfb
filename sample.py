"""Draws images from a trained transformer, or parts of an image anew.

python sample.py --weights=runs/digits --labels=0,1,2 --count=8 --out=grid.png
python sample.py edit --weights=weights/d16 --image=photo.png --box=64,64,192,192 --out=edit.png
"""

import logging
import sys

from varjax.cli import edit, sample


def main(arguments: list[str]) -> int:
    """Exit code 0, 130 after Ctrl-C, or 1 with one line that says what is wrong."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax speaks of its own workings
    try:
        if arguments[:1] == ["edit"]:
            edit.run(edit.parse(arguments[1:]))
        else:
            sample.run(sample.parse(arguments))
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sample.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
