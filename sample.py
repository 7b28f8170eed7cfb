"""Draws images from a trained transformer.

python sample.py --weights=runs/digits --labels=0,1,2 --count=8 --out=grid.png
"""

import logging
import sys

from varjax.var import command


def main(arguments: list[str]) -> int:
    """Exit code 0, or 1 with one line that says what is wrong."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax speaks of its own workings
    try:
        command.run(command.parse(arguments))
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
