"""Draws the curves of training runs beside one another, as a PNG.

python -m varjax.plot runs/a runs/b --out=plot.png
python -m varjax.plot runs/var_d16 --reference=d16

Above: loss, and accuracy (of tokenizers PSNR), over the images seen, so that runs of different
batches compare. Below: one panel for each scale. Lines are training (the thick ones running means),
dots held-out images. Runs may still be going on.
"""

import argparse
import sys

from varjax.analysis.curves import draw
from varjax.analysis.run_log import REFERENCES, read_run


def main(arguments: list[str]) -> int:
    """Exit code 0, 1 with one message for what cannot be drawn, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(
        "python -m varjax.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the directory of a run")
    parser.add_argument("--out", default="plot.png", help="the picture to write (plot.png)")
    parser.add_argument("--reference", choices=tuple(REFERENCES), help="a published log beside")
    parser.add_argument("--by_scale", default="", help="metric of the lower panels, e.g. usage")
    flags = parser.parse_args(arguments)
    try:
        runs = [read_run(directory) for directory in flags.runs]
        draw(runs, flags.out, REFERENCES.get(flags.reference), flags.by_scale)
    except (ValueError, OSError) as error:
        print(f"varjax.plot: {error}", file=sys.stderr)
        return 1
    print(f"{flags.out} is written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
